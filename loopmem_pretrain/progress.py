"""A progress bar on a terminal, plain lines elsewhere: a log file is no place for a bar that redraws itself."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class ProgressBar:
    """Shows done / total, a headline and the time left, on stderr."""

    def __init__(self, label: str, total: int, start: int = 0, unit: str = "step") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start, self.started, self.last_line = start, time.monotonic(), 0.0
        self.bar = None
        self.waiting = ""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=label, total=total, initial=start, unit=unit, dynamic_ncols=True)

    def update(self, done: int, headline: str = "") -> None:
        """`done` of `total` are done."""
        if self.bar is not None:
            self.bar.set_postfix_str(headline, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        left = (now - self.started) / max(1, done - self.start) * (self.total - done)
        self.waiting = f"{self.label}: {done:,}/{self.total:,} {self.unit}s  {headline}  {_clock(left)} left"
        if done >= self.total or now - self.last_line >= 2:  # a line every two seconds is enough for a log
            self.last_line = now
            self._print()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self._print()

    def _print(self) -> None:
        if self.waiting:
            print(self.waiting, file=sys.stderr, flush=True)
        self.waiting = ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def bytes_bar(label: str) -> Iterator[Callable[[int, int | None, Mapping[str, Any]], None]]:
    """A bar for `data.prepare`: (done bytes, total bytes or None, info with a stage), one bar a stage."""
    bars: dict[str, ProgressBar] = {}

    def progress(done: int, total: int | None, info: Mapping[str, Any]) -> None:
        stage = str(info.get("stage", label))
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = ProgressBar(stage, total or 0, unit="byte")
        facts = (f"{value:,} {key}" for key, value in info.items() if isinstance(value, int) and value)
        bars[stage].update(done, ", ".join(facts))

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
