"""When to stop so that the last checkpoint is written before the time of this start is over."""

import os
import time
from pathlib import Path

# What comes on top of the longest interval and saves so far: half of both, and the end of the process (seconds).
MARGIN, ENDING = 1.5, 10.0


class TimeLimit:
    """One rank's view; all ranks stop when any of them has to (`Trainer.agree`)."""

    def __init__(self, seconds: int | None, job_end: float | None = None) -> None:
        """`seconds` counts from the start of the process, `job_end` from the epoch; the earlier one holds."""
        self.seconds: float | None = seconds
        self.source = f"faults.time_limit_seconds ({seconds}) are"
        left = None if job_end is None else job_end - time.time() + seconds_since_process_start()
        if left is not None and (seconds is None or left < seconds):
            self.seconds, self.source = left, "the time of the job is"
        self.longest_interval = 0.0
        """Seconds between two agreements, what lies between them included."""
        self.agreed: float | None = None

    def __str__(self) -> str:
        return self.source

    def is_due(self, longest_save: float) -> bool:
        """Whether going on to the next agreement could take too long. Call it once at each agreement.

        `longest_save`: seconds that a save took so far, writing included. There may be two to wait for: one that is
        under way, and the last one.
        """
        now = time.monotonic()
        if self.agreed is not None:
            self.longest_interval = max(self.longest_interval, now - self.agreed)
        self.agreed = now
        if self.seconds is None:
            return False
        needed = MARGIN * (self.longest_interval + 2 * longest_save) + ENDING
        return seconds_since_process_start() + needed >= self.seconds


def seconds_since_process_start() -> float:
    """From the system's books, so imports count too."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
