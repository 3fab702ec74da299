"""Reading metrics.jsonl with its scars, and figures of what it holds."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loopmem_pretrain.errors import DataError
from loopmem_pretrain.metrics_file import load_metrics, read_metrics
from loopmem_pretrain.tools.figures import layer_series, series
from loopmem_pretrain.tools.plot import PLOTS, render, save_plots

MakeRun = Callable[..., Path]
LOOPS = {"expected_loops", "expected_loops_end", "halting", "loops_against_loss"}
MEMORY = {"local_gate", "global_gate", "gates_end"}


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------


def test_a_whole_run_is_read(make_run: MakeRun) -> None:
    metrics = load_metrics(make_run() / "metrics.jsonl")
    assert [record["step"] for record in metrics.records] == list(range(10, 4001, 10))
    assert metrics.unreadable == 1
    assert metrics.superseded == 9  # 2510 ... 2590
    assert max(record["loss"] for record in metrics.records) < 20  # nothing of the abandoned steps


def test_a_step_trained_again_replaces_the_earlier_line(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "m", {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "mfu": 0.1}, {"step": 2, "loss": 3.0}
    )
    assert load_metrics(path) == ([{"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}], 0, 1)


def test_going_back_drops_every_later_step(tmp_path: Path) -> None:
    path = _write(tmp_path / "m", *({"step": s, "loss": 1.0} for s in (10, 20, 30)), {"step": 15, "loss": 2.0})
    assert [r["step"] for r in read_metrics(path)] == [10, 15]


def test_a_validation_line_joins_its_training_line(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "m", {"step": 10, "tokens": 5, "loss": 3.0}, {"step": 10, "tokens": 5, "validation_loss": 3.5}
    )
    assert load_metrics(path) == ([{"step": 10, "tokens": 5, "loss": 3.0, "validation_loss": 3.5}], 0, 0)


def test_a_torn_last_line_is_counted(tmp_path: Path) -> None:
    assert load_metrics(_write(tmp_path / "m", {"step": 1, "loss": 2.0}, '{"step": 2, "lo'))[1:] == (1, 0)


def test_a_line_written_onto_a_torn_one_is_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "m", {"step": 1, "loss": 2.0}, '{"st{"step": 2}\n', {"step": 3, "loss": 1.0})
    metrics = load_metrics(path)
    assert [r["step"] for r in metrics.records] == [1, 3]
    assert metrics.unreadable == 1


def test_a_line_torn_within_a_character_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "note": "\xc3')
    assert load_metrics(path).unreadable == 1


@pytest.mark.parametrize("line", ["[1]\n", '{"loss": 1}\n', '{"step": "7"}\n', '{"step": true}\n', "7\n"])
def test_a_line_without_a_step_is_counted(tmp_path: Path, line: str) -> None:
    assert load_metrics(_write(tmp_path / "m", {"step": 1}, line)).unreadable == 1


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        save_plots(tmp_path, tmp_path / "out")


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable line \(0 unreadable\)"):
        read_metrics(_write(tmp_path / "m"))


def test_only_broken_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable line \(2 unreadable\)"):
        read_metrics(_write(tmp_path / "m", "x\n", "y\n"))


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path)


# ---- figures ---------------------------------------------------------------------------------------------------


def test_every_figure_is_written_twice(whole_run: Path, tmp_path: Path) -> None:
    paths = save_plots(whole_run, tmp_path / "plots")
    assert {path.name for path in paths} == {f"{plot.name}.{suffix}" for plot in PLOTS for suffix in ("svg", "png")}
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert path.stat().st_size < 300_000
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("looped", "memory", "missing"), [(False, False, LOOPS | MEMORY), (True, False, MEMORY)], ids=["plain", "no memory"]
)
def test_what_a_model_does_not_have_is_not_drawn(
    make_run: MakeRun, looped: bool, memory: bool, missing: set[str]
) -> None:
    records = read_metrics(make_run(looped=looped, memory=memory) / "metrics.jsonl")
    drawn = {plot.name for plot in PLOTS if plot.draw(records) is not None}
    assert drawn == {plot.name for plot in PLOTS} - missing


def test_equal_records_give_equal_bytes(make_run: MakeRun) -> None:
    records = read_metrics(make_run() / "metrics.jsonl")
    assert render(PLOTS[0], records, "svg") == render(PLOTS[0], records, "svg")


def test_one_record_is_enough(tmp_path: Path) -> None:
    record = {"step": 1, "tokens": 8, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, "mfu": 0.1}
    layered = {"expected_loops": [1.0], "halting_probs": [[1.0]], "local_gate": [0.1], "global_gate": [0.2]}
    _write(tmp_path / "metrics.jsonl", record | layered | {"validation_loss": 3.1})
    assert save_plots(tmp_path, tmp_path / "out")


def test_a_record_without_measurements_draws_nothing() -> None:
    assert [plot.name for plot in PLOTS if plot.draw([{"step": 1, "tokens": 8}]) is not None] == []


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": float("nan") if s == 15 else 3.0} for s in range(30)]
    _write(tmp_path / "metrics.jsonl", *lines)
    assert save_plots(tmp_path, tmp_path / "out")


def test_a_run_that_diverged_shows_its_last_finite_values(make_run: MakeRun) -> None:
    """Every number of the last lines is null, as JsonlLogger writes what is not finite."""

    def nothing(value: object) -> object:
        return list(map(nothing, value)) if isinstance(value, list) else None

    records = read_metrics(make_run() / "metrics.jsonl")
    end = {key: value if key in ("step", "tokens") else nothing(value) for key, value in records[-1].items()}
    records += [end | {"step": 4010}, end | {"step": 4020}]
    for plot in PLOTS:
        assert render(plot, records, "svg"), plot.name
        assert render(plot, records[-1:], "svg") is None, plot.name
    figure = next(plot for plot in PLOTS if plot.name == "gates_end").draw(records)
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "mean gate at step 4,000"


def test_series_take_only_what_was_measured() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1}]
    steps, values = series(records, "loss")
    np.testing.assert_array_equal(steps, [1, 4])
    np.testing.assert_array_equal(values, [2.0, 1.0])


def test_tokens_stand_on_the_marks_of_the_steps(make_run: MakeRun) -> None:
    figure = PLOTS[0].draw(read_metrics(make_run() / "metrics.jsonl"))
    assert figure is not None
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (top,) = axes.child_axes
    shown = {label.get_text() for label in top.get_xticklabels()}
    assert list(top.get_xticks()) == list(axes.get_xticks())
    assert "288 M" in shown  # at step 800 of 88 samples of 4,096 tokens


def test_layers_that_change_in_number(tmp_path: Path) -> None:
    records = [{"step": 1, "expected_loops": [1.0]}, {"step": 2, "expected_loops": [1.0, 2.0]}]
    with pytest.raises(DataError, match="expected_loops changes its size: 1 at step 1, 2 at step 2"):
        layer_series(records, "expected_loops")


def test_the_last_values_are_shown_at_the_end(make_run: MakeRun) -> None:
    records = read_metrics(make_run() / "metrics.jsonl")
    figure = next(plot for plot in PLOTS if plot.name == "expected_loops_end").draw(records)
    assert figure is not None
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, records[-1]["expected_loops"])
