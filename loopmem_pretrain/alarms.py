"""Alarms: values of a line of metrics.jsonl that say that loops or memory are not used.

Training warns of each once (training/hooks.py), the report shows since when each lasts (tools/report.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from loopmem_pretrain.config.run import RunConfig


def alarms(metrics: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, str]]:
    """What one line raises: what is wrong, which is the same on each line, and the value that says so."""
    if metrics["step"] < config.alarms.after_steps:
        return
    if config.model.max_loops > 1:
        for layer, loops in enumerate(metrics.get("expected_loops", [])):
            if loops is not None and loops < config.alarms.min_expected_loops:
                yield f"halting of layer {layer} is stuck at one loop", f"expected loops {loops:.3f}"
    for bank in ("local_gate", "global_gate"):
        for layer, gate in enumerate(metrics.get(bank, [])):
            if gate is not None and gate < config.alarms.min_gate:
                yield f"{bank} of layer {layer} does not open", f"mean {gate:.4f}"
