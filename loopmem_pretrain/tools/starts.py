"""The starts of a run, by starts.jsonl: when and from where each trained, with what code, and how it ended."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.metrics_file import STARTS_NAME, read_lines


class Start(NamedTuple):
    """What is on record of one."""

    begin: Mapping[str, Any]
    """`step` it began behind, and what environment.json said then."""
    end: Mapping[str, Any] | None
    """`step`, `time` and `status`; None of one that trains, was killed, or was ended by the watchdog."""

    @property
    def hours(self) -> float | None:
        """From the start of the process to its end; None without an end."""
        if self.end is None:
            return None
        began, ended = (datetime.fromisoformat(time) for time in (self.begin["started"], self.end["time"]))
        return (ended - began).total_seconds() / 3600


def read_starts(run_dir: Path) -> list[Start]:
    """All of them, oldest first; none of a run that was trained before they were recorded."""
    starts: list[Start] = []
    for line in read_lines(run_dir / STARTS_NAME):
        if line.get("event") == "begin":
            starts.append(Start(line, None))
        elif starts:
            starts[-1] = starts[-1]._replace(end=line)
    return starts


HEADINGS = ("Began", "From step", "To step", "Hours", "Ranks", "Code", "Ended")


def row(start: Start) -> tuple[str, ...]:
    """Cells under HEADINGS."""
    begin, end, hours = start.begin, start.end, start.hours
    return (
        str(begin["started"])[:16].replace("T", " "),
        f"{begin['step']:,}",
        f"{end['step']:,}" if end else "-",
        f"{hours:,.2f}" if hours is not None else "-",
        str(begin["world_size"]),
        str(begin["git_commit"] or begin["loopmem_pretrain"])[:10],
        str(end["status"]) if end else "no end on record",
    )


def summary(starts: Sequence[Start]) -> list[tuple[str, str]]:
    """How many, and the time that they took; nothing where none is on record."""
    if not starts:
        return []
    took = [(hours, start.begin["world_size"]) for start in starts if (hours := start.hours) is not None]
    number = f"{len(starts):,}"
    if without := len(starts) - len(took):
        number += f", {without:,} of them without an end on record: training, killed or hung"
    rows = [("Starts", number)]
    if took:
        hours, of_ranks = sum(hours for hours, _ in took), sum(hours * ranks for hours, ranks in took)
        rows.append(("Time of the starts that ended", f"{hours:,.2f} h, {of_ranks:,.2f} h of all ranks"))
    return rows
