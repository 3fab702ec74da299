"""Ends a rank that makes no progress, and says in RUN/heartbeat.json that a run is alive.

A thread on every rank looks once a second whether the trainer has counted progress: a step, a micro-batch, another
phase. Where it has not for too long, the stacks of all threads go to RUN/stacks/, and the process ends with exit code
8. When one rank hangs the others soon wait for it in a collective, so all of them write their stacks: the rank whose
main thread is not in a collective is the one to look at.

Counting progress costs the trainer an attribute write. What the thread cannot see because it cannot run itself, such as
a call that hangs with the interpreter lock, is left to guard.py.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from loopmem_pretrain import control
from loopmem_pretrain.config.training import FaultConfig
from loopmem_pretrain.errors import EnvironmentFault, HangDetected
from loopmem_pretrain.training import run_folder
from loopmem_pretrain.training.guard import Guard

log = logging.getLogger(__name__)

Phase = Literal["start", "resume", "step", "validation", "replica check", "save", "end"]
SLOW: tuple[Phase, ...] = ("start", "resume", "save", "end")
"""Phases that may take `faults.slow_phase_timeout_seconds`; so may the first step and validation: they compile."""

TICK = 1.0
"""Seconds between looks at the trainer."""
HEARTBEAT = 5.0
"""Seconds between writings of heartbeat.json."""
LINGER = 5.0
"""Seconds between a rank's stacks and its end: a launcher ends the other ranks then, and they shall write theirs."""

# What a scheduler or launcher calls this start: key in heartbeat.json -> environment variable.
JOB_IDS = {"slurm_job_id": "SLURM_JOB_ID", "torchelastic_restart_count": "TORCHELASTIC_RESTART_COUNT"}


@contextlib.contextmanager
def ends_after(seconds: float, what: str) -> Iterator[None]:
    """The process ends with exit code 8, its stacks on stderr, where the block takes longer than `seconds`.

    For the time before a run folder is known to be ours, when nothing may be written to it.
    """

    def end() -> None:
        fault = HangDetected(
            f"{what} takes longer than {seconds:.0f} s (faults.slow_phase_timeout_seconds); the stacks are above",
            "see whether the file system of the run folder answers, then start the same command again",
        )
        faulthandler.dump_traceback(2)
        os.write(2, f"loopmem: error: {fault}\n".encode())
        os._exit(HangDetected.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """Watches this rank from now until `close`."""

    def __init__(self, run_dir: Path, rank: int, faults: FaultConfig) -> None:
        self.run_dir, self.rank, self.faults = run_dir, rank, faults
        self.current: Phase = "start"
        self.step = 0
        self.count = 0
        """Goes up with all progress; the trainer writes it, the thread reads it."""
        self.passed: set[Phase] = set()
        """Phases that have been gone through once."""
        self.has_found_hang = False
        """The process is about to end; a main thread that comes back, because other ranks have ended, waits in `close`
        and leaves status.json alone."""
        self.closed = threading.Event()
        self.disk_complains = False
        self.guard: Guard | None = Guard(rank, run_dir)
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def micro_batch(self) -> None:
        """The rank has begun another micro-batch."""
        self.count += 1

    def step_done(self, step: int) -> None:
        """The rank has done `step` steps."""
        self.step = step
        self.count += 1
        self.passed.add(self.current)

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What happens inside is `name`, with the time limit of that phase."""
        outer, self.current = self.current, name
        self.count += 1
        try:
            yield
        finally:
            self.passed.add(name)
            self.current = outer
            self.count += 1

    def close(self) -> None:
        """Stop watching; the heartbeat ends with its file removed."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.thread.join()
        if self.guard:
            self.guard.close()
        if self.rank == 0:
            try:
                (self.run_dir / "heartbeat.json").unlink(missing_ok=True)
            except OSError as error:
                log.warning("cannot remove the heartbeat of a run that has ended: %s", error)

    def _limit(self) -> tuple[int, str]:
        """Seconds without progress that are allowed now, and the field that says so."""
        faults = self.faults
        if self.current in SLOW or self.current not in self.passed:
            return max(faults.slow_phase_timeout_seconds, faults.hang_timeout_seconds), "slow_phase_timeout_seconds"
        return faults.hang_timeout_seconds, "hang_timeout_seconds"

    def _watch(self) -> None:
        seen, silent = self.count, 0.0
        last = time.monotonic()
        beat = last
        while True:
            now = time.monotonic()
            # A process that was stopped, or whose machine slept, made no progress then and does not hang.
            elapsed, last = min(now - last, 2 * TICK), now
            silent = silent + elapsed if self.count == seen else 0.0
            seen = self.count
            limit, field = self._limit()
            if self.guard:
                self._tell_guard(limit)
            if self.rank == 0 and now >= beat:
                self._end_if_replaced()
                self._write_heartbeat(silent)
                beat = now + HEARTBEAT
            if silent >= limit:
                self._end(silent, limit, field)
            if self.closed.wait(TICK):
                return

    def _where(self) -> str:
        return f"in phase {self.current}, {self.step} steps done"

    def _tell_guard(self, limit: int) -> None:
        assert self.guard is not None
        try:
            self.guard.tell(limit, self._where())
        except BrokenPipeError:
            log.warning("the guard of rank %d is gone: a hang that holds the interpreter lock goes unseen", self.rank)
            self.guard = None

    def _end_if_replaced(self) -> None:
        """A start that the scheduler has repeated elsewhere ends at once, as if killed: the folder is another's."""
        try:
            control.refuse_if_replaced(self.run_dir)
        except EnvironmentFault as fault:
            os.write(2, f"loopmem (rank {self.rank}): error: {fault}\n".encode())
            os._exit(fault.exit_code)
        except OSError as error:
            if not self.disk_complains:
                log.warning("cannot read %s: %s", self.run_dir / control.FENCE, error)
            self.disk_complains = True

    def _write_heartbeat(self, silent: float) -> None:
        record: dict[str, Any] = {
            "phase": self.current,
            "step": self.step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds_since_progress": round(silent, 1),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **{key: os.environ[name] for key, name in JOB_IDS.items() if name in os.environ},
        }
        path = self.run_dir / "heartbeat.json"
        temporary = path.with_name(".heartbeat.json.tmp")
        try:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            os.replace(temporary, path)  # not flushed to the disk: that can take long, and an old one tells nothing
        except OSError as error:
            if not self.disk_complains:
                log.warning("cannot write %s: %s; it is tried again, without another warning", path, error)
            self.disk_complains = True

    def _end(self, silent: float, limit: int, field: str) -> None:
        """Write the stacks, say so, and end this process: its main thread cannot."""
        self.has_found_hang = True
        where = f"rank {self.rank}: no progress for {silent:.0f} s {self._where()}"
        stacks = self._write_stacks(where)
        fault = HangDetected(
            f"{where}; faults.{field} allows {limit}; the stacks of all threads: {stacks}",
            "compare the stacks of all ranks: the one that does not wait in a collective is the cause; if it only was "
            f"slow, raise faults.{field}; the same command resumes from the last checkpoint",
        )
        os.write(2, f"loopmem (rank {self.rank}): error: {fault}\n".encode())  # sys.stderr may be locked by what hangs
        run_folder.write_failure(
            self.run_dir, fault, complain=lambda text: os.write(2, f"loopmem (rank {self.rank}): {text}\n".encode())
        )
        time.sleep(LINGER)
        os._exit(HangDetected.exit_code)

    def _write_stacks(self, where: str) -> str:
        """Name of the file with the stacks of all threads; where it cannot be written they go to stderr."""
        path = self.run_dir / "stacks" / f"rank_{self.rank:05d}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{where}; host {socket.gethostname()}, pid {os.getpid()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            faulthandler.dump_traceback(2)
            return f"above ({path} cannot be written: {error.strerror})"
        return str(path)
