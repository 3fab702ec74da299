"""A progress bar on a terminal, plain lines elsewhere: a log file is no place for a bar that redraws itself."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from loopmem_pretrain.data.files import Progress
from loopmem_pretrain.words import counted

LINE_SECONDS = 2.0
"""A plain line so often is enough for a log."""


@contextlib.contextmanager
def unread_output_dropped(stream: TextIO) -> Iterator[None]:
    """What is printed inside, and all that follows, goes nowhere once the stream's reader has gone (`| head`)."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LinesBesideBars(logging.StreamHandler[TextIO]):
    """Log lines on stderr: a bar that is being drawn there makes room, and is drawn again below."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; where nothing has imported tqdm there is no bar."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with tqdm.external_write_mode(file=self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)


class ProgressBar:
    """Shows what is done of `total` (0: unknown), a headline and the time left, on stderr."""

    def __init__(self, label: str, total: int, start: int = 0, unit: str = "step") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start, self.started, self.last_line = start, time.monotonic(), 0.0
        self.bar = None
        self.waiting, self.is_complete = "", False
        if sys.stderr.isatty():
            from tqdm import tqdm

            scaled = unit == "B"
            self.bar = tqdm(
                desc=label, total=total or None, initial=start, unit=unit, unit_scale=scaled, dynamic_ncols=True
            )

    def update(self, done: int, headline: str = "", always: bool = False) -> None:
        """`done` of `total` are done; `always` prints a line also if the last was a moment ago."""
        if self.bar is not None:
            self.bar.set_postfix_str(headline, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        parts = [self._amount(done), headline, self._left(done)]
        self.waiting = f"{self.label}: " + "  ".join(part for part in parts if part)
        completes = done == self.total and not self.is_complete  # which may be said again and again
        self.is_complete |= completes
        if completes or always or time.monotonic() - self.last_line >= LINE_SECONDS:
            self._print()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self._print()

    def _print(self) -> None:
        if self.waiting:
            with unread_output_dropped(sys.stderr):
                print(self.waiting, file=sys.stderr, flush=True)
            self.last_line = time.monotonic()
        self.waiting = ""

    def _amount(self, done: int) -> str:
        if self.unit == "B":
            size, unit = (1e6, "MB") if max(done, self.total) >= 1e6 else (1e3, "kB")
            return f"{done / size:,.1f}/{self.total / size:,.1f} {unit}" if self.total else f"{done / size:,.1f} {unit}"
        return f"{done:,}/{counted(self.total, self.unit)}" if self.total else counted(done, self.unit)

    def _left(self, done: int) -> str:
        elapsed, advanced = time.monotonic() - self.started, done - self.start
        if not self.total or advanced <= 0 or elapsed < 1 or done >= self.total:
            return ""
        minutes, seconds = divmod(round(elapsed / advanced * (self.total - done)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"


@contextlib.contextmanager
def stage_bars(unit: str = "B") -> Iterator[Progress]:
    """A `Progress` that shows one bar a stage."""
    bars: dict[str, ProgressBar] = {}

    def progress(done: int, total: int | None, info: Mapping[str, Any]) -> None:
        stage = str(info["stage"])
        if info.get("already"):
            print(f"{stage}: already there", file=sys.stderr)
            return
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            bars[stage] = ProgressBar(stage, total or 0, unit=unit)
        numbers = {key: value for key, value in info.items() if isinstance(value, int) and value}
        facts = (counted(value, key.removesuffix("s").replace("_", " ")) for key, value in numbers.items())
        bars[stage].update(done, ", ".join(facts))
        for example in info.get("broken_examples", ()) if stage == "complete" else ():
            print(f"broken line left out: {example}", file=sys.stderr)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
