"""The table that `loopmem eval` prints."""

from collections.abc import Mapping
from typing import Any

from loopmem_pretrain.tools.tables import table

HEADINGS = ["loops", "perplexity", "+-", "bits/byte", "+-"]


def describe(evaluation: Mapping[str, Any]) -> str:
    """What `eval/evaluate.py:evaluate` returned, for a reader: a table a domain, one row a number of loops."""
    model, context, stride = evaluation["model"], evaluation["context"], evaluation["stride"]
    step = "" if model["step"] is None else f"step {model['step']:,}, "
    lines = [
        f"{model['path']}: {step}{model['dtype']}, sha256 {model['sha256'][:12]}...",
        f"whole documents in windows of {context:,} tokens that overlap by {context - stride:,}; "
        "+- is one standard error, by document",
    ]
    for domain in evaluation["domains"]:
        sizes = f"{domain['documents']:,} documents, {domain['tokens']:,} tokens, {domain['bytes']:,} bytes"
        lines += ["", f"{domain['name']}: {sizes}", *table([HEADINGS, *map(_row, domain["scores"])])]
    return "\n".join(lines)


def _row(score: Mapping[str, Any]) -> list[str]:
    loops = "no loops" if score["num_loops"] is None else str(score["num_loops"])
    loops += " (extrapolation)" if score["extrapolation"] else " (memory gates closed)" if score["gates_closed"] else ""
    cells = [loops]
    for name in ("perplexity", "bits_per_byte"):
        error = score[f"{name}_standard_error"]
        cells += [f"{score[name]:,.4f}", "-" if error is None else f"{error:.2g}"]
    return cells
