"""Ranks that are missing at the start, die or hang in mid-step: the others end by themselves, in bounded time.

The ranks are processes of their own, as under a scheduler that does not end the others when one fails.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from loopmem_pretrain.config.load import dump_config
from tests.configs import tiny_run
from tests.distributed import Command, HeldPort, run_command

BOUND = 60
"""Seconds after which a rank counts as hanging. What is measured is a few seconds; the machine may be busy."""


class Ranks:
    """`loopmem train` once for each of `started` (rank numbers), without a launcher."""

    def __init__(
        self, run_dir: Path, config_file: Path, world_size: int, started: list[int], port: int, *overrides: str
    ) -> None:
        self.run_dir = run_dir
        self.processes = {}
        for rank in started:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes[rank] = Command("train", "--config", config_file, *overrides, env=environment)

    def wait_for_steps(self) -> None:
        """Until the first line of metrics.jsonl: all ranks are training."""
        metrics, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            ended = {rank for rank, process in self.processes.items() if process.wait(0) is not None}
            assert not ended, {rank: self.processes[rank].stderr for rank in ended}
            assert time.monotonic() < deadline, f"no line in {metrics}"
            time.sleep(0.1)

    def end(self, but: int | None = None) -> dict[int, tuple[int, str]]:
        """(exit code, stderr) of all ranks but one, which have to end by themselves; by rank."""
        deadline = time.monotonic() + BOUND
        results = {}
        for rank, process in self.processes.items():
            if rank != but:
                code = process.wait(max(1, deadline - time.monotonic()))
                if code is None:
                    os.kill(process.pid, signal.SIGABRT)  # faulthandler writes where it hangs
                    process.wait(BOUND)
                    pytest.fail(f"rank {rank} has not ended after {BOUND} s\n{process.stderr}")
                assert "Traceback" not in process.stderr, process.stderr
                results[rank] = (code, process.stderr)
        return results


@pytest.fixture
def ranks(tmp_path, sentences):
    """ranks(world_size, started, *overrides, **sections) starts; whatever is left is killed after the test."""
    all_ranks = []

    def start(world_size: int, started: list[int], *overrides: str, **sections) -> Ranks:
        training = {"train_steps": 1_000_000, **sections.pop("training", {})}
        logging = {"interval_steps": 2, "peak_tflops": 0.05}
        model = {"vocab_size": 320}
        config = tiny_run(tmp_path / "run", sentences, model=model, training=training, logging=logging, **sections)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        port = ports.enter_context(HeldPort())
        all_ranks.append(Ranks(tmp_path / "run", tmp_path / "config.yaml", world_size, started, port, *overrides))
        return all_ranks[-1]

    with contextlib.ExitStack() as ports:
        yield start
        for process in (process for each in all_ranks for process in each.processes.values()):
            process.kill()


SIZES = {"data": {}, "tensor": {"tensor_model_parallel_size": 2}, "pipeline": {"pipeline_model_parallel_size": 2}}


@pytest.mark.parametrize(
    ("world_size", "sizes", "victim"),
    [
        (2, "tensor", 0),  # rank 0 also holds the store
        pytest.param(2, "pipeline", 1, marks=pytest.mark.slow),
        pytest.param(3, "data", 1, marks=pytest.mark.slow),
        pytest.param(4, "pipeline", 0, marks=pytest.mark.slow),  # the third rank shares no group with it but the world
    ],
)
def test_a_rank_that_is_killed_ends_the_others(ranks, world_size, sizes, victim):
    training = {"global_batch_size": 4 * world_size, "micro_batch_size": 1}
    job = ranks(world_size, list(range(world_size)), training=training, parallel=SIZES[sizes])
    job.wait_for_steps()
    os.kill(job.processes[victim].pid, signal.SIGKILL)
    for rank, (code, errors) in job.end(but=victim).items():
        assert code == 6, (rank, code, errors)
        assert "lost contact with another rank" in errors and "what to do: " in errors, (rank, errors)
    status = json.loads((job.run_dir / "status.json").read_text())
    assert status["status"] == "failed" and "lost contact" in status["reason"]


def test_a_rank_that_hangs_ends_the_others(ranks):
    job = ranks(2, [0, 1], parallel={"collective_timeout_seconds": 10, "tensor_model_parallel_size": 2})
    job.wait_for_steps()
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    code, errors = job.end(but=1)[0]
    assert code == 8, errors
    assert "collective_timeout_seconds" in errors


@pytest.mark.parametrize("missing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_missing_is_named(ranks, missing):
    job = ranks(2, [1 - missing], parallel={"join_timeout_seconds": 3})
    code, errors = job.end()[1 - missing]
    assert code == 6, errors
    assert f"rank {missing} of 2 did not join within 3 s" in errors


def test_ranks_that_do_not_fit_are_refused_before_anything_starts(tmp_path, ranks):
    job = ranks(3, [0], parallel={"tensor_model_parallel_size": 2})
    code, errors = job.end()[0]
    assert code == 2
    assert "3 ranks are not a multiple of" in errors and "start 2, 4, 6, ... ranks" in errors
    assert not (tmp_path / "run").exists()


def test_ranks_asked_for_that_do_not_fit_are_refused_once(tmp_path, ranks):
    ranks(2, [], parallel={"tensor_model_parallel_size": 2})
    result = run_command("train", "--config", tmp_path / "config.yaml", "--ranks", "3")
    assert result.returncode == 2
    assert result.stderr.count("3 ranks are not a multiple of") == 1
