"""Figures of a run, from metrics.jsonl: what the loss, the loops, the gates and the machine did."""

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib

from loopmem_pretrain.data.files import require_folder, write_file
from loopmem_pretrain.metrics_file import METRICS_NAME, Record, read_metrics
from loopmem_pretrain.tools.figures import (
    BLUE,
    GREEN,
    ORANGE,
    STYLE,
    VIOLET,
    Draw,
    draw_gates_at_end,
    draw_halting,
    draw_layers,
    draw_loops_against_loss,
    draw_loops_at_end,
    draw_loss,
    draw_pair,
)


class Plot(NamedTuple):
    """One figure."""

    name: str
    """File name without suffix."""
    group: str
    """Section of the report."""
    title: str
    """Heading."""
    look_for: str
    """What a reader should look for."""
    draw: Draw
    """Draws it from the records of a run; None when they do not hold what it shows."""


def save_plots(run_dir: str | Path, out_dir: str | Path) -> list[Path]:
    """Write every figure the run has data for as NAME.svg and NAME.png.

    Raises:
        ConfigError: no such folder.
        DataError: the run has no usable metrics.jsonl.
        EnvironmentFault: the folder cannot be written.
    """
    require_folder(run_dir, "give the folder of a run that has begun to train")
    records = read_metrics(Path(run_dir) / METRICS_NAME)
    written = []
    for plot in PLOTS:
        for suffix in ("svg", "png"):
            content = render(plot, records, suffix, title=plot.title)
            if content is not None:
                written.append(Path(out_dir) / f"{plot.name}.{suffix}")
                write_file(written[-1], content)
    return written


def render(plot: Plot, records: list[Record], suffix: str, title: str = "") -> bytes | None:
    """One figure as the bytes of an `svg` or `png`, or None when the run did not measure it.

    Equal records give equal bytes.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.name}):
        figure = plot.draw(records)
        if figure is None:
            return None
        if title:
            figure.suptitle(title, fontsize=11)
        buffer = BytesIO()
        no_date = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
        figure.savefig(buffer, format=suffix, dpi=200, metadata=no_date, facecolor="none" if not title else "white")
        return buffer.getvalue()


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "Training and validation loss",
        "Both should fall together; validation rising while training falls is overfitting, a spike that does not come "
        "back is trouble. The first, steep steps may be cut off.",
        draw_loss,
    ),
    Plot(
        "expected_loops",
        "Loops",
        "Expected loops of each layer over training",
        "Lines should part from each other: all stuck at 1 means halting collapsed, all at the top that nothing halts. "
        "They tell how outputs mix the loops, not what is computed: in training all loops run.",
        draw_layers("expected_loops", "expected loops E"),
    ),
    Plot(
        "expected_loops_end",
        "Loops",
        "Expected loops at the end",
        "Early layers usually loop less than late ones.",
        draw_loops_at_end,
    ),
    Plot(
        "halting",
        "Loops",
        "Where each layer stops at the end",
        "The share of each layer's output that comes from each loop; one colour alone means the others are not used.",
        draw_halting,
    ),
    Plot(
        "loops_against_loss",
        "Loops",
        "Expected loops against validation loss",
        "In the paper loops are used more once the loss has fallen below about 3.3 nats, whatever the largest number.",
        draw_loops_against_loss,
    ),
    Plot(
        "local_gate",
        "Memory",
        "Mean gate of the local memory over training",
        "It begins at sigmoid(gate_init_bias) and should leave that value; a line at 0 is a bank nobody reads.",
        draw_layers("local_gate", "mean local gate"),
    ),
    Plot(
        "global_gate",
        "Memory",
        "Mean gate of the global memory over training",
        "As above, for the bank that all layers share.",
        draw_layers("global_gate", "mean global gate"),
    ),
    Plot(
        "gates_end",
        "Memory",
        "Memory gates at the end",
        "Which layers read which bank; the paper ends near .42 local and .30 global.",
        draw_gates_at_end,
    ),
    Plot(
        "throughput",
        "Machine and optimizer",
        "Throughput and utilisation",
        "Level lines; a slow sag or steps point at the machine, not at the model. MFU counts no recomputation.",
        draw_pair(("tokens_per_second", "tokens/s", BLUE), ("mfu", "MFU", GREEN)),
    ),
    Plot(
        "optimizer",
        "Machine and optimizer",
        "Learning rate and gradient norm",
        "The norm should settle after warm-up; peaks here come just before spikes of the loss.",
        draw_pair(("lr", "learning rate", VIOLET), ("grad_norm", "gradient norm", ORANGE)),
    ),
)
