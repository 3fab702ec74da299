"""Hangs and time limits of whole runs: one rank stops making progress, all end, and the stacks tell which it was."""

import json
import os
import time

import pytest

from tests.distributed import run_ranks
from tests.e2e.test_training import ON_RANK, config_for, run

# `trainer.engine.METHOD` of rank 1 never comes back from one of its calls.
HANG = """
import time
if trainer.rank == 1:
    calls, method = [], trainer.engine.{method}
    def never_comes_back(*args):
        calls.append(args)
        if len(calls) == {call}:
            time.sleep(1000)
        return method(*args)
    trainer.engine.{method} = never_comes_back
"""


@pytest.mark.parametrize(
    ("method", "call", "faults", "phase"),
    [
        ("train_batch", 8, {"hang_timeout_seconds": 3}, "phase step, 7 steps done"),
        ("evaluate", 2, {"hang_timeout_seconds": 3}, "phase validation, 20 steps done"),
        pytest.param(
            "collect_states",
            1,
            {"hang_timeout_seconds": 3, "slow_phase_timeout_seconds": 15},
            "phase save, 10 steps done",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_hang_outside_of_collectives_ends_all_ranks(tmp_path, sentences, method, call, faults, phase):
    config = config_for(tmp_path, sentences, faults=faults)
    with pytest.raises(AssertionError) as ended:
        run_ranks(ON_RANK, 2, config, None, HANG.format(method=method, call=call), "")
    assert str(ended.value).count("exit code 8") == 2
    both = {path.name[:10]: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert sorted(both) == ["rank_00000", "rank_00001"]
    assert "in never_comes_back" in both["rank_00001"]
    assert "in never_comes_back" not in both["rank_00000"]
    assert all(phase in text for text in both.values())
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and phase in status["reason"]
    assert (tmp_path / "heartbeat.json").exists()  # an old one: the run did not end in order


def test_a_slow_save_is_no_hang(tmp_path, sentences):
    before = """
import time
collect = trainer.engine.collect_states
def slowly(*args):
    time.sleep(4 * trainer.rank)
    return collect(*args)
trainer.engine.collect_states = slowly
"""
    config = config_for(tmp_path, sentences, faults={"hang_timeout_seconds": 2}, checkpoint={"interval_steps": 20})
    assert run(config, before=before) == ("done", None)
    assert not (tmp_path / "stacks").exists()
    assert not (tmp_path / "heartbeat.json").exists()


@pytest.mark.parametrize(
    "parallel", [{"pipeline_model_parallel_size": 2}, {"zero_stage": 3}], ids=["pipeline", "zero3"]
)
def test_every_rank_counts_micro_batches(tmp_path, sentences, parallel):
    before = """
counted = []
trainer.engine.on_micro_batch(lambda: counted.append(1))
close = trainer.watchdog.close
def check():
    close()
    # 2 steps; a validation of 8 samples in micro-batches of 4, over the data-parallel ranks; the checkpoint's sample
    expected = 2 * trainer.engine.accumulation_steps + 2 // trainer.topology.data_size + 1
    assert len(counted) == expected, (len(counted), expected)
trainer.watchdog.close = check
"""
    config = config_for(
        tmp_path, sentences, parallel=parallel, training={"train_steps": 2}, schedule={"warmup_steps": 1}
    )
    assert run(config, before=before) == ("done", None)


def test_the_rank_with_the_latest_clock_stops_all_before_the_time_limit(tmp_path, sentences):
    config = config_for(tmp_path, sentences, faults={"time_limit_seconds": 100_000})
    before = "if trainer.rank == 1: trainer.time_limit.seconds = 1"
    assert run(config, before=before) == ("interrupted", None)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"] == "stopped before faults.time_limit_seconds (100000) are over"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"
    assert run(config) == ("done", None)


def test_a_time_limit_is_kept(tmp_path, sentences):
    config = config_for(
        tmp_path,
        sentences,
        faults={"time_limit_seconds": 16},
        training={"train_steps": 10**6},
        checkpoint={"interval_steps": 50},
    )
    run_ranks(ON_RANK, 1, config, 1)  # the helper that forks ranks may have to start first
    start = time.monotonic()
    assert run(config, ranks=1) == ("interrupted", None)
    assert time.monotonic() - start < 16


def test_a_run_folder_that_does_not_answer_ends_all_ranks(tmp_path, sentences):
    config = config_for(tmp_path / "run", sentences, faults={"slow_phase_timeout_seconds": 4})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # there is a run, so its configuration is compared
    os.mkfifo(tmp_path / "run" / "config.yaml")  # whoever reads it waits for ever
    with pytest.raises(AssertionError) as ended:
        run_ranks(ON_RANK, 2, config, None, "", "")
    assert str(ended.value).count("exit code 8") == 2
    assert not (tmp_path / "run" / "status.json").exists()  # nobody knows yet whose folder it is
