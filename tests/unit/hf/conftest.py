"""A small tokenizer, models with every variant, and weights that are no initial weights."""

import pytest
import torch

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.prepare import TrainTokenizerConfig
from loopmem_pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n\nIt was  spring.",
    "If 12 apples cost 36 cents, one apple costs 36 / 12 = 3 cents; </s> is only text here.",
    "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor quer \u00fcber den gro\u00dfen Sylter Deich \U0001f98a.",
]
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VARIANTS = {
    "full": {"max_loops": 3, "local_slots": 8, "global_slots": 4, "ponder_weight": 0.01},
    "tied": {"max_loops": 2, "global_slots": 4, "tie_word_embeddings": True},
    "loop": {"max_loops": 3},
    "scalar": {"max_loops": 2, "local_slots": 8, "gate": "scalar"},
    "constant": {"max_loops": 1, "local_slots": 8, "gate": "constant", "gate_init_bias": 0.5},
    "topk": {"max_loops": 2, "local_slots": 8, "global_slots": 24, "retrieval": "topk", "retrieval_topk": 5},
    "product_keys": {"max_loops": 2, "global_slots": 36, "retrieval": "product_keys", "retrieval_topk": 4},
    "qwen": {"max_loops": 2, "head_dim": 12, "qk_norm": "before_rope", "attention_bias": "qkv", "rms_norm_eps": 1e-6},
    "llama": {"max_loops": 2, "local_slots": 4, "qk_norm": "none", "attention_bias": "all", "rope_theta": 1e4},
    "plain": {"max_loops": 0, "residual_scale": "inverse_depth"},
}


def model_config(variant: str) -> ModelConfig:
    return ModelConfig(**SIZES, **VARIANTS[variant])


def native_model(config: ModelConfig) -> LoopMemLM:
    """Initial weights, moved far enough that loops, gates and banks all matter."""
    model = LoopMemLM(config, TorchBackend())
    initialize(model.named_parameters(), config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 2.0 if name.endswith("step_scales") else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("step_scales"):
                parameter.add_(7.0)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TrainTokenizerConfig(vocab_size=400)
    return train_sentencepiece((f"{text} {number}" for number in range(30) for text in TEXTS), folder, config)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)
