"""Initial weights: a table from parameter role to distribution, and seeds that do not depend on the layout.

Every parameter is drawn from its own generator, seeded by (run seed, public parameter name), in blocks of rows where it
is large. The same weights come out on one rank, on many, in any cut, and when a layer is added at the end.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

STD = 0.02
STEP_SCALE = -7.0
"""Raw s_n: zeta = softplus(-7) = 9.1147e-4."""

Initializer = Callable[[Tensor, Any, torch.Generator], object]


def _normal(tensor: Tensor, config: Any, generator: torch.Generator) -> None:
    tensor.normal_(0.0, STD, generator=generator)


def _branch_end(tensor: Tensor, config: Any, generator: torch.Generator) -> None:
    tensor.normal_(0.0, STD / math.sqrt(2 * config.num_hidden_layers), generator=generator)


def _router(tensor: Tensor, config: Any, generator: torch.Generator) -> None:
    """nn.Linear's default for D + 1 inputs, so lambda starts near 0.5."""
    bound = 1 / math.sqrt(config.hidden_size + 1)
    tensor.uniform_(-bound, bound, generator=generator)


# First match wins (the paper: linear, embedding, head and banks N(0, 0.02^2); branch ends N(0, (0.02 / sqrt(2L))^2)).
INITIALIZERS: list[tuple[str, Initializer]] = [
    (r"(self_attn\.o_proj|mlp\.down_proj)\.weight$", _branch_end),
    (r"(self_attn\.(q|k|v)_proj|mlp\.(gate|up)_proj)\.weight$", _normal),
    (r"(embed_tokens|lm_head)\.weight$", _normal),
    (r"(local|global)_(keys|subkeys|values)$", _normal),
    (r"memory\.(local|global)_proj\.weight$", lambda t, c, g: torch.nn.init.xavier_uniform_(t, generator=g)),
    (r"memory\.(local|global)_gate\.weight$", lambda t, c, g: t.zero_()),
    (r"memory\.(local|global)_gate\.bias$", lambda t, c, g: t.fill_(c.gate_init_bias)),
    (r"halting\.(weight|bias)$", _router),
    (r"step_scales$", lambda t, c, g: t.fill_(STEP_SCALE)),
    (r"norm\.weight$", lambda t, c, g: t.fill_(1.0)),
    (r"(norm|self_attn\.(q|k|v|o)_proj)\.bias$", lambda t, c, g: t.zero_()),
]


BLOCK_ROWS = 65536  # drawn at a time: a rank draws the blocks it holds a part of, never the whole of a huge bank


@torch.no_grad()
def initialize(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: Any,
    seed: int,
    part_of: Callable[[str, Tensor], tuple[int, int, int] | None] = lambda name, parameter: None,
) -> None:
    """Fill parameters in place; names are the public ones.

    `part_of` tells which part of a parameter the given tensor is: (dimension, index of its first entry in the whole,
    size of the whole) along one dimension; None: all of it. What reaches beyond the whole is padding, zero.

    Raises:
        ValueError: a parameter whose name no rule knows (a new parameter needs a new rule, not luck).
    """
    for name, parameter in named_parameters:
        initializer = next((init for pattern, init in INITIALIZERS if re.search(pattern, name)), None)
        if initializer is None:
            raise ValueError(f"no initialisation rule for parameter {name}; add one to INITIALIZERS")
        dimension, first, whole = part_of(name, parameter) or (0, 0, parameter.shape[0])
        shape = [whole if d == dimension else size for d, size in enumerate(parameter.shape)]
        own = range(first, min(first + parameter.shape[dimension], whole))
        parameter.zero_()
        for block, start in enumerate(range(0, shape[0], BLOCK_ROWS)):
            rows = range(start, min(start + BLOCK_ROWS, shape[0]))
            mine = range(max(rows.start, own.start), min(rows.stop, own.stop)) if dimension == 0 else rows
            if not mine:
                continue
            value = torch.empty(len(rows), *shape[1:], dtype=torch.float32)
            initializer(value, config, torch.Generator().manual_seed(_seed_of(name, block, seed)))
            if dimension == 0:
                parameter[mine.start - first : mine.stop - first] = value[mine.start - start : mine.stop - start]
            else:
                parameter[rows.start : rows.stop] = value.narrow(dimension, own.start, len(own))


def _seed_of(name: str, block: int, seed: int) -> int:
    suffix = f":{block}" if block else ""
    digest = hashlib.sha256(f"{seed}:{name}{suffix}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
