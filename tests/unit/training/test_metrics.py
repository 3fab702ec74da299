"""Loop statistics over micro-batches, some of which are not finite."""

import math

import pytest
import torch

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model.loopmem import LoopStats
from loopmem_pretrain.training.hooks import softplus
from loopmem_pretrain.training.metrics import LoopAccumulator
from tests.configs import TINY_MODEL

MODEL = ModelConfig.model_validate({**TINY_MODEL, "global_slots": 0})


def visit(value):
    probs = torch.full((1, 4, 3), 1 / 3) * value
    return LoopStats(probs, torch.full((3,), value), torch.full((3,), value), torch.full((3,), value), None)


def test_visits_that_are_not_finite_are_left_out():
    accumulator = LoopAccumulator(MODEL, 2, torch.device("cpu"))
    for first, second in ((1.0, 1.0), (math.nan, 3.0), (3.0, math.inf)):
        for layer, value in enumerate((first, second)):
            accumulator.add(layer, visit(value), torch.tensor(value), weight=0.5)
    means = accumulator.read_and_reset()
    assert means["lambdas"] == [[2, 2, 2], [2, 2, 2]]
    assert means["local_gate"] == [2, 2] and "global_gate" not in means
    assert means["expected_loops"] == pytest.approx([4, 4])
    assert (means["ponder_cost"], means["ponder_loss"]) == (2, 1)


def test_nothing_finite_is_nan_and_forgotten_by_the_next_read():
    accumulator = LoopAccumulator(MODEL, 2, torch.device("cpu"))
    accumulator.add(0, visit(1.0), torch.tensor(1.0), 0.5)
    accumulator.add(1, visit(math.nan), torch.tensor(1.0), 0.5)
    means = accumulator.read_and_reset()
    assert means["lambdas"][0] == [1, 1, 1]
    assert all(map(math.isnan, means["lambdas"][1])) and math.isnan(means["ponder_cost"])
    for layer in (0, 1):
        accumulator.add(layer, visit(2.0), torch.tensor(1.0), 0.5)
    assert accumulator.read_and_reset()["lambdas"] == [[2, 2, 2], [2, 2, 2]]


def test_zeta_of_a_step_scale_that_has_diverged():
    assert softplus(1e4) == 1e4 and softplus(-1e4) == 0
    assert softplus(-7.0) == pytest.approx(math.log1p(math.exp(-7)))
