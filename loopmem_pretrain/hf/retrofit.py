"""A dense checkpoint of transformers as a looped memory model that computes the same function at the start.

What is new in each layer starts where it changes nothing:

    step scales   zeta_1 = softplus(s_1) = 1, in float32 exactly; s_n of later loops -7, as in a new model
    router        w = 0, b = 10: lambda = 1 - 4.5e-5 in every loop
    memory        P = 0: what is read is multiplied by zero; keys, values, gates and norms as in a new model

So y = (1 - e) h_1 + e h_2 + ... with e = 4.5e-5, and h_2 = h_1 + zeta_2 (branches), zeta_2 = 9.1e-4: the output is
h_1 to within e zeta_2 = 4e-8 of a branch, which float32 rounds away. From b = 16.64 on, lambda is 1 to the last bit,
but then its gradient, lambda (1 - lambda), and that of all later loops are zero, and stay so: it would never loop.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConversionError
from loopmem_pretrain.model.init import initialize

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of model_type in config.json: one causal block structure, with or without biases and norms of q and k."""

NEW = re.compile(r"\.(step_scales|halting|memory)(\.|$)")
"""Parameters that a dense checkpoint does not have."""

HALTING_BIAS = 10.0
FIRST_STEP_SCALE = math.log(math.e - 1)
"""Raw s_1 with softplus(s_1) = 1."""


def _open_first_loop(step_scales: Tensor) -> None:
    step_scales[0] = FIRST_STEP_SCALE


# First match wins; what no rule names keeps the initial weights of a new model.
STARTS: list[tuple[str, Callable[[Tensor], object]]] = [
    (r"step_scales$", _open_first_loop),
    (r"halting\.weight$", lambda t: t.zero_()),
    (r"halting\.bias$", lambda t: t.fill_(HALTING_BIAS)),
    (r"memory\.(local|global)_proj\.weight$", lambda t: t.zero_()),
]


@torch.no_grad()
def new_weights(model: ModelConfig, shapes: Mapping[str, Iterable[int]], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(public name, float32 tensor) of the parameters that a dense checkpoint lacks, at their start."""
    for name, shape in shapes.items():
        value = torch.empty(*shape, dtype=torch.float32)
        initialize([(name, value)], model, seed)
        start = next((start for pattern, start in STARTS if re.search(pattern, name)), None)
        if start is not None:
            start(value)
        yield name, value


def dense_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that the config.json of a dense model decides.

    Args:
        values: content of config.json, whose model_type is one of FAMILIES.
        where: the file, for messages.

    Raises:
        ConversionError: the model computes something that this package cannot; every reason is named.
    """
    family = values["model_type"]
    try:
        config: Any = CONFIG_MAPPING[family](**{key: value for key, value in values.items() if key != "model_type"})
    except Exception as error:  # each version of transformers checks in its own way
        raise ConversionError(
            f"{where}: transformers does not take it for a {family} model: {error}", "copy the folder again"
        ) from error
    reasons = _reasons(config, values)
    if reasons:
        raise ConversionError(
            f"{where}: this {family} model cannot be matched exactly:\n    " + "\n    ".join(reasons),
            "take another model; only what computes the same function at the start is taken over",
        )
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    bias = "all" if getattr(config, "attention_bias", False) else "none"
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": None if head_dim * heads == width else head_dim,
        "qk_norm": "before_rope" if family == "qwen3" else "none",
        "attention_bias": "qkv" if family == "qwen2" else bias,
        "rope_theta": float(config.rope_parameters["rope_theta"]),
        "rms_norm_eps": float(config.rms_norm_eps),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }


def _reasons(config: Any, values: Mapping[str, Any]) -> list[str]:
    """Why the model cannot be matched; `values` is config.json, `config` what transformers makes of it."""
    rope = config.rope_parameters or {}
    kind, partial = rope.get("rope_type"), rope.get("partial_rotary_factor")
    windows = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if config.model_type == "mistral" and config.sliding_window is not None:
        windows = {f"sliding_window {config.sliding_window}"}
    quantization = values.get("quantization_config")
    rules = [
        (kind != "default", f"rope_parameters: rope_type {kind!r}; valid: 'default', positions that are not rescaled"),
        (partial not in (None, 1), f"partial_rotary_factor: {partial}; valid: 1, heads that are rotated whole"),
        (bool(windows), f"attention is cut to {', '.join(sorted(windows))}; valid: attention to all earlier tokens"),
        (config.hidden_act != "silu", f"hidden_act: {config.hidden_act!r}; valid: 'silu'"),
        (getattr(config, "mlp_bias", False), "mlp_bias: true; valid: a feed-forward without biases"),
        (quantization is not None, f"quantization_config: {quantization}; valid: weights that are not quantized"),
    ]
    return [reason for applies, reason in rules if applies]
