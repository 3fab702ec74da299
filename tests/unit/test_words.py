"""Numbers in messages and on plain progress lines."""

import io
import logging

import pytest

from loopmem_pretrain.progress import LinesBesideBars, ProgressBar, stage_bars
from loopmem_pretrain.words import counted


def test_one_is_singular():
    assert [counted(n, "rank") for n in (0, 1, 2048)] == ["0 ranks", "1 rank", "2,048 ranks"]


@pytest.mark.parametrize(
    ("total", "unit", "lines"),
    [
        (2500, "B", ["eval: 0.9/2.5 kB", "eval: 2.5/2.5 kB"]),
        (25_000_000, "B", ["eval: 0.0/25.0 MB", "eval: 25.0/25.0 MB"]),
        (1000, "step", ["eval: 900/1,000 steps", "eval: 1,000/1,000 steps"]),
    ],
)
def test_a_plain_line_shows_small_sizes_too(capsys, total, unit, lines):
    bar = ProgressBar("eval", total, unit=unit)
    bar.update(900)
    bar.update(total)
    bar.close()
    assert capsys.readouterr().err.splitlines() == lines


def test_the_end_is_said_once(capsys):
    """Compressed text is longer than its file: the end is reached long before the work is done."""
    bar = ProgressBar("eval", 1000)
    for _ in range(5):
        bar.update(1000)
    assert capsys.readouterr().err.count("1,000/1,000") == 1


def test_a_line_that_must_be_seen_is(capsys):
    """Such as one with a validation loss, a moment after another line."""
    bar = ProgressBar("train", 1000)
    for step in range(1, 6):
        bar.update(step, always=step == 3)
    assert capsys.readouterr().err.splitlines() == ["train: 1/1,000 steps", "train: 3/1,000 steps"]


def test_facts_of_a_stage(capsys):
    with stage_bars() as progress:
        progress(5, 5, {"stage": "tokenize", "documents": 1, "tokens": 7, "shards": 1, "broken_lines": 2})
    assert capsys.readouterr().err == "tokenize: 0.0/0.0 kB  1 document, 7 tokens, 1 shard, 2 broken lines\n"


def test_a_log_line_does_not_run_on_from_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    bar = ProgressBar("train", 1000)
    bar.update(10, "loss 5.0")
    record = logging.LogRecord("loopmem", logging.WARNING, "", 0, "a gate does not open", None, None)
    LinesBesideBars(terminal).emit(record)
    before, after = terminal.getvalue().split("a gate does not open\n")
    assert before.endswith(" \r")  # the bar was painted over
    assert after.startswith("\rtrain:")
    bar.close()
