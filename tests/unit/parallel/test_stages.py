"""Pipeline cuts: the best there is (against all cuts of small models), and what must never be cut apart."""

import itertools

import pytest

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.model.flops import forward_flops_per_token
from loopmem_pretrain.parallel.stages import (
    layer_costs,
    layers_of_stage,
    naive_bounds,
    stage_bounds,
    stage_costs,
)
from tests.configs import TINY_MODEL

PLAIN = {"max_loops": 0, "residual_scale": "one", "local_slots": 0, "global_slots": 0, "ponder_weight": 0.0}


def model(layers=6, **fields):
    return ModelConfig(**{**TINY_MODEL, "num_hidden_layers": layers, **fields})


@pytest.mark.parametrize("fields", [{}, PLAIN, {"local_slots": 0, "global_slots": 0}, {"local_slots": 0}])
def test_positions_are_those_of_the_layer_list(fields):
    from loopmem_pretrain.model.backend import TorchBackend
    from loopmem_pretrain.training.pipeline import layer_list

    config = model(**fields)
    entries = layer_list(config, TorchBackend())
    costs = layer_costs(config, 16)
    assert len(costs) == len(entries) == stage_bounds(config, 16, 3)[-1]
    assert sum(costs) == pytest.approx(forward_flops_per_token(config, 16, tokens=16).total)
    dear = [index for index, cost in enumerate(costs) if cost]
    layers = [index for index, entry in enumerate(entries) if entry.public_prefix.startswith("model.layers.")]
    assert dear == [*layers, len(entries) - 1]


@pytest.mark.parametrize("fields", [{}, PLAIN])
@pytest.mark.parametrize("vocab_size", [96, 5000])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_no_cut_is_better(fields, vocab_size, stages):
    config = model(vocab_size=vocab_size, **fields)
    loops = [1, 3, 2.5, 1, 1.2, 3]
    costs = layer_costs(config, 16, loops)
    bounds = stage_bounds(config, 16, stages, loops)
    step = 1 if fields else 2
    starts = [1 + layer * step for layer in range(1, 6)]
    cuts = [[0, *inner, len(costs)] for inner in itertools.combinations(starts, stages - 1)]
    assert bounds in cuts
    assert max(stage_costs(costs, bounds)) == pytest.approx(min(max(stage_costs(costs, cut)) for cut in cuts), abs=1)


def test_a_big_head_takes_layers_from_the_last_stage():
    config = model(layers=8, vocab_size=5000)
    balanced, naive = stage_bounds(config, 16, 4), naive_bounds(config, 4)
    layers = [list(layers_of_stage(config, balanced, stage)) for stage in range(4)]
    assert [len(held) for held in layers] == [2, 2, 3, 1]
    assert list(itertools.chain(*layers)) == list(range(8))
    assert [len(layers_of_stage(config, naive, stage)) for stage in range(4)] == [2, 2, 2, 2]
    costs = layer_costs(config, 16)
    assert max(stage_costs(costs, balanced)) < max(stage_costs(costs, naive))


def test_equal_layers_are_spread_evenly():
    """Of 8 layers on 3 stages, 3 + 3 + 2 and not 2 + 3 + 3, whose last stage would hold the head as well."""
    config = model(layers=8)
    bounds = stage_bounds(config, 16, 3)
    assert [len(layers_of_stage(config, bounds, stage)) for stage in range(3)] == [3, 3, 2]
    assert naive_bounds(config, 3) == bounds == [0, 7, 13, 19]


@pytest.mark.parametrize("fields", [{}, PLAIN])
@pytest.mark.parametrize("cut", [naive_bounds, lambda config, stages: stage_bounds(config, 16, stages)])
def test_every_layer_is_on_one_stage(fields, cut):
    config = model(layers=7, **fields)
    for stages in range(1, 8):
        bounds = cut(config, stages)
        held = [layers_of_stage(config, bounds, stage) for stage in range(stages)]
        assert [layer for part in held for layer in part] == list(range(7)) and all(held)


@pytest.mark.parametrize("stages", [0, 7])
@pytest.mark.parametrize("cut", [naive_bounds, lambda config, stages: stage_bounds(config, 16, stages)])
def test_more_stages_than_layers(stages, cut):
    with pytest.raises(ConfigError, match=f"{stages} pipeline stages do not fit 6 layers") as error:
        cut(model(), stages)
    assert "parallel.pipeline_model_parallel_size to a number from 1 to 6" in str(error.value)


@pytest.mark.parametrize("loops", [[1.0] * 5, [1.0] * 5 + [0.0]])
def test_loops_that_do_not_fit(loops):
    with pytest.raises(ConfigError, match="do not fit 6 layers"):
        layer_costs(model(), 16, loops)
