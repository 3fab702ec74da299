"""The seams at which a model is cut over devices, and the backend of one device.

`Backend` makes the layers that are cut and holds every collective of a forward pass; no process group is named in the
math. `TorchBackend` is one device: tests, benchmarks, inference, exported models. The other one,
`parallel/megatron.py:MegatronBackend`, cuts over tensor-parallel ranks.

T' is the number of tokens in the part of the residual stream that this rank holds: T, or T / ranks where sequence
parallelism cuts it. Imports torch only: the exported Hugging Face model inlines this file as text.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where that is wider: what halting, zeta and the mixture are computed in."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within the block a product has the dtype of its operands, also where the caller runs under torch.autocast."""
    kind = device.type
    # `meta` has no autocast; torch.amp.is_autocast_available, which would tell, is not compiled by torch 2.11.
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


class SlotRead(NamedTuple):
    """A read of one bank before its softmax, over the candidate slots that this rank holds."""

    scores: Tensor
    """q k / sqrt(D), [B, T, C]; -inf where a candidate does not count, on some ranks perhaps all of a token's"""
    mix: Callable[[Tensor], Tensor]
    """weights [B, T, C] -> weighted sum of the candidates' values [B, T, D]"""


class Backend(Protocol):
    """The seams at which a model is cut over devices."""

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """A linear layer whose outputs, and bias, may be cut over ranks; takes what `enter` returned."""

    def row_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """A linear layer that takes a cut input and returns [B, T', D]; its bias is whole on each rank."""

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Token embedding, [B, T] -> [B, T', D]; its `weight` may be cut over the vocabulary."""

    def lm_head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        """[B, T', D] -> logits [B, T, V], or this rank's part of V; its `weight` is laid out as the embedding's."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """What the head does, with the given weight: a tied head takes the embedding's."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy in nats, in float32 or wider; `logits` as the head returned them."""

    def enter(self, x: Tensor) -> Tensor:
        """[B, T', D] -> [B, T, D], whole on every rank, for column-linear layers; gradients of all ranks are summed."""

    def enter_read(self, query: Tensor) -> Tensor:
        """The same for queries, where ranks hold different slots; the query itself where each holds all of them."""

    def project_slots(self, linear: nn.Module, values: Tensor) -> Tensor:
        """linear(values) of this rank's slots; its weight's gradient is what it would be if applied to tokens."""

    def softmax_reads(self, reads: Sequence[SlotRead]) -> list[Tensor]:
        """m = softmax(scores) V of each read, over the candidates of all ranks: [B, T', D] each.

        A rank's own candidates may all be -inf: only the maximum of all ranks may be subtracted.
        """

    def top_candidates(self, scores: Tensor, k: int) -> Tensor:
        """Which of this rank's candidates [B, T, C] are among the k best of all ranks': bool [B, T, C].

        `scores` come without gradient; they are this rank's C best, C = min(k, slots it holds), and all of them finite.
        """

    def slot_range(self, slots: int) -> range:
        """The slots of a bank of `slots` slots that this rank holds."""

    def local_heads(self, heads: int) -> int:
        """How many of the heads this rank holds."""

    def whole_length(self, tokens: int) -> int:
        """T, given T'."""


class TorchBackend:
    """One device."""

    def column_linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        return nn.Linear(in_features, out_features, bias)

    row_linear = column_linear

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return nn.Embedding(vocab_size, hidden_size)

    def lm_head(self, hidden_size: int, vocab_size: int) -> nn.Module:
        return nn.Linear(hidden_size, vocab_size, bias=False)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).to(wide(logits.dtype)), labels.flatten())

    def enter(self, x: Tensor) -> Tensor:
        return x

    def enter_read(self, query: Tensor) -> Tensor:
        return query

    def project_slots(self, linear: nn.Module, values: Tensor) -> Tensor:
        projected: Tensor = linear(values)
        return projected

    def softmax_reads(self, reads: Sequence[SlotRead]) -> list[Tensor]:
        return [read.mix(read.scores.softmax(dim=-1)) for read in reads]

    def top_candidates(self, scores: Tensor, k: int) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)  # the only rank's k candidates are the k best

    def slot_range(self, slots: int) -> range:
        return range(slots)

    def local_heads(self, heads: int) -> int:
        return heads

    def whole_length(self, tokens: int) -> int:
        return tokens
