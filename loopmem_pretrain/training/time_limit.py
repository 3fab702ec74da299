"""When to stop so that the last checkpoint is written before `faults.time_limit_seconds` are over."""

import os
import time
from pathlib import Path

# What comes on top of the longest interval and saves so far: half of both, and the end of the process (seconds).
MARGIN, ENDING = 1.5, 10.0


class TimeLimit:
    """One rank's view; all ranks stop when any of them has to (`Trainer.agree`)."""

    def __init__(self, seconds: int | None) -> None:
        self.seconds = seconds
        self.longest_interval = 0.0
        """Seconds between two agreements, what lies between them included."""
        self.agreed: float | None = None

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
