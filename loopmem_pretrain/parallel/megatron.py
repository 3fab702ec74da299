"""The backend of tensor and sequence parallelism, over megatron-core's layers.

Weights are cut as parallel/placement.py says. Attention and feed-forward each begin with `enter` and end with a
row-linear layer, whose collectives are each other's transpose.

    sequence_parallel: false   the residual stream is whole on each rank; enter: nothing, backward all-reduce;
                               row_linear: all-reduce
    sequence_parallel: true    each rank holds T / ranks tokens of it; enter: all-gather, backward reduce-scatter;
                               row_linear: reduce-scatter, backward all-gather

A read of sharded banks is a distributed log-sum-exp: the query enters, the maxima of all banks' scores are all-reduced,
then numerators and denominators of all banks are summed in one collective.

Megatron's own sequence parallelism gathers once for each of q, k and v, and again in the backward pass, and it cuts the
first dimension: the collectives here are those of parallel/collectives.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.model.backend import SlotRead, wide
from loopmem_pretrain.parallel.collectives import copy, gather_parts, gather_tokens, scatter_tokens, sum_parts
from loopmem_pretrain.parallel.placement import padded_size
from loopmem_pretrain.parallel.topology import Topology


class MegatronBackend:
    """This rank's part of a model that `topology.tensor_size` ranks share."""

    def __init__(self, parallel: ParallelConfig, topology: Topology, vocab_size: int) -> None:
        self.group = topology.groups["tensor"]
        self.ranks, self.rank = topology.tensor_size, topology.tensor_rank
        self.sequence_parallel = parallel.sequence_parallel
        self.sharded_banks = parallel.memory_placement == "sharded"
        self.vocab_size = vocab_size
        self.settings: dict[str, Any] = {
            "config": ModelParallelConfig(
                tensor_model_parallel_size=self.ranks,
                use_cpu_initialization=True,  # allocates on the CPU; model/init.py fills, by name
                perform_initialization=False,
            ),
            "init_method": lambda weight: weight,
            "tp_group": self.group,
        }

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return ColumnLinear(in_features, out_features, bias=bias, disable_grad_reduce=True, **self.settings)

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return RowLinear(self, in_features, out_features, bias)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return Embedding(self, vocab_size, hidden_size)

    def lm_head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        return Head(self, hidden_size, vocab_size)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[B, T', D] -> [B, T, padded V / ranks]; columns of the padding are so low that they do not count."""
        logits = F.linear(self.enter(hidden), weight)
        rows = weight.shape[0]
        valid = min(max(self.vocab_size - self.rank * rows, 0), rows)
        if valid < rows:
            logits[..., valid:] = torch.finfo(logits.dtype).min
        return logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, labels).mean()

    def enter(self, x: Tensor) -> Tensor:
        return gather_tokens(x, self.group) if self.sequence_parallel else copy(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Parts [B, T, D] of a sum -> the sum as the residual stream holds it, [B, T', D]."""
        return scatter_tokens(x, self.group) if self.sequence_parallel else sum_parts(x, self.group)

    def enter_read(self, query: Tensor) -> Tensor:
        return self.enter(query) if self.sharded_banks else query

    def project_slots(self, linear: nn.Module, values: Tensor) -> Tensor:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        if self.sharded_banks and not self.sequence_parallel:
            weight = copy(weight, self.group)  # its gradient: the sum over all ranks' slots, as tokens would make it
        return F.linear(values, weight)

    def softmax_reads(self, reads: Sequence[SlotRead]) -> list[Tensor]:
        if not self.sharded_banks:
            return [read.mix(read.scores.softmax(dim=-1)) for read in reads]
        maxima = torch.stack([read.scores.detach().amax(dim=-1) for read in reads])  # [banks, B, T]
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group)
        parts: list[Tensor] = []
        for read, maximum in zip(reads, maxima.unsqueeze(-1), strict=True):
            # Wide, as in torch's softmax: bf16 differences would be rounded, and so would a sum of ranks' bf16 sums.
            precise = wide(read.scores.dtype)
            weights = (read.scores.to(precise) - maximum).exp().to(read.scores.dtype)
            parts += [read.mix(weights).to(precise), weights.sum(dim=-1, keepdim=True, dtype=precise)]
        sums = torch.split(self.leave(torch.cat(parts, dim=-1)), [part.shape[-1] for part in parts], dim=-1)
        return [
            (numerator / denominator).to(read.scores.dtype)
            for read, numerator, denominator in zip(reads, sums[::2], sums[1::2], strict=True)
        ]

    def top_candidates(self, scores: Tensor, k: int) -> Tensor:
        if not self.sharded_banks:
            return torch.ones_like(scores, dtype=torch.bool)
        candidates = gather_parts(scores.detach(), self.group).movedim(0, -2).flatten(-2)  # [B, T, ranks * C]
        best = candidates.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        chosen = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, best, True)
        return chosen[..., self.rank * scores.shape[-1] : (self.rank + 1) * scores.shape[-1]]

    def slot_range(self, slots: int) -> range:
        if not self.sharded_banks:
            return range(slots)
        own = slots // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)

    def local_heads(self, heads: int) -> int:
        return heads // self.ranks

    def whole_length(self, tokens: int) -> int:
        return tokens * self.ranks if self.sequence_parallel else tokens


class _WithoutExtraState(nn.Module):
    """Megatron's layers put an empty `_extra_state` into state dicts, which DeepSpeed's checkpoints trip over."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._load_state_dict_pre_hooks.clear()  # megatron's, which puts it into what is loaded


class ColumnLinear(_WithoutExtraState, ColumnParallelLinear):  # type: ignore[misc]
    """[B, T, D], entered -> [B, T, out / ranks]."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        output: Tensor = super().forward(x)[0]
        return output


class RowLinear(_WithoutExtraState, RowParallelLinear):  # type: ignore[misc]
    """[B, T, in / ranks] -> [B, T', out]; the bias is added once, to the sum of all ranks' parts."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, backend: MegatronBackend, in_features: int, out_features: int, bias: bool) -> None:
        options = {"bias": bias, "input_is_parallel": True, "skip_bias_add": False}
        super().__init__(in_features, out_features, **options, **backend.settings)
        self.leave = backend.leave

    def forward(self, x: Tensor) -> Tensor:
        output = self.leave(F.linear(x, self.weight))
        return output if self.bias is None else output + self.bias


class Embedding(_WithoutExtraState, VocabParallelEmbedding):  # type: ignore[misc]
    """[B, T] -> [B, T', D]; a rank looks up the ids it has rows for, the others are zero in its part of the sum."""

    weight: Tensor
    vocab_start_index: int
    vocab_end_index: int

    def __init__(self, backend: MegatronBackend, vocab_size: int, hidden_size: int) -> None:
        super().__init__(padded_size(vocab_size, backend.ranks), hidden_size, **backend.settings)
        self.leave = backend.leave

    def forward(self, input_ids: Tensor) -> Tensor:
        elsewhere = (input_ids < self.vocab_start_index) | (input_ids >= self.vocab_end_index)
        rows = F.embedding((input_ids - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
        return self.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class Head(_WithoutExtraState, ColumnParallelLinear):  # type: ignore[misc]
    """[B, T', D] -> logits [B, T, padded V / ranks]."""

    weight: Tensor

    def __init__(self, backend: MegatronBackend, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, padded_size(vocab_size, backend.ranks), bias=False, **backend.settings)
        self.backend = backend

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return self.backend.logits(hidden, self.weight)
