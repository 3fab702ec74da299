"""Per-layer loop statistics, summed on the device and read by the host once per log interval."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model.loopmem import LoopStats

ROWS = ("lambdas", "halting_probs", "cosine", "local_gate", "global_gate")


class LoopAccumulator:
    """Sums of each layer's statistics over micro-batches since the last read; visits that are not finite are left out.

    One row a layer: [5 rows x N], cost, weight * cost, number of visits.
    """

    def __init__(self, model: ModelConfig, layers: int, device: torch.device) -> None:
        self.model = model
        self.sums = torch.zeros(layers, len(ROWS) * max(1, model.max_loops) + 3, device=device)

    def add(self, layer: int, stats: LoopStats, cost: Tensor, weight: float) -> None:
        """Add one visit of layer `layer` of the model; no host synchronisation.

        `weight` is that of the ponder cost in this step.
        """
        absent = torch.zeros_like(stats.lambdas)
        cost = cost.detach().reshape(1)
        visit = torch.cat(
            [
                stats.lambdas,
                stats.halting_probs.detach().mean(dim=(0, 1)),
                stats.cosine,
                absent if stats.local_gate is None else stats.local_gate,
                absent if stats.global_gate is None else stats.global_gate,
                cost,
                cost * weight,
                torch.ones_like(cost),
            ]
        )
        self.sums[layer] += torch.where(visit.isfinite().all(), visit, 0.0)

    def read_and_reset(self) -> dict[str, Any]:
        """Means over micro-batches and ranks, on the host: the one read of an interval. A collective.

        NaN where no visit of a layer was finite.
        """
        if not self.model.max_loops:
            return {}
        sums = self.sums.clone()
        self.sums.zero_()
        if dist.is_initialized():
            dist.all_reduce(sums)  # ranks without a layer add zeros
        means = sums[:, :-1] / sums[:, -1:]
        ponder = means[:, -2:].mean(dim=0).tolist()
        rows = means[:, :-2].reshape(-1, len(ROWS), self.model.max_loops)
        return {"ponder_cost": ponder[0], "ponder_loss": ponder[1], **describe_means(rows, self.model)}


def describe_means(means: Tensor, model: ModelConfig) -> dict[str, list[Any]]:
    """[layers, 5, N] means -> the per-layer keys of metrics.jsonl."""
    table = {row: means[:, index].tolist() for index, row in enumerate(ROWS)}
    loops = torch.arange(1, means.shape[-1] + 1, device=means.device)
    gates = {
        f"{bank}_gate": means[:, ROWS.index(f"{bank}_gate")].mean(-1).tolist()
        for bank, slots in (("local", model.local_slots), ("global", model.global_slots))
        if slots
    }
    return {
        "expected_loops": (means[:, ROWS.index("halting_probs")] * loops).sum(-1).tolist(),
        "lambdas": table["lambdas"],
        "halting_probs": table["halting_probs"],
        "cosine": table["cosine"],
        **gates,
    }
