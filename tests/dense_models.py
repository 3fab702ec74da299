"""Small dense models of transformers with random weights, as their authors would publish them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
}
DENSE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "head_dim": 12}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
}


def dense_model(name: str, **changes: Any) -> Any:
    """A model whose norms and biases are no initial ones."""
    config, model, fields = DENSE[name]
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **fields, **changes})).eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def save_dense(folder: Path, name: str, **changes: Any) -> Path:
    dense_model(name, **changes).save_pretrained(folder)
    return folder
