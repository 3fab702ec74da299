"""The collectives of tensor and sequence parallelism as autograd functions.

A tensor is either whole on every rank of the group, or a sum whose parts the ranks hold, or cut over tokens (dimension
1 of [B, T, D]). Forward and backward of each function are each other's transpose:

    copy            whole -> whole           backward: all-reduce of the parts
    sum_parts       parts -> whole           backward: the whole, as it is
    gather_tokens   cut -> whole             backward: parts -> cut (reduce-scatter)
    scatter_tokens  parts -> cut             backward: cut -> whole (all-gather)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any

# torch 2.13 has new names for these two and warns of the old ones, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def copy(x: Tensor, group: Group) -> Tensor:
    """`x`, whole on every rank, of whose gradient each rank sees a part."""
    return _Copy.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def sum_parts(x: Tensor, group: Group) -> Tensor:
    """Parts of a sum, of any shape -> the sum."""
    return _SumParts.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """[B, T / ranks, D] -> [B, T, D]."""
    return _GatherTokens.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """[B, T, D] parts of a sum -> this rank's tokens of the sum, [B, T / ranks, D]."""
    return _ScatterTokens.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def all_reduced(x: Tensor, group: Group) -> Tensor:
    """The sum over the group, in a tensor of its own: a reduction in place would change what others still read."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gather_parts(x: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks, [ranks, ...]; no gradient."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=group)
    return parts.view(ranks, *x.shape)


def _gathered(x: Tensor, group: Group) -> Tensor:
    parts = gather_parts(x, group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scattered(x: Tensor, group: Group) -> Tensor:
    parts = torch.cat(x.chunk(dist.get_world_size(group), dim=1))  # [ranks * B, T / ranks, D]
    own = parts.new_empty(x.shape[0], *parts.shape[1:])
    _reduce_scatter(own, parts, group=group)
    return own


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduced(gradient, ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.group), None
