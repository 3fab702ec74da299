"""RUN/slurm/starts.jsonl: one line when a start of a run begins and one when it ends, and what follows from them.

A start without a second line was ended from outside: its node died, or SLURM killed it. Standard library only.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["done", "stopped", "paused", "interrupted", "preempted", "lost nodes", "crashed", "failed", "ended"]
"""done: all steps trained; stopped, paused: by the file of that name; interrupted: saved, goes on in the next start;
lost nodes: a node was unfit or did not answer; crashed: may be tried again; failed: not; ended: SLURM ended the job."""

Record = dict[str, Any]


def starts_file(run_dir: Path) -> Path:
    """The records of a run; there from its first submission or start on."""
    return run_dir / "slurm" / "starts.jsonl"


def append(run_dir: Path, record: Record) -> None:
    """Add a line with the time (seconds since the epoch); raises OSError as the disk does."""
    path = starts_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        begin = b"\n" if file.read(1) not in (b"", b"\n") else b""  # behind a line that was cut off
        file.write(begin + json.dumps({"time": round(time.time(), 1), **record}).encode() + b"\n")


def read(run_dir: Path) -> list[Record]:
    """All lines; one that was cut off by a full disk or a power cut is left out."""
    path = starts_file(run_dir)
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or not even UTF-8
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the checkpoint that a start would resume; -1 where there is none."""
    pointer = run_dir / "checkpoints" / "latest"
    name = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def crashes_in_vain(records: list[Record], newest: int) -> int:
    """Starts that crashed since the run last had a new checkpoint, or gave up and was submitted again."""
    return sum(record.get("verdict") == "crashed" and record["checkpoint"] == newest for record in _recent(records))


def starts_in_vain(records: list[Record], newest: int) -> int:
    """Starts, however they ended, that began from the checkpoint that is still the newest."""
    return sum(record["event"] == "start" and record["checkpoint"] == newest for record in _recent(records))


def _recent(records: list[Record]) -> list[Record]:
    """What came after the run last gave up or was stopped by somebody."""
    ends = [index for index, record in enumerate(records) if record.get("verdict") in ("failed", "stopped", "done")]
    return records[ends[-1] + 1 :] if ends else records


def read_json(path: Path) -> Record:
    """A small file that another process replaces; empty where it is not there, or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
