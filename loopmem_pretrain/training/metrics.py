"""Per-layer loop statistics, summed on the device and read by the host once per log interval."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model.loopmem import LoopStats

ROWS = ("lambdas", "halting_probs", "cosine", "local_gate", "global_gate")


class LoopAccumulator:
    """Sums of each layer's statistics, [layers, 5 rows, N], over micro-batches since the last read."""

    def __init__(self, model: ModelConfig, layers: int, device: torch.device, ranks_per_layer: int = 1) -> None:
        self.model = model
        self.ranks_per_layer = ranks_per_layer
        """Ranks that see each layer: all those of its pipeline stage."""
        self.sums = torch.zeros(layers, len(ROWS), max(1, model.max_loops), device=device)
        self.ponder = torch.zeros(2, device=device)
        """Sums of cost and of weight * cost, each a mean over layers"""
        self.count = 0

    def add(self, layer: int, stats: LoopStats, cost: Tensor, weight: float, first: bool) -> None:
        """Add one visit of layer `layer` of the model, `first` on this rank; no host synchronisation.

        `weight` is that of the ponder cost in this step.
        """
        absent = torch.zeros_like(stats.lambdas)
        rows = [
            stats.lambdas,
            stats.halting_probs.detach().mean(dim=(0, 1)),
            stats.cosine,
            absent if stats.local_gate is None else stats.local_gate,
            absent if stats.global_gate is None else stats.global_gate,
        ]
        self.sums[layer] += torch.stack(rows)
        share = cost.detach() / self.model.num_hidden_layers
        self.ponder[0] += share
        self.ponder[1] += share * weight
        self.count += first

    def read_and_reset(self) -> dict[str, Any]:
        """Means over micro-batches and ranks, on the host: the one read of an interval. A collective."""
        if not self.model.max_loops or not self.count:
            return {}
        means = torch.cat([self.sums.flatten(), self.ponder]) / self.count
        if dist.is_initialized():
            dist.all_reduce(means)  # other stages add zeros
            means /= self.ranks_per_layer
        rows, ponder = means[:-2].view_as(self.sums), means[-2:].tolist()
        self.sums.zero_()
        self.ponder.zero_()
        self.count = 0
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
