"""Parameter groups by role, and schedules against torch's own."""

import itertools
import math

import pytest
import torch

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.training.optim import beta1, learning_rate, parameter_groups, ponder_weight, role_of
from tests.configs import TINY_MODEL

NAMES = dict(LoopMemLM(ModelConfig(**TINY_MODEL), TorchBackend()).named_parameters())


def decayed(**config):
    groups = parameter_groups(NAMES.items(), OptimizerConfig(lr=1.0, **config))
    chosen = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(NAMES)
    return {name for name, parameter in NAMES.items() if id(parameter) in chosen}


def test_standard_decays_matrices_only():
    names = decayed()
    assert {role_of(name) for name in names} == {"matrix", "router", "embedding"}
    assert all(NAMES[name].ndim == 2 or role_of(name) == "router" for name in names)
    assert not any(name.endswith(("norm.weight", "norm.bias", "step_scales", "_keys", "_values")) for name in names)
    assert "model.layers.0.memory.local_gate.bias" not in names


def test_banks_are_decayed_by_a_field():
    extra = decayed(decay_memory_banks=True) - decayed()
    assert {name.rsplit(".", 1)[-1] for name in extra} == {"local_keys", "local_values", "global_keys", "global_values"}


def test_paper_decays_all_but_the_embedding():
    assert set(NAMES) - decayed(weight_decay_rule="paper") == {"model.embed_tokens.weight"}


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="mystery"):
        role_of("model.mystery")


def test_groups_hold_one_dtype():
    mixed = [("model.layers.0.step_scales", torch.nn.Parameter(torch.zeros(3))),
             ("model.norm.weight", torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))]  # fmt: skip
    groups = parameter_groups(mixed, OptimizerConfig(lr=1.0))
    assert [len({p.dtype for p in group["params"]}) for group in groups] == [1, 1]


def test_one_cycle_is_torchs():
    """Two phases, cosine, with beta1 cycled against the rate: torch's OneCycleLR, over a whole run."""
    steps, warmup = 200, 20
    optimizer = OptimizerConfig(lr=2e-3, beta1=0.95)
    schedule = ScheduleConfig(type="one_cycle", warmup_steps=warmup, min_lr=2e-4, beta1_min=0.85)
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.95, 0.95))
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        adam, max_lr=2e-3, total_steps=steps, pct_start=warmup / steps, div_factor=10, final_div_factor=1,
        base_momentum=0.85, max_momentum=0.95,
    )  # fmt: skip
    for step in range(steps):
        assert learning_rate(step, optimizer, schedule, steps) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        assert beta1(step, optimizer, schedule, steps) == pytest.approx(adam.param_groups[0]["betas"][0], rel=1e-12)
        adam.step()
        torchs.step() if step < steps - 1 else None


def test_the_papers_recipe():
    optimizer = OptimizerConfig(lr=2.912e-3, beta1=0.95)
    schedule = ScheduleConfig(type="one_cycle", warmup_steps=386, min_lr=2.912e-4, beta1_min=0.85)
    rate = [learning_rate(step, optimizer, schedule, 38620) for step in range(38620)]
    assert (rate[0], max(rate), rate[-1]) == pytest.approx((2.912e-4, 2.912e-3, 2.912e-4))
    assert rate.index(max(rate)) == 385
    assert beta1(385, optimizer, schedule, 38620) == pytest.approx(0.85)


def test_beta1_is_constant_unless_cycled():
    schedule = ScheduleConfig(type="one_cycle", warmup_steps=5, min_lr=0.0)
    assert {beta1(step, OptimizerConfig(lr=1.0, beta1=0.9), schedule, 50) for step in range(50)} == {0.9}


def test_cosine():
    optimizer, schedule = OptimizerConfig(lr=1.0), ScheduleConfig(type="cosine", warmup_steps=10, min_lr=0.1)
    rate = [learning_rate(step, optimizer, schedule, 110) for step in range(110)]
    assert rate[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate[59] == pytest.approx(0.55)
    assert rate[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rate[9:]))


def test_wsd():
    optimizer = OptimizerConfig(lr=1.0)
    schedule = ScheduleConfig(type="wsd", warmup_steps=10, min_lr=0.1, decay_steps=20)
    rate = [learning_rate(step, optimizer, schedule, 100) for step in range(100)]
    assert set(rate[10:80]) == {1.0}
    assert rate[89] == pytest.approx(0.55)
    assert rate[-1] == pytest.approx(0.1)


def test_ponder_schedules():
    def weights(kind, steps=20, weight=0.3):
        training = TrainingConfig(
            train_steps=steps, global_batch_size=1, micro_batch_size=1, ponder_schedule=kind, ponder_period=10
        )
        return [ponder_weight(step, weight, training) for step in range(steps)]

    assert weights("constant") == [0.3] * 20
    assert weights("linear")[10] == pytest.approx(0.15)
    cyclic = weights("cyclic")
    assert cyclic[0] == 0.3 and cyclic[10] == pytest.approx(0.3)
    assert cyclic[5] == pytest.approx(-0.3 * 0.6)
    assert cyclic[1] == pytest.approx(0.3 * math.cos(2 * math.pi / 10))
