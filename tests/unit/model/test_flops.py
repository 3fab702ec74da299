"""Parameter and FLOP formulas against the published counts and against torch's own counters."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import (
    forward_flops_at,
    forward_flops_per_token,
    parameter_counts,
    training_flops_per_token,
)
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.configs import TINY_MODEL
from tests.paper_models import PAPER

CONFIGS = Path(__file__).parents[3] / "configs"

VARIANTS = [
    {},
    {"gate": "scalar"},
    {"gate": "constant"},
    {"local_slots": 0},
    {"global_slots": 0},
    {"local_slots": 0, "global_slots": 0},
    {"global_slots": 256, "retrieval": "topk", "retrieval_topk": 16},
    {"global_slots": 256, "retrieval": "product_keys", "retrieval_topk": 16},
    {"num_key_value_heads": 4},
    {"head_dim": 24},
    {"qk_norm": "before_rope", "attention_bias": "all"},
    {"qk_norm": "none", "attention_bias": "qkv", "head_dim": 4},
    {"tie_word_embeddings": True},
    {"max_loops": 1, "ponder_weight": 0.0},
    {"max_loops": 0, "residual_scale": "one", "local_slots": 0, "global_slots": 0, "ponder_weight": 0.0},
]


def paper_model(name: str) -> ModelConfig:
    return load_config(RunConfig, CONFIGS / "paper" / f"{name}.yaml").model


@pytest.mark.parametrize("name", PAPER)
def test_paper_counts(name):
    model = paper_model(name)
    assert parameter_counts(model).total == PAPER[name]
    with torch.device("meta"):
        built = LoopMemLM(model, TorchBackend())
    assert sum(parameter.numel() for parameter in built.parameters()) == PAPER[name]


def test_every_paper_config_is_counted():
    assert {path.stem for path in (CONFIGS / "paper").glob("*.yaml")} == {*PAPER, "recipe"}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameter_formula(changes):
    model = ModelConfig(**{**TINY_MODEL, **changes})
    built = LoopMemLM(model, TorchBackend())
    assert parameter_counts(model).total == sum(parameter.numel() for parameter in built.parameters())


def explicit_attention(q, k, v, attn_mask, is_causal, enable_gqa):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def explicit_bag(slots, values, per_sample_weights, mode):
    """The same sums as a matrix product, which torch's counter sees."""
    return (per_sample_weights.unsqueeze(1) @ values[slots]).squeeze(1)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_flops_against_torch(changes, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "local_slots": 24, "global_slots": 16}
    model = ModelConfig(**{**TINY_MODEL, **sizes, **changes})
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", explicit_attention)
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", explicit_bag)
    built = LoopMemLM(model, TorchBackend())
    tokens = torch.randint(0, 96, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(tokens)
    ours = forward_flops_per_token(model, 32, causal=False, tokens=64).total * tokens.numel()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        built(tokens, labels=tokens).loss.backward()
    # Backward is twice forward, but for gradients nobody needs: those of the input embedding's input.
    ours = training_flops_per_token(model, 32, samples=2, causal=False) * tokens.numel()
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_causal_correction_by_hand():
    """A causal token sees T/2 keys: 4 * D * T/2 fewer FLOPs a block than at full T."""
    model = paper_model("m_minus_3")
    full = forward_flops_per_token(model, 4096, causal=False).total
    causal = forward_flops_per_token(model, 4096).total
    assert full - causal == 12 * 3 * 4 * 768 * 2048


def test_a_million_slots_by_hand():
    """S = 2^20, k = 32, D = 768: a search scores all slots, product keys 2 x 1,024 halves."""
    sizes = {"max_loops": 1, "num_hidden_layers": 1, "global_slots": 2**20, "hidden_size": 768, "ponder_weight": 0.0}
    gate = 2 * 768 * 768
    topk, product = (
        forward_flops_per_token(ModelConfig(**{**TINY_MODEL, **sizes, "retrieval": kind}), 4096)
        for kind in ("topk", "product_keys")
    )
    assert topk.slot_search == 2 * 2**20 * 768
    assert topk.global_reads - gate == 4 * 32 * 768
    assert product.slot_search == 0
    assert product.global_reads - gate == 2 * 1024 * 768 + 2 * 32 * 768


def test_known_rate_of_the_authors():
    """69 k tokens/s were 239 TFLOP/s; 1.4 % of that is how far the rounded token rate can be off.

    The authors' code applies P to what every token reads in every loop, ours to the slots: 7 % fewer FLOPs.
    """
    model = paper_model("m_minus_3")
    assert 3 * forward_flops_per_token(model, 4096).total * 69e3 == pytest.approx(239e12, rel=0.014)
    assert training_flops_per_token(model, 4096, samples=4) * 69e3 == pytest.approx(239e12 * 0.93, rel=0.014)


def test_block_by_hand():
    """At D = 768, T = 4096: 14.2 M linear and 6.3 M attention FLOPs a block, 9.4 M for both banks."""
    model = paper_model("m_minus_3")
    flops = forward_flops_per_token(model, 4096)
    assert flops.blocks / 36 == pytest.approx(14.2e6 + 6.3e6, rel=0.01)
    reads = flops.local_reads + flops.global_reads + flops.projections
    assert reads / 36 == pytest.approx(9.4e6, rel=0.01)
    assert flops.projections == 12 * 3 * 2 * 2 * 768**2


def test_projections_by_hand():
    """Four samples of 4096 tokens in three loops read 1,024 and 512 slots: P is applied to 1,536 rows a layer."""
    tokens = 4 * 4096
    flops = forward_flops_per_token(paper_model("m_minus_3"), 4096, tokens=tokens)
    assert flops.projections == pytest.approx(12 * 1536 * 2 * 768**2 / tokens, abs=1)
    few = forward_flops_per_token(paper_model("m_minus_3"), 4096, tokens=200)  # 600 reads: the global bank only
    assert few.projections == pytest.approx(12 * (600 + 512) * 2 * 768**2 / 200, abs=1)


def test_flops_between_numbers_of_loops():
    model = ModelConfig(**TINY_MODEL)
    one, two, three = (forward_flops_per_token(model, 64, loops).total for loops in (1, 2, 3))
    assert [forward_flops_at(model, 64, loops) for loops in (1, 2, 3)] == [one, two, three]
    assert forward_flops_at(model, 64, 1.5) == pytest.approx((one + two) / 2, abs=1)
