"""How DeepSpeed's converter puts the parts of each parameter together, for every name of several models."""

import re

import pytest

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.parallel.placement import placement
from loopmem_pretrain.training.pipeline import parameter_table, universal_checkpoint_info
from tests.configs import TINY_MODEL

MODELS = {
    "dense": {},
    "topk": {"retrieval": "topk", "retrieval_topk": 2},
    "product keys": {"retrieval": "product_keys", "retrieval_topk": 2, "local_slots": 16, "global_slots": 16},
    "tied": {"tie_word_embeddings": True},
    "no grouped queries": {"num_key_value_heads": 4},
    "plain": {"max_loops": 0, "local_slots": 0, "global_slots": 0, "ponder_weight": 0.0},
    "biases": {"attention_bias": "all", "qk_norm": "before_rope", "head_dim": 6},
    "deep": {"num_hidden_layers": 12},  # positions 1 and 11, 2 and 12: one name ends in another
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("memory_placement", ["replicated", "sharded"])
def test_every_parameter_has_the_one_rule_of_its_placement(fields, memory_placement):
    model = ModelConfig.model_validate(TINY_MODEL | fields)
    parallel = ParallelConfig(tensor_model_parallel_size=2, memory_placement=memory_placement)
    table = parameter_table(model, TorchBackend())
    info = universal_checkpoint_info(table, model, parallel)
    rules = {key: patterns for key, patterns in info.items() if key.endswith("_patterns")}
    for name, row in table.items():
        matched = [key for key, patterns in rules.items() for pattern in patterns if re.match(pattern, name)]
        where = placement(row.public_name, parallel)
        if where.cut is None:
            assert matched == ["tp_replicated_parameter_patterns"], name
        elif where.padded:
            assert matched == ["vocabulary_parameter_patterns"], name
        elif where.cut == 1:
            assert matched == ["parameter_with_row_parallelism_patterns"], name
        else:
            assert matched == [], name  # DeepSpeed concatenates along dimension 0 what no list names
    for patterns in rules.values():  # DeepSpeed refuses a rule that fits no parameter
        assert all(any(re.match(pattern, name) for name in table) for pattern in patterns)
