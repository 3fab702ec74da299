"""Initial weights: a table from parameter role to distribution, and seeds that do not depend on the layout.

Every parameter is drawn from its own generator, seeded by (run seed, public parameter name). The same weights come
out on one rank, on many, in any pipeline cut, and when a layer is added at the end.
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


# First match wins; METHOD: linear, embedding, head and banks N(0, 0.02^2); branch ends N(0, (0.02 / sqrt(2L))^2).
INITIALIZERS: list[tuple[str, Initializer]] = [
    (r"(self_attn\.o_proj|mlp\.down_proj)\.weight$", _branch_end),
    (r"(self_attn\.(q|k|v)_proj|mlp\.(gate|up)_proj)\.weight$", _normal),
    (r"(embed_tokens|lm_head)\.weight$", _normal),
    (r"(local|global)_(keys|values)$", _normal),
    (r"memory\.(local|global)_proj\.weight$", lambda t, c, g: torch.nn.init.xavier_uniform_(t, generator=g)),
    (r"memory\.(local|global)_gate\.weight$", lambda t, c, g: t.zero_()),
    (r"memory\.(local|global)_gate\.bias$", lambda t, c, g: t.fill_(c.gate_init_bias)),
    (r"halting\.(weight|bias)$", _router),
    (r"step_scales$", lambda t, c, g: t.fill_(STEP_SCALE)),
    (r"norm\.weight$", lambda t, c, g: t.fill_(1.0)),
    (r"norm\.bias$", lambda t, c, g: t.zero_()),
]


@torch.no_grad()
def initialize(named_parameters: Iterable[tuple[str, Tensor]], config: Any, seed: int) -> None:
    """Fill parameters in place; names are the public ones.

    Raises:
        ValueError: a parameter whose name no rule knows (a new parameter needs a new rule, not luck).
    """
    for name, parameter in named_parameters:
        initializer = next((init for pattern, init in INITIALIZERS if re.search(pattern, name)), None)
        if initializer is None:
            raise ValueError(f"no initialisation rule for parameter {name}; add one to INITIALIZERS")
        value = torch.empty(parameter.shape, dtype=torch.float32)
        initializer(value, config, torch.Generator().manual_seed(_seed_of(name, seed)))
        parameter.copy_(value)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
