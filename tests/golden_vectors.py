"""Reads tests/golden/*.safetensors: float64 inputs, parameters, outputs and gradients of five small models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).with_name("golden")
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


class Golden(NamedTuple):
    spec: dict
    token_ids: Tensor
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    outputs: dict[str, Tensor]


def load_golden(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        spec = json.loads(file.metadata()["spec"])

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return Golden(spec, tensors["input/token_ids"], part("param/"), part("grad/"), part("output/"))


def as_config(spec: dict) -> SimpleNamespace:
    """A config object with the defaults beyond the golden specs."""
    defaults = {"gate": "vector", "gate_init_bias": -3.0, "retrieval": "dense"}
    attention = {"qk_norm": "after_rope", "attention_bias": "none"}
    width = spec["hidden_size"] // spec["num_attention_heads"]
    return SimpleNamespace(**{**defaults, **attention, "head_width": width, **spec})
