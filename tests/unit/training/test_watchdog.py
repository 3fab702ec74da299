"""The watchdog ends what hangs, with its stacks, and leaves alone what is slow or was stopped. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopmem_pretrain.config.training import FaultConfig
from loopmem_pretrain.training import guard, watchdog
from loopmem_pretrain.training.watchdog import Watchdog

PRELUDE = """
import faulthandler, signal, sys, time
from pathlib import Path
from loopmem_pretrain.config.training import FaultConfig
from loopmem_pretrain.training import watchdog
faulthandler.enable()
watchdog.LINGER = 0.1
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, FaultConfig(hang_timeout_seconds=2, slow_phase_timeout_seconds=60))
"""


@pytest.fixture
def rank(tmp_path):
    """rank(code) starts a process with a watchdog `dog` that allows 2 s in a step and 60 s in slow phases."""
    (tmp_path / "config.yaml").touch()  # what marks a run folder
    started = []

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PRELUDE + code, str(tmp_path)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


HANG = """
def sleeps_for_ever():
    time.sleep(1000)
with dog.phase("step"):
    dog.step_done(7)
    sleeps_for_ever()
"""


def test_a_hang_leaves_stacks_a_reason_and_exit_code_8(rank, tmp_path):
    process = rank(HANG)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 8, errors
    (stacks,) = (tmp_path / "stacks").iterdir()
    assert stacks.name.startswith("rank_00003-")
    assert "in sleeps_for_ever" in stacks.read_text()
    for said in ("no progress for", "in phase step, 7 steps done", "faults.hang_timeout_seconds", str(stacks)):
        assert said in errors
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and "no progress" in status["reason"]


def test_stacks_that_cannot_be_written_go_to_stderr(rank, tmp_path):
    (tmp_path / "stacks").write_text("not a folder")
    _, errors = rank(HANG).communicate(timeout=30)
    assert "in sleeps_for_ever" in errors and "cannot be written" in errors


def test_slow_phases_the_first_step_and_micro_batches_are_no_hang(rank):
    code = """
with dog.phase("save"):
    time.sleep(3)
with dog.phase("step"):
    time.sleep(3)  # the first one compiles
    dog.step_done(1)
    with dog.phase("validation"):
        time.sleep(3)  # so does this
    with dog.phase("validation"):
        for _ in range(8):
            time.sleep(0.5)
            dog.micro_batch()
dog.close()
"""
    process = rank(code)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_process_that_was_stopped_does_not_hang(rank, tmp_path):
    code = """
with dog.phase("step"):
    dog.step_done(1)
    Path(sys.argv[1], "ready").touch()
    for _ in range(60):
        time.sleep(0.1)
        dog.micro_batch()
dog.close()
"""
    process = rank(code)
    while not (tmp_path / "ready").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    assert guard._is_stopped(process.pid)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    assert not guard._is_stopped(process.pid)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_hang_that_holds_the_interpreter_lock(rank, tmp_path):
    code = """
import ctypes
def holds_the_lock():
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, PyDLL does not give the lock back
with dog.phase("step"):
    dog.step_done(7)
    time.sleep(1.5)  # the guard hears that 2 s are allowed
    holds_the_lock()
"""
    process = rank(code)
    _, errors = process.communicate(timeout=2 + guard.GRACE + 30)
    assert process.returncode == -signal.SIGABRT, errors
    assert "in holds_the_lock" in errors
    assert "rank 3: not even its watchdog ran for" in errors and "in phase step, 7 steps done" in errors
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed" and "not even its watchdog" in status["reason"]


GUARD = """
import sys
from pathlib import Path
from loopmem_pretrain.training import guard
guard.TICK, guard.GRACE = 0.05, 1.0
print("watching", flush=True)
guard.watch(int(sys.argv[1]), 3, Path(sys.argv[2]))
"""


@pytest.fixture
def guarded(tmp_path):
    """(a process, the guard that allows it 2 s of silence): ended where the test leaves them."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    command = [sys.executable, "-c", GUARD, str(victim.pid), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as guarding:
        guarding.stdout.readline()
        yield victim, guarding
        guarding.kill()
    victim.kill()
    victim.wait()


def say_alive(guarding):
    guarding.stdin.write(b"1 in phase step\n")
    guarding.stdin.flush()


def test_a_guard_leaves_a_stopped_rank_alone_and_ends_it_when_it_is_silent_by_itself(guarded):
    victim, guarding = guarded
    victim.send_signal(signal.SIGSTOP)
    say_alive(guarding)
    time.sleep(4)
    assert victim.poll() is None and guarding.poll() is None
    victim.send_signal(signal.SIGCONT)
    assert victim.wait(timeout=60) == -signal.SIGABRT


def test_a_guard_that_was_stopped_itself_does_not_count_that_time(guarded):
    victim, guarding = guarded
    say_alive(guarding)
    time.sleep(0.5)
    guarding.send_signal(signal.SIGSTOP)
    time.sleep(4)
    guarding.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    say_alive(guarding)
    time.sleep(0.5)
    assert victim.poll() is None and guarding.poll() is None


def test_the_guard_ends_with_the_rank(rank):
    process = rank("print(dog.guard.process.pid, file=sys.stderr, flush=True)\ntime.sleep(1000)")
    pid = int(process.stderr.readline())
    process.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the guard has outlived its rank"
        time.sleep(0.1)


def test_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    monkeypatch.setattr(watchdog, "HEARTBEAT", 0.1)
    path = tmp_path / "heartbeat.json"
    dog = Watchdog(tmp_path, 0, FaultConfig())
    try:
        with dog.phase("save"):
            time.sleep(0.5)
            beat = json.loads(path.read_text())
    finally:
        dog.close()
    assert (beat["phase"], beat["step"], beat["pid"], beat["slurm_job_id"]) == ("save", 0, os.getpid(), "1234")
    assert 0 < beat["seconds_since_progress"] < 1
    assert "torchelastic_restart_count" not in beat
    assert not path.exists()


def test_a_heartbeat_that_cannot_be_written_warns_once_and_comes_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    monkeypatch.setattr(watchdog, "HEARTBEAT", 0.1)
    blocker = tmp_path / ".heartbeat.json.tmp"
    blocker.mkdir()
    dog = Watchdog(tmp_path, 0, FaultConfig())
    try:
        time.sleep(0.5)
        assert caplog.text.count("cannot write") == 1
        blocker.rmdir()
        time.sleep(0.5)
        assert (tmp_path / "heartbeat.json").exists()
    finally:
        dog.close()


def test_a_guard_that_is_gone_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    dog = Watchdog(tmp_path, 1, FaultConfig())
    try:
        assert dog.guard
        dog.guard.process.kill()
        time.sleep(0.5)
        assert caplog.text.count("the guard of rank 1 is gone") == 1
    finally:
        dog.close()
    assert not (tmp_path / "heartbeat.json").exists()  # rank 0's
