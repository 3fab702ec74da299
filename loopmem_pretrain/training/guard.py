"""A small process beside a rank that ends it when even its watchdog thread has fallen silent.

A thread cannot run while another holds the interpreter lock (a C call that hangs and never gave it back), nor while it
waits for a file system that does not answer. So the watchdog says at every tick, over a pipe, how long it may be silent
from now on; this process counts, and then sends SIGABRT, at which faulthandler writes the stacks of all threads to the
rank's stderr. It ends with the rank: the pipe closes then.

    python -m loopmem_pretrain.training.guard PID RANK RUN_DIR
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from loopmem_pretrain.errors import HangDetected

# Between looks at the rank (seconds).
TICK = 1.0
# How much later than the watchdog the guard ends a rank, and how long SIGABRT may take before SIGKILL (seconds).
GRACE = 10.0


class Guard:
    """The rank's side: starts the process, tells it that the watchdog is alive."""

    def __init__(self, rank: int, run_dir: Path) -> None:
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(rank), str(run_dir.resolve())]
        package_root = Path(__file__).resolve().parents[2]
        # In a session of its own: Ctrl-C is for the ranks.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=package_root, start_new_session=True)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        os.set_blocking(self.pipe.fileno(), False)  # a guard that is slow or stopped must not hold the watchdog up

    def tell(self, seconds: float, where: str) -> None:
        """The watchdog is alive and may be silent for `seconds`; `where` the rank is, in words.

        Raises:
            BrokenPipeError: the guard is gone.
        """
        try:
            os.write(self.pipe.fileno(), f"{seconds} {where}\n".encode())
        except BlockingIOError:  # it has enough to read
            return

    def close(self) -> None:
        self.pipe.close()
        self.process.wait()


def watch(pid: int, rank: int, run_dir: Path) -> None:
    """Return when the rank has ended, or end it."""
    allowed, where, silent = float("inf"), "", 0.0
    last = time.monotonic()
    while True:
        readable, _, _ = select.select([0], [], [], TICK)
        elapsed, last = time.monotonic() - last, time.monotonic()
        if readable:
            heard = os.read(0, 1 << 16)  # as much as a pipe holds, so whole lines
            if not heard:
                return
            seconds, _, where = heard.decode().splitlines()[-1].partition(" ")
            allowed, silent = float(seconds) + GRACE, 0.0
        elif not _is_stopped(pid):
            silent += min(elapsed, 2 * TICK)  # the time that this process itself was stopped does not count
        if silent >= allowed:
            _end(pid, rank, run_dir, silent, where)
            return


def _is_stopped(pid: int) -> bool:
    """Whether the process is held by SIGSTOP or a debugger, so that its silence means nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    except (FileNotFoundError, ProcessLookupError):  # it has ended, which the pipe tells
        return False


def _end(pid: int, rank: int, run_dir: Path, silent: float, where: str) -> None:
    fault = HangDetected(
        f"rank {rank}: not even its watchdog ran for {silent:.0f} s, {where}: a call hangs that holds the interpreter "
        "lock, or the file system of the run folder does not answer; the rank is ended by SIGABRT",
        "see its stacks on stderr; then start the same command to resume from the last checkpoint",
    )
    print(f"loopmem (rank {rank}): error: {fault}", file=sys.stderr, flush=True)

    def record() -> None:
        from loopmem_pretrain.training import run_folder

        run_folder.hold(run_dir)  # the rank that this guards belongs to the start that trains there
        run_folder.write_failure(run_dir, fault)

    recorder = threading.Thread(target=record, daemon=True)  # waited for briefly: that file system may be what hangs
    recorder.start()
    recorder.join(GRACE)
    with contextlib.suppress(ProcessLookupError):  # another has ended it meanwhile
        _kill(pid)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGABRT)
    if not select.select([0], [], [], GRACE)[0]:  # readable when the rank has closed the pipe by ending
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # schedulers send them to every process of a job; they are for the ranks
    watch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
