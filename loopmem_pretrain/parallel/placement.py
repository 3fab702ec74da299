"""Where every parameter lies on tensor-parallel ranks: one table, by public name.

It decides how initial weights are cut, which gradients ranks must add up, what DeepSpeed counts in the gradient norm,
how checkpoints are merged, and what `loopmem estimate` counts. A parameter that no rule names is whole on every rank.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loopmem_pretrain.config.parallel import ParallelConfig


class Placement(NamedTuple):
    """How one parameter lies on the tensor-parallel ranks."""

    cut: int | None
    """Dimension that is cut over the ranks; None: whole on each."""
    partial: bool
    """Whole, but each rank sees only a part of its gradient: the parts are added up."""
    padded: bool = False
    """The cut dimension is first padded with zeros to a multiple of the ranks (the vocabulary)."""


Rule = Callable[[ParallelConfig], Placement]


def _cut(dimension: int, padded: bool = False) -> Rule:
    return lambda parallel: Placement(dimension, partial=False, padded=padded)


def _bank(parallel: ParallelConfig) -> Placement:
    """Sharded over slots; or whole, and read by each rank for its own tokens."""
    if parallel.memory_placement == "sharded":
        return Placement(0, partial=False)
    return Placement(None, partial=parallel.sequence_parallel)


def _whole(partial_when: Callable[[ParallelConfig], bool]) -> Rule:
    return lambda parallel: Placement(None, partial=partial_when(parallel))


RULES: list[tuple[str, Rule]] = [
    (r"(embed_tokens|lm_head)\.weight$", _cut(0, padded=True)),
    (r"self_attn\.(q|k|v)_proj\.(weight|bias)$", _cut(0)),
    (r"mlp\.(gate|up)_proj\.weight$", _cut(0)),
    (r"(self_attn\.o_proj|mlp\.down_proj)\.weight$", _cut(1)),
    (r"memory\.(local|global)_(keys|values)$", _bank),
    # One weight for all heads, of which each rank has some.
    (r"self_attn\.(q|k)_norm\.weight$", _whole(lambda parallel: True)),
    # Applied to the keys: each rank has some of the slots, or reads them for some of the tokens.
    (
        r"memory\.(key_norm\.(weight|bias)|global_subkeys)$",
        _whole(lambda parallel: parallel.memory_placement == "sharded" or parallel.sequence_parallel),
    ),
    # All else works token by token on the residual stream: norms, router, step scales, gates, projections.
    (r"", _whole(lambda parallel: parallel.sequence_parallel)),
]


def placement(public_name: str, parallel: ParallelConfig) -> Placement:
    """Where the parameter lies; the first rule that matches counts."""
    if parallel.tensor_model_parallel_size == 1:
        return Placement(None, partial=False)
    return next(rule(parallel) for pattern, rule in RULES if re.search(pattern, public_name))


def padded_size(size: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `size`."""
    return math.ceil(size / parts) * parts


class Part(NamedTuple):
    """One rank's part of a parameter."""

    dimension: int
    first: int
    """Where the part begins in the whole parameter, along `dimension`."""
    whole: int
    """Size of the whole parameter along `dimension`, without padding."""


def part_of(
    public_name: str, local_shape: Sequence[int], parallel: ParallelConfig, tensor_rank: int, vocab_size: int
) -> Part | None:
    """Which part of the parameter rank `tensor_rank` holds, its own shape being `local_shape`; None: all of it."""
    where = placement(public_name, parallel)
    if where.cut is None:
        return None
    size = local_shape[where.cut]
    whole = size * parallel.tensor_model_parallel_size
    return Part(where.cut, size * tensor_rank, min(whole, vocab_size) if where.padded else whole)


def whole_shape(public_name: str, local_shape: Sequence[int], parallel: ParallelConfig, vocab_size: int) -> list[int]:
    """The parameter's shape on one rank without tensor parallelism."""
    part = part_of(public_name, local_shape, parallel, 0, vocab_size)
    return [part.whole if part and d == part.dimension else size for d, size in enumerate(local_shape)]
