"""Initial weights: statistics of every role, and independence of layout."""

import math

import pytest
import torch

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model import init
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.configs import TINY_MODEL

MODEL = {**TINY_MODEL, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "local_slots": 64}


def parameters(seed=7, **changes):
    config = ModelConfig(**{**MODEL, **changes})
    model = LoopMemLM(config, TorchBackend())
    initialize(model.named_parameters(), config, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 0.02),
        ("model.layers.0.self_attn.q_proj.weight", 0.02),
        ("model.layers.1.mlp.gate_proj.weight", 0.02),
        ("model.layers.0.memory.local_keys", 0.02),
        ("model.layers.0.self_attn.o_proj.weight", 0.02 / math.sqrt(4)),
        ("model.layers.1.mlp.down_proj.weight", 0.02 / math.sqrt(4)),
        ("model.layers.0.memory.local_proj.weight", math.sqrt(2 / 256)),  # Xavier uniform of a square matrix
    ],
)
def test_standard_deviation(name, std):
    value = parameters()[name]
    # The deviation of n draws from a normal is known to about 1/sqrt(2n); five of those is no accident.
    assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * value.numel())
    assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel())


def test_constants():
    values = parameters(gate_init_bias=-3.0)
    assert torch.all(values["model.layers.0.step_scales"] == -7)
    assert torch.nn.functional.softplus(values["model.layers.0.step_scales"])[0].item() == pytest.approx(
        9.1147e-4, rel=1e-4
    )
    assert torch.all(values["model.layers.0.memory.local_gate.weight"] == 0)
    assert torch.all(values["model.layers.0.memory.global_gate.bias"] == -3)
    for norm in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "model.memory.key_norm.weight"):
        assert torch.all(values[norm] == 1)
    assert torch.all(values["model.layers.1.memory.norm.bias"] == 0)


def test_biases_of_attention_start_at_zero():
    values = parameters(attention_bias="all")
    assert all(torch.all(values[f"model.layers.1.self_attn.{part}_proj.bias"] == 0) for part in "qkvo")


def test_router_is_linear_default():
    values, bound = parameters(), 1 / math.sqrt(129)
    weight = values["model.layers.0.halting.weight"]
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound
    assert values["model.layers.0.halting.bias"].abs() <= bound
    many = torch.empty(1000, 129)  # so many that the largest is next to the bound, for D + 1 inputs and not for D
    initialize([("model.layers.0.halting.weight", many)], ModelConfig(**MODEL), 0)
    assert 0.999 * bound < many.abs().max() <= bound


def test_xavier_bound():
    weight = parameters()["model.layers.0.memory.global_proj.weight"]
    assert 0.99 * math.sqrt(6 / 256) < weight.abs().max() <= math.sqrt(6 / 256)


def test_weights_do_not_depend_on_depth_or_order():
    two, three = parameters(), parameters(num_hidden_layers=3)
    same = [name for name in two if not name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert all(torch.equal(two[name], three[name]) for name in same)
    assert not torch.equal(two["model.layers.0.self_attn.q_proj.weight"], two["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(("dimension", "size", "ranks"), [(0, 7, 4), (1, 3, 2)])
def test_parts_of_a_large_weight_make_up_the_whole(dimension, size, ranks, monkeypatch):
    """It is drawn in blocks of rows, here of 8: parts begin and end within blocks, the last of them in padding."""
    monkeypatch.setattr(init, "BLOCK_ROWS", 8)
    config, name, rows, columns = ModelConfig(**MODEL), "model.embed_tokens.weight", 27, 6
    whole = torch.empty(rows, columns)
    initialize([(name, whole)], config, 0)
    assert not torch.equal(whole[:8], whole[8:16])
    parts = [torch.full((size, columns) if dimension == 0 else (rows, size), math.nan) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        where = (dimension, rank * size, whole.shape[dimension])
        initialize([(name, part)], config, 0, lambda name, parameter, where=where: where)
    joined = torch.cat(parts, dim=dimension)
    assert torch.equal(joined[:rows, :columns], whole)
    assert not joined[rows:].any()


def test_seed_matters_and_repeats():
    assert torch.equal(parameters(seed=3)["lm_head.weight"], parameters(seed=3)["lm_head.weight"])
    assert not torch.equal(parameters(seed=3)["lm_head.weight"], parameters(seed=4)["lm_head.weight"])


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="mystery"):
        initialize([("model.mystery", torch.empty(3))], ModelConfig(**MODEL), 0)


def test_cross_entropy_at_the_start():
    """About ln V: 10.95 to 10.98 at the paper's vocabulary of 50,304 and width 768."""
    config = ModelConfig(**{**MODEL, "vocab_size": 50304, "hidden_size": 768, "num_attention_heads": 12,
                            "num_key_value_heads": 12, "num_hidden_layers": 1, "local_slots": 0, "global_slots": 0,
                            "intermediate_size": 256})  # fmt: skip
    model = LoopMemLM(config, TorchBackend())
    initialize(model.named_parameters(), config, 42)
    tokens = torch.randint(0, 50304, (1, 257), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 10.93 < model(tokens[:, :-1], labels=tokens[:, 1:]).cross_entropy.item() < 11.02
