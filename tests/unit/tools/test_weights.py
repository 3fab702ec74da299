"""The table of parameters against those of real models."""

import pytest

from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.parallel.stages import stage_bounds
from loopmem_pretrain.tools.weights import Weight, layer_weights, local_numel, shared_weights, stage_weights
from tests.configs import tiny_run
from tests.unit.tools.test_activations import MODELS

KINDS = [*MODELS.values(), {"tie_word_embeddings": True}]


@pytest.mark.parametrize("fields", KINDS, ids=[*MODELS, "tied"])
def test_names_and_shapes(fields):
    model = tiny_run(model=fields).model
    table = {
        weight.name: weight.shape for layer in range(model.num_hidden_layers) for weight in layer_weights(model, layer)
    }
    table |= {weight.name: weight.shape for weight in shared_weights(model)}
    table |= {w.name: w.shape for w in stage_weights(model, stage_bounds(model, 16, 1), 0) if ".layers." not in w.name}
    real = LoopMemLM(model, TorchBackend()).named_parameters()
    assert table == {name: tuple(parameter.shape) for name, parameter in real}


def test_stages_share_nothing_but_the_memory_and_a_tied_embedding():
    model = tiny_run(model={"num_hidden_layers": 5, "tie_word_embeddings": True}).model
    bounds = stage_bounds(model, 16, 3)
    held = sum(local_numel(w, ParallelConfig()) for stage in range(3) for w in stage_weights(model, bounds, stage))
    shared = sum(local_numel(weight, ParallelConfig()) for weight in shared_weights(model))
    assert held == parameter_counts(model).total + 2 * shared + model.vocab_size * model.hidden_size


def test_the_vocabulary_is_padded():
    weight = Weight("lm_head.weight", (97, 32))
    assert local_numel(weight, ParallelConfig(tensor_model_parallel_size=4)) == 25 * 32
