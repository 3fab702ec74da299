"""LoopMemConfig: every bad value is a ValueError that says what is valid."""

import pytest
from pydantic import ValidationError

from loopmem_pretrain.config.model import ModelConfig, model_problems
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from tests.unit.hf.conftest import SIZES, VARIANTS

GOOD = {**SIZES, "max_loops": 3}
PLAIN = {**SIZES, "max_loops": 0, "residual_scale": "one"}

# (fields, what the message must say)
BAD = [
    ({"vocab_size": 0}, "vocab_size: 0 is not valid; valid: a whole number above 0"),
    ({"hidden_size": -32}, "hidden_size: -32"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers: 2.0"),
    ({"num_attention_heads": "4"}, "num_attention_heads: '4'"),
    ({"num_attention_heads": True}, "num_attention_heads: True"),
    ({"num_attention_heads": 5}, "5 does not divide hidden_size 32"),
    ({"num_attention_heads": 32, "num_key_value_heads": 32}, "heads of even width"),
    ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4; valid: a divisor of 4"),
    ({"max_loops": -1}, "max_loops: -1 is not valid; valid: a whole number, 0 or above"),
    ({"local_slots": -8}, "local_slots: -8"),
    ({"global_slots": 1.5}, "global_slots: 1.5"),
    ({"residual_scale": "two"}, "valid: 'learned', 'one', 'inverse_depth'"),
    ({"residual_scale": "one"}, "residual_scale: 'one' belongs to plain blocks (max_loops 0)"),
    ({"gate": "matrix"}, "valid: 'vector', 'scalar', 'constant'"),
    ({"retrieval": "hash"}, "valid: 'dense', 'topk', 'product_keys'"),
    ({"retrieval": "topk"}, "retrieval: 'topk' reads the global bank, and there is none; valid: 'dense'"),
    ({"retrieval_topk": 0}, "retrieval_topk: 0 is not valid; valid: a whole number above 0"),
    ({"retrieval_topk": 8}, "retrieval_topk: 8 has no effect with retrieval 'dense'; valid: 32"),
    ({"retrieval": "topk", "global_slots": 16}, "retrieval_topk: 32 with 16 global_slots"),
    ({"retrieval": "product_keys", "global_slots": 60}, "global_slots: 60 is not valid with retrieval 'product_keys'"),
    ({"retrieval": "product_keys", "global_slots": 64}, "retrieval 'product_keys'; valid: 1 to 8"),
    ({"head_dim": 7}, "head_dim: 7 is odd; valid: an even width"),
    ({"head_dim": 0}, "head_dim: 0 is not valid; valid: none, or above 0"),
    ({"qk_norm": "both"}, "valid: 'after_rope', 'before_rope', 'none'"),
    ({"attention_bias": True}, "valid: 'none', 'qkv', 'all'"),
    ({"rope_theta": 0.0}, "rope_theta: 0.0 is not valid; valid: a finite number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
    ({"gate_init_bias": float("inf")}, "gate_init_bias: inf"),
    ({"ponder_weight": "0.1"}, "ponder_weight: '0.1'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is not valid; valid: true or false"),
]
BAD_HERE_ONLY = [
    ({"format_version": 2, "max_loops": "many"}, "format_version: 2 is newer than 1, the newest that this code reads"),
    ({"format_version": 0}, "format_version: 0 is not valid; valid: 1 to 1"),
    ({"use_cache": 1}, "use_cache: 1 is not valid; valid: true or false"),
    ({"max_position_embeddings": 0}, "max_position_embeddings: 0"),
    ({"eos_token_id": 512}, "eos_token_id: 512 is not valid; valid: none, or a token id from 0 to vocab_size - 1"),
    ({"eos_token_id": [2, 512]}, "eos_token_id: [2, 512] is not valid"),
    ({"eos_token_id": []}, "eos_token_id: [] is not valid"),
    ({"pad_token_id": -1}, "pad_token_id: -1"),
    ({"pad_token_id": [1]}, "pad_token_id: [1] is not valid"),
]
BAD_PLAIN = [
    ({"residual_scale": "learned"}, "'learned' needs max_loops of 1 or above; valid: 'one', 'inverse_depth'"),
    ({"local_slots": 4}, "local_slots: 4 with max_loops 0"),
    ({"global_slots": 4}, "global_slots: 4 with max_loops 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD + BAD_HERE_ONLY)
def test_bad_value(fields, message):
    with pytest.raises(ValueError) as caught:
        LoopMemConfig(**{**GOOD, **fields})
    assert message in str(caught.value)


@pytest.mark.parametrize(("fields", "message"), BAD_PLAIN)
def test_bad_value_of_a_plain_model(fields, message):
    with pytest.raises(ValueError) as caught:
        LoopMemConfig(**{**PLAIN, **fields})
    assert message in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ValueError) as caught:
        LoopMemConfig(**{**GOOD, "vocab_size": 0, "gate": "matrix"})
    assert "vocab_size" in str(caught.value) and "gate" in str(caught.value)


def training_accepts(fields) -> bool:
    try:
        return not model_problems(ModelConfig(**fields))
    except ValidationError:
        return False


@pytest.mark.parametrize("fields", [{**GOOD, **bad} for bad, _ in BAD] + [{**PLAIN, **bad} for bad, _ in BAD_PLAIN])
def test_training_refuses_the_same(fields):
    assert not training_accepts(fields)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_training_accepts_is_valid_here(variant):
    fields = {**SIZES, **VARIANTS[variant]}
    assert training_accepts(fields)
    config = LoopMemConfig(**fields)
    for key, value in ModelConfig(**fields).model_dump().items():
        assert getattr(config, key) == value


def test_several_ends(tmp_path):
    LoopMemConfig(**GOOD, eos_token_id=[2, 5]).save_pretrained(tmp_path)
    assert LoopMemConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]


def test_defaults_are_valid():
    assert LoopMemConfig().num_hidden_layers == 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded(variant, tmp_path):
    config = LoopMemConfig(**SIZES, **VARIANTS[variant], max_position_embeddings=64, eos_token_id=2)
    config.save_pretrained(tmp_path)
    assert LoopMemConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
