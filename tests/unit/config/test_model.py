"""Rules between the model's fields: each slip gets one line with its place and what would be valid."""

import pytest

from tests.unit.config.conftest import GOOD

PLAIN = GOOD.replace("max_loops: 3", "max_loops: 0\n  residual_scale: one").replace("  local_slots: 8\n", "")


def test_heads_that_do_not_divide_the_width(bad):
    said = bad("num_attention_heads: 4", "num_attention_heads: 6")
    assert said == "run.yaml:7:3: model.num_attention_heads: 6 does not divide hidden_size 32; nearest valid: 4 or 8"


def test_odd_head_width(bad):
    said = bad("num_attention_heads: 4", "num_attention_heads: 32")
    assert "model.num_attention_heads: the head width 1 is odd" in said and said.endswith("nearest valid: 8 or 16")


def test_odd_model_width(bad):
    said = bad("hidden_size: 32", "hidden_size: 33")
    assert said.endswith("4 does not divide hidden_size 33; nearest valid: none, hidden_size is odd")


def test_odd_head_dim(files):
    assert "command line: model.head_dim: 7 is odd" in files.problems(GOOD, "model.head_dim=7")


def test_heads_of_a_given_width_need_not_divide_the_model_width(files):
    model = files.load(GOOD, "model.head_dim=12", "model.hidden_size=36", "model.num_attention_heads=8").model
    assert model.head_width == 12


def test_key_value_heads_that_do_not_divide_the_heads(bad):
    said = bad("num_key_value_heads: 2", "num_key_value_heads: 3")
    assert said.endswith("model.num_key_value_heads: 3 does not divide num_attention_heads 4; nearest valid: 2 or 4")


def test_enormous_width_is_answered_at_once(files):
    assert "does not divide hidden_size" in files.problems(GOOD, "model.hidden_size=999999999999999999")


@pytest.mark.parametrize("scale", ["one", "inverse_depth"])
def test_residual_scale_of_plain_blocks_in_a_looped_model(bad, scale):
    said = bad("max_loops: 3", f"max_loops: 3\n  residual_scale: {scale}")
    assert said.endswith(f"'{scale}' belongs to plain blocks (max_loops: 0); with max_loops 3 only 'learned' is valid")


def test_learned_residual_scale_of_plain_blocks(files):
    said = files.problems(PLAIN.replace("  residual_scale: one\n", ""))
    assert "run.yaml:2:1: model.residual_scale: 'learned' needs max_loops >= 1" in said


@pytest.mark.parametrize("bank", ["local_slots", "global_slots"])
def test_memory_without_loops(files, bank):
    said = files.problems(PLAIN, f"model.{bank}=4")
    assert f"command line: model.{bank}: memory is read at every loop, so it needs max_loops >= 1" in said


@pytest.mark.parametrize("loops", [0, 1])
def test_ponder_weight_without_a_choice_of_loops(files, loops):
    text = PLAIN if loops == 0 else GOOD.replace("max_loops: 3", "max_loops: 1")
    said = files.problems(text, "model.ponder_weight=0.1")
    assert f"model.ponder_weight: 0.1 has no effect with max_loops {loops}; set it to 0" in said


@pytest.mark.parametrize("bias", ["-51", "51", "1e4"])
def test_gate_bias_beyond_what_a_sigmoid_tells_apart(files, bias):
    assert "model.gate_init_bias: must be " in files.problems(GOOD, f"model.gate_init_bias={bias}")


def test_unknown_gate(files):
    assert "must be vector, scalar or constant (got 'matrix')" in files.problems(GOOD, "model.gate=matrix")


def test_unknown_retrieval(files):
    said = files.problems(GOOD, "model.retrieval=hash")
    assert "model.retrieval: must be dense, topk or product_keys (got 'hash')" in said


@pytest.mark.parametrize("retrieval", ["topk", "product_keys"])
def test_retrieval_without_a_global_bank(files, retrieval):
    said = files.problems(GOOD, f"model.retrieval={retrieval}")
    assert f"model.retrieval: '{retrieval}' reads the global bank, and there is none; set global_slots" in said


def test_topk_without_effect(files):
    said = files.problems(GOOD, "model.global_slots=64", "model.retrieval_topk=16")
    assert "model.retrieval_topk: 16 has no effect with retrieval 'dense'; leave it out, or set retrieval" in said


def test_more_than_all_slots(files):
    said = files.problems(GOOD, "model.global_slots=31", "model.retrieval=topk")
    assert "model.retrieval_topk: 32 is more than global_slots 31; valid: 1 to 31" in said


@pytest.mark.parametrize(("slots", "nearest"), [(1000, "961 or 1024"), (2, "1 or 4")])
def test_product_keys_of_slots_that_are_no_square(files, slots, nearest):
    said = files.problems(GOOD, "model.retrieval=product_keys", f"model.global_slots={slots}")
    assert f"model.global_slots: {slots} is no square" in said and said.endswith(f"nearest valid: {nearest}")


def test_product_keys_of_an_odd_width(files):
    fields = ("model.retrieval=product_keys", "model.global_slots=4096", "model.hidden_size=129", "model.head_dim=32")
    assert "model.hidden_size: 129 is odd, and product_keys compares halves of it" in files.problems(GOOD, *fields)


def test_more_than_the_half_keys(files):
    said = files.problems(GOOD, "model.retrieval=product_keys", "model.global_slots=256")
    assert "model.retrieval_topk: 32 is more than the 16 half-keys of a side of 256 slots; valid: 1 to 16" in said


def test_read_of_no_slot(files):
    said = files.problems(GOOD, "model.retrieval=topk", "model.global_slots=64", "model.retrieval_topk=0")
    assert "model.retrieval_topk: must be " in said


@pytest.mark.parametrize("retrieval", ["topk", "product_keys"])
def test_a_million_slots_are_fine(files, retrieval):
    model = files.load(GOOD, f"model.retrieval={retrieval}", "model.global_slots=1048576").model
    assert (model.retrieval, model.retrieval_topk) == (retrieval, 32)


@pytest.mark.parametrize("scale", ["one", "inverse_depth"])
def test_plain_models_are_fine(files, scale):
    assert files.load(PLAIN, f"model.residual_scale={scale}").model.max_loops == 0


def test_memory_with_one_loop_is_fine(files):
    assert files.load(GOOD, "model.max_loops=1").model.local_slots == 8


def test_negative_ponder_weight_is_fine(files):
    assert files.load(GOOD, "model.ponder_weight=-0.01").model.ponder_weight == -0.01
