"""Reading metrics.jsonl: one JSON object a line, written while training, possibly by several runs of one folder.

    step, tokens                          always
    loss, cross_entropy, lr, grad_norm, tokens_per_second, mfu, validation_loss, ...      where measured
    expected_loops, local_gate, global_gate                             per layer, [L]
    halting_probs, lambdas, step_scales, zeta, cosine                   per layer and loop, [L][N]

A crash may tear a line; a resume trains the steps after its checkpoint again. What a reader wants is the history of
the model that exists now, so a line that goes back in steps takes the place of everything from its step on.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.errors import DataError

Record = dict[str, Any]
"""A line, by the keys above."""
METRICS_NAME = "metrics.jsonl"
FAULTS_NAME = "faults.jsonl"
STARTS_NAME = "starts.jsonl"


class Metrics(NamedTuple):
    """The history of a run and what was left out of it."""

    records: list[Record]
    """One record a step, steps ascending."""
    unreadable: int
    """Lines that are no JSON object with a step: torn by a crash."""
    superseded: int
    """Lines of steps that were trained again after a resume."""


def load_metrics(path: str | Path) -> Metrics:
    """Read metrics.jsonl with an account of what was left out.

    Two lines of one step are merged when they hold different keys (a validation beside its training line); when they
    hold the same ones the step was trained again and the later line replaces the earlier.

    Raises:
        DataError: the file is missing, unreadable or holds no usable line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", "give the folder of a run that has begun to train") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    records: list[Record] = []
    unreadable = superseded = 0
    for line in text.splitlines():
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            unreadable += 1
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
            superseded += 1
        if records and records[-1]["step"] == record["step"]:
            earlier = records.pop()
            if (earlier.keys() & record.keys()) - {"step", "tokens"}:
                superseded += 1
            else:
                record = earlier | record
        records.append(record)
    if not records:
        raise DataError(
            f"{path} holds no usable line ({unreadable} unreadable)", "wait until training has logged its first steps"
        )
    return Metrics(records, unreadable, superseded)


def read_metrics(path: str | Path) -> list[Record]:
    """The records of `load_metrics`: one a step, ascending.

    Raises:
        DataError: the file is missing, unreadable or holds no usable line.
    """
    return load_metrics(path).records


def read_lines(path: str | Path, last: int = 0) -> list[Record]:
    """The usable ones of all lines, or of the `last` so many, as they were written: steps that were trained again occur
    twice. None where there is no file yet."""
    try:
        lines = Path(path).read_bytes().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines[-last:] if (record := _parse(line)) is not None]


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None  # counted by the caller, and shown
    usable = isinstance(record, dict) and isinstance(record.get("step"), int) and not isinstance(record["step"], bool)
    return record if usable else None
