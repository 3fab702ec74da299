"""A rank is killed in mid-run, the launcher starts all again, and the run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.errors import DataError
from loopmem_pretrain.tools.starts import read_starts
from tests.configs import tiny_run
from tests.e2e.test_training import EXACT, lines, run

STEPS = 40


def config_of(run_dir, sentences):
    return tiny_run(
        run_dir,
        sentences,
        model={"vocab_size": 320},
        training={"train_steps": STEPS},
        checkpoint={"interval_steps": 10},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, sentences):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert run(config_of(run_dir, sentences)) == ("done", None)
    return run_dir


def rank_process(launcher: int, rank: int) -> int:
    """Process id of a rank that the launcher has started."""
    children = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=True).stdout
    for pid in map(int, children.split()):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"no rank {rank} among {children}")


def measurements(run_dir):
    """By step; of steps that were trained twice those of the later time."""
    return {line["step"]: {key: line[key] for key in EXACT if key in line} for line in lines(run_dir)}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]


@pytest.mark.parametrize(
    ("launcher", "options", "victim"),
    [
        ([sys.executable], ["--ranks", "2", "--max-restarts", "1"], 0),
        pytest.param(TORCHRUN, [], 1, marks=pytest.mark.slow),
    ],
    ids=["ranks", "torchrun"],
)
def test_a_killed_rank_is_started_again(tmp_path, sentences, undisturbed, launcher, options, victim):
    run_dir, config_file = tmp_path / "run", tmp_path / "config.yaml"
    config_file.write_text(dump_config(config_of(run_dir, sentences)))
    command = [*launcher, "-m", "loopmem_pretrain", "train", "--config", str(config_file), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "step_00000010").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(rank_process(process.pid, victim), signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "resumed from" in errors, errors
    if options:
        assert "restart 1 of 1 in 5 s" in errors
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    first, second = read_starts(run_dir)
    assert first.begin["step"] == 0 and second.begin["step"] >= 10
    assert second.end is not None and second.end["status"] == "done" and (second.hours or 0) > 0
    assert measurements(run_dir) == measurements(undisturbed)


def test_a_refused_start_ends_with_its_own_exit_code(tmp_path, sentences):
    """Whatever the libraries do when the interpreter ends: an abort that is registered before torch's stands for it."""
    config = tiny_run(tmp_path / "run", tmp_path / "nowhere", model={"vocab_size": 320})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    program = (
        "import atexit, os, sys; atexit.register(os.abort); from loopmem_pretrain.cli import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", program, "train", "--config", str(tmp_path / "config.yaml")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == DataError.exit_code, ended.stderr
    assert "nowhere" in ended.stderr and "Aborted" not in ended.stderr
