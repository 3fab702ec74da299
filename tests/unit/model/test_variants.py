"""Every value of a field that chooses a variant is known wherever it counts, and no other value passes for one."""

import math
from typing import get_args

import pytest
import torch

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.training import ScheduleConfig, TrainingConfig
from loopmem_pretrain.hf.configuration_loopmem import _CHOICES
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import forward_flops_per_token, gate_flops, parameter_counts
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.model.memory import RETRIEVALS, make_gate
from loopmem_pretrain.tools.activations import Sizes, loop_bytes, sparse_bytes
from loopmem_pretrain.tools.weights import layer_weights, stage_weights
from loopmem_pretrain.training.optim import PONDER_SCHEDULES, SCHEDULES, learning_rate, ponder_weight, role_of
from tests.configs import tiny_run


def values_of(config, field):
    return get_args(config.model_fields[field].annotation)


VARIANTS = [(field, value) for field in ("gate", "retrieval") for value in values_of(ModelConfig, field)]


def run_of(**fields):
    """A bank that every retrieval can read."""
    if fields.get("retrieval", "dense") != "dense":
        fields["retrieval_topk"] = 3
    return tiny_run(model={"global_slots": 16, **fields})


@pytest.mark.parametrize(("field", "value"), VARIANTS)
def test_every_variant_is_built_and_counted(field, value):
    config = run_of(**{field: value})
    model = config.model
    net = LoopMemLM(model, TorchBackend())
    initialize(net.named_parameters(), model, seed=0)
    assert net(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    elements = sum(parameter.numel() for parameter in net.parameters())
    bounds = [0, 3 + 2 * model.num_hidden_layers]
    assert parameter_counts(model).total == elements
    assert sum(math.prod(weight.shape) * weight.copies for weight in stage_weights(model, bounds, 0)) == elements
    assert all(role_of(name) for name, _ in net.named_parameters())
    assert forward_flops_per_token(model, 16).total > 0 and loop_bytes(Sizes.of(config)) > 0


@pytest.mark.parametrize("field", ["gate", "retrieval", "qk_norm", "attention_bias", "residual_scale"])
def test_exports_know_the_same_values(field):
    assert _CHOICES[field] == values_of(ModelConfig, field)


def test_tables_are_whole():
    assert set(RETRIEVALS) == set(values_of(ModelConfig, "retrieval"))
    assert set(SCHEDULES) == set(values_of(ScheduleConfig, "type"))
    assert set(PONDER_SCHEDULES) == set(values_of(TrainingConfig, "ponder_schedule"))


NEW_GATE = [
    lambda config: make_gate(config.model),
    lambda config: parameter_counts(config.model),
    lambda config: gate_flops(config.model),
    lambda config: list(layer_weights(config.model, 0)),
    lambda config: loop_bytes(Sizes.of(config)),
]
NEW_RETRIEVAL = [
    lambda config: LoopMemLM(config.model, TorchBackend()),
    lambda config: forward_flops_per_token(config.model, 16),
    lambda config: sparse_bytes(Sizes.of(config), 4),
]


@pytest.mark.parametrize(
    ("field", "use"), [*(("gate", use) for use in NEW_GATE), *(("retrieval", use) for use in NEW_RETRIEVAL)]
)
def test_a_value_that_is_not_known_is_not_taken_for_another(field, use):
    config = run_of()
    new = config.model_copy(update={"model": config.model.model_copy(update={field: "new"})})
    with pytest.raises((KeyError, ValueError), match="new"):
        use(new)


def test_a_schedule_that_is_not_known_is_not_taken_for_another():
    config = tiny_run()
    with pytest.raises(KeyError, match="new"):
        learning_rate(0, config.optimizer, config.schedule.model_copy(update={"type": "new"}), 20)
    with pytest.raises(KeyError, match="new"):
        ponder_weight(0, 0.1, config.training.model_copy(update={"ponder_schedule": "new"}))
