"""The drawings behind plot.py: each function takes the records of a run and returns a figure, or None when the run did
not measure what it shows (a plain model has no loops).

Colours are of middling brightness, so that they read on white and, in the report, on black.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from loopmem_pretrain.errors import DataError
from loopmem_pretrain.metrics_file import Record

Array = NDArray[np.float64]
Draw = Callable[[list[Record]], Figure | None]

INK, FAINT = "#222426", "#d4d6d8"  # text and axes; grid. The report gives both the page's colours.
BLUE, ORANGE, GREEN, VIOLET = "#3b82c4", "#e0752d", "#3f9d6b", "#9a6bd0"
DEPTH = LinearSegmentedColormap.from_list("depth", ["#3f78e0", "#b45fb0", "#f0862e"])  # first layer to last

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
SIZE = (5.0, 3.3)  # inches: small, so that text stays readable when a phone shrinks the figure
POINTS = 240  # a line is averaged down to at most so many points


def series(records: Sequence[Record], key: str) -> tuple[Array, Array]:
    """Steps and values of one scalar key, where it was measured and is finite."""
    found = [(record["step"], record[key]) for record in records if _is_finite(record.get(key))]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def layer_series(records: Sequence[Record], key: str) -> tuple[Array, Array]:
    """Steps [R] and values [R, L] (or [R, L, N]) of one per-layer key, where it was measured and all of it is finite.

    Raises:
        DataError: records disagree about the number of layers or loops.
    """
    found = [record for record in records if record.get(key) and _is_finite(record[key])]
    shapes = {np.shape(record[key]): record["step"] for record in found}
    if len(shapes) > 1:
        said = ", ".join(f"{'x'.join(map(str, shape))} at step {step}" for shape, step in shapes.items())
        raise DataError(
            f"metrics.jsonl: {key} changes its size: {said}",
            "the file mixes two models; keep each run in a folder of its own",
        )
    steps = np.array([record["step"] for record in found], dtype=np.float64)
    return steps, np.array([record[key] for record in found], dtype=np.float64)


def _is_finite(value: Any) -> bool:
    """Whether a number, or each one of nested lists, is finite: metrics.jsonl has null where a run diverged."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return isinstance(value, int | float) and math.isfinite(value)


def training_loss(records: Sequence[Record]) -> tuple[str, str]:
    """Key and name of what compares with `validation_loss`: cross-entropy where logged, else the whole loss.

    The whole loss has the weighted ponder cost in it.
    """
    logged = any("cross_entropy" in record for record in records)
    return ("cross_entropy", "cross-entropy") if logged else ("loss", "loss")


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, 1, sharex=True)).tolist()
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return figure, axes


def _short(value: float) -> str:
    """1500 -> 1.5 k, 2e9 -> 2 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """Means over groups of as many records each (the last may be smaller), at most POINTS of them."""
    starts = np.arange(0, len(steps), -(-len(steps) // POINTS))
    sizes = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _running_mean(steps: Array, values: Array) -> tuple[Array, Array]:
    """Centred mean over 2 % of the values (fewer at the ends), at no more than POINTS places."""
    half = max(1, len(values) // 100)
    places = np.unique(np.linspace(0, len(values) - 1, min(POINTS, len(values))).astype(int))
    return steps[places], np.array([values[max(0, i - half) : i + half + 1].mean() for i in places])


def draw_loss(records: list[Record]) -> Figure | None:
    """Training and validation loss over steps, with a second axis in tokens."""
    key, name = training_loss(records)
    steps, loss = series(records, key)
    validated, validation = series(records, "validation_loss")
    if not len(steps) and not len(validated):
        return None
    figure, (axes,) = _figure()
    if len(steps):
        axes.plot(steps, loss, color=BLUE, alpha=0.35, linewidth=0.8)
        axes.plot(*_running_mean(steps, loss), color=BLUE, label="training (running mean)")
    if len(validated):
        axes.plot(validated, validation, color=ORANGE, marker="o", markersize=3, linewidth=0.8, label="validation")
    axes.set_ylabel(f"{name} (nats a token)")
    _cut_off_start(axes, np.concatenate([steps, validated]), np.concatenate([loss, validation]))
    _token_axis(axes, records)
    axes.legend(loc="upper right")
    return figure


def _cut_off_start(axes: Axes, steps: Array, values: Array) -> None:
    """Frame the values after the first 3 % of the steps: those before would flatten everything else."""
    later = values[steps >= steps.min() + 0.03 * np.ptp(steps)]
    if len(later) > 20:
        margin = 0.06 * np.ptp(later) + 1e-3
        axes.set_ylim(later.min() - margin, later.max() + margin)


def _token_axis(axes: Axes, records: list[Record]) -> None:
    """The tokens at each mark of the x-axis, on top, where a step always took the same number of them."""
    steps, tokens = series(records, "tokens")
    per_step = tokens[steps > 0] / steps[steps > 0]
    if len(per_step) and np.allclose(per_step, per_step[0], rtol=1e-6):
        rate = per_step[0]
        top = axes.secondary_xaxis("top")  # in steps as the other one, so that its marks stand on the grid
        top.set_xlabel("tokens")
        top.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        top.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step * rate)))


def draw_layers(key: str, label: str) -> Draw:
    """A line a layer over steps, coloured by depth, for a per-layer key [L]."""

    def draw(records: list[Record]) -> Figure | None:
        steps, values = layer_series(records, key)
        if not len(steps):
            return None
        figure, (axes,) = _figure()
        layers = values.shape[1]
        for layer, color in enumerate(DEPTH(np.linspace(0, 1, layers))):
            axes.plot(*_thin(steps, values[:, layer]), color=color, linewidth=1.2)
        axes.set_ylabel(label)
        depth = ScalarMappable(Normalize(0, max(1, layers - 1)), DEPTH)
        bar = figure.colorbar(depth, ax=axes, label="layer", ticks=MaxNLocator(6, integer=True), pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure

    return draw


def draw_loops_at_end(records: list[Record]) -> Figure | None:
    """A bar a layer: the last finite expected loops."""
    steps, values = layer_series(records, "expected_loops")
    if not len(steps):
        return None
    figure, (axes,) = _figure()
    _bars(axes, {"": values[-1]}, list(DEPTH(np.linspace(0, 1, values.shape[1]))))
    _, halting = layer_series(records, "halting_probs")
    if len(halting):
        axes.axhline(halting.shape[2], color=INK, linewidth=0.8, linestyle="--")
        axes.set_ylim(0, halting.shape[2] * 1.12)
        axes.text(0, halting.shape[2] * 1.02, f"max_loops {halting.shape[2]}", fontsize=8)
    axes.set_ylabel(f"expected loops at step {steps[-1]:,.0f}")
    return figure


def draw_gates_at_end(records: list[Record]) -> Figure | None:
    """Bars a layer: the last finite mean gates of both banks."""
    found = {bank: layer_series(records, f"{bank}_gate") for bank in ("local", "global")}
    last = {bank: values[-1] for bank, (_, values) in found.items() if len(values)}
    if not last:
        return None
    end = max(steps[-1] for steps, _ in found.values() if len(steps))
    figure, (axes,) = _figure()
    _bars(axes, last, [GREEN, VIOLET] if len(last) == 2 else [GREEN if "local" in last else VIOLET])
    axes.set_ylabel(f"mean gate at step {end:,.0f}")
    axes.set_ylim(0, max(values.max() for values in last.values()) * 1.25 + 1e-3)
    axes.legend(loc="upper left", ncols=2)
    return figure


def _bars(axes: Axes, groups: dict[str, Array], colors: list[Any]) -> None:
    """Bars over layers; one group takes a colour a layer, or several groups one colour each."""
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        at = np.arange(len(values)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, values, width, color=colors[number] if name else colors, label=name or None)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="x", visible=False)


def draw_halting(records: list[Record]) -> Figure | None:
    """A stacked bar a layer: the last finite halting probabilities of its loops."""
    steps, values = layer_series(records, "halting_probs")
    if not len(steps) or values.shape[2] < 2:
        return None
    figure, (axes,) = _figure()
    last = values[-1]
    below = np.zeros(len(last))
    for loop, color in enumerate(DEPTH(np.linspace(0, 1, last.shape[1]))):
        axes.bar(np.arange(len(last)), last[:, loop], 0.8, below, color=color, label=f"loop {loop + 1}")
        below += last[:, loop]
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.set_ylabel(f"halting mass at step {steps[-1]:,.0f}")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8)
    return figure


def draw_loops_against_loss(records: list[Record]) -> Figure | None:
    """Mean expected loops at every validation, against its loss."""
    validated, validation = series(records, "validation_loss")
    steps, loops = layer_series(records, "expected_loops")
    before = np.searchsorted(steps, validated, side="right") - 1  # the newest statistics at that validation
    keep = before >= 0
    if keep.sum() < 2:
        return None
    figure, (axes,) = _figure()
    mean = loops.mean(axis=1)[before[keep]]
    axes.plot(validation[keep], mean, color=INK, alpha=0.3, linewidth=0.8)
    dots = axes.scatter(validation[keep], mean, c=validated[keep], cmap=DEPTH, s=18, zorder=3)
    axes.invert_xaxis()
    axes.set_xlabel("validation cross-entropy (nats a token; training goes right)")
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_ylabel("expected loops, mean over layers")
    bar = figure.colorbar(dots, ax=axes, label="step", format=FuncFormatter(lambda value, _: _short(value)), pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def draw_pair(first: tuple[str, str, str], second: tuple[str, str, str]) -> Draw:
    """Two scalars one above the other; each is (key, label, colour)."""

    def draw(records: list[Record]) -> Figure | None:
        measured = [line for line in (first, second) if len(series(records, line[0])[0])]
        if not measured:
            return None
        figure, rows = _figure(len(measured))
        for axes, (key, label, color) in zip(rows, measured, strict=True):
            steps, values = series(records, key)
            axes.plot(steps, values, color=color, linewidth=1.0)
            axes.set_ylabel(label)
            top = values[np.isfinite(values)].max(initial=0.0)
            axes.set_ylim(0, 1.06 * top or None)  # a constant is no line on the frame
            if key == "mfu":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            else:
                axes.yaxis.set_major_formatter(
                    FuncFormatter(lambda value, _: _short(value) if value >= 1 else f"{value:.2g}")
                )
        return figure

    return draw
