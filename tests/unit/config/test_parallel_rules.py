"""What parallel sizes a configuration and a number of ranks allow; every refusal says why and what is valid."""

import pytest

from loopmem_pretrain.config.run import check_topology
from loopmem_pretrain.errors import ConfigError
from tests.unit.config.conftest import GOOD

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"


def said_about(files, *overrides: str) -> str:
    lines = files.problems(GOOD, *overrides).splitlines()
    assert lines[0] == "1 problem in the configuration", lines
    return lines[1].strip().removeprefix("command line: ")


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{TP}=2"],
        [f"{TP}=2", "parallel.sequence_parallel=true"],
        [f"{TP}=2", "parallel.memory_placement=sharded", "model.global_slots=4"],
        [f"{TP}=2", f"{PP}=2"],
        [f"{TP}=2", "parallel.zero_stage=3"],
        [f"{PP}=2", "training.compile=loop"],
        [f"{TP}=2", "model.vocab_size=97"],
    ],
)
def test_sizes_that_fit(files, overrides):
    files.load(GOOD, *overrides)


def test_fewer_key_value_heads_than_ranks(files):
    said = said_about(files, f"{TP}=4")
    assert said.startswith(f"{TP}: 4 ranks for 2 key/value heads (model.num_key_value_heads)")
    assert "not replicated" in said and said.endswith("valid for this model: 1 or 2")


def test_heads_that_do_not_divide(files):
    said = files.problems(GOOD, f"{TP}=3", "model.num_key_value_heads=4")
    assert f"{TP}: 3 does not divide model.num_attention_heads 4; valid for this model: 1, 2 or 4" in said
    assert f"{TP}: 3 does not divide model.num_key_value_heads 4" in said
    assert "intermediate_size" not in said


def test_feed_forward_that_does_not_divide(files):
    said = said_about(files, f"{TP}=2", "model.intermediate_size=49")
    assert said == f"{TP}: 2 does not divide model.intermediate_size 49; valid for this model: only 1"


def test_sequence_parallel_alone(files):
    said = said_about(files, "parallel.sequence_parallel=true")
    assert said.startswith("parallel.sequence_parallel: true cuts the tokens over tensor-parallel ranks")
    assert "raise that to 2 or more" in said


def test_tokens_that_do_not_divide(files):
    said = said_about(files, f"{TP}=2", "parallel.sequence_parallel=true", "data.seq_length=17")
    assert said.startswith("data.seq_length: 17 tokens cannot be cut evenly over 2 tensor-parallel ranks")
    assert said.endswith("nearest valid: 16 or 18")


def test_sharded_banks_on_one_rank(files):
    said = said_about(files, "parallel.memory_placement=sharded")
    assert said.startswith("parallel.memory_placement: 'sharded' cuts the slots over tensor-parallel ranks")


def test_sharded_banks_that_are_not_there(files):
    said = said_about(files, f"{TP}=2", "parallel.memory_placement=sharded", "model.local_slots=0")
    assert "model.local_slots and model.global_slots are both 0" in said


@pytest.mark.parametrize(("name", "slots", "valid"), [("local_slots", 9, "8 or 10"), ("global_slots", 1, "2")])
def test_slots_that_do_not_divide(files, name, slots, valid):
    said = said_about(files, f"{TP}=2", "parallel.memory_placement=sharded", f"model.{name}={slots}")
    assert said.startswith(f"model.{name}: {slots} slots cannot be cut evenly over 2 tensor-parallel ranks")
    assert said.endswith(f"nearest valid: {valid}")


def test_more_stages_than_layers(files):
    said = said_about(files, f"{PP}=3")
    assert said.startswith(f"{PP}: 3 stages for 2 layers (model.num_hidden_layers)") and said.endswith("at most 2")


@pytest.mark.parametrize("stage", [2, 3])
def test_pipeline_with_more_than_zero_1(files, stage):
    said = said_about(files, f"{PP}=2", f"parallel.zero_stage={stage}")
    assert said.startswith(f"parallel.zero_stage: {stage} does not work with pipeline_model_parallel_size 2")
    assert "gradients" in said and "take zero_stage 1" in said


def test_compiled_loops_with_tensor_parallelism(files):
    said = said_about(files, f"{TP}=2", "training.compile=loop")
    assert said.startswith("training.compile: 'loop' does not work with tensor_model_parallel_size 2")
    assert "collectives" in said


def test_all_at_once(files):
    said = files.problems(
        GOOD, f"{TP}=3", f"{PP}=3", "parallel.sequence_parallel=true", "parallel.memory_placement=sharded"
    )
    for key in (TP, PP, "data.seq_length", "model.local_slots"):
        assert f"command line: {key}: " in said or f": {key}: " in said


# ------------------------------------------------------------------------------- with the number of ranks


def refused(files, ranks: int, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_topology(files.load(GOOD, *overrides), ranks)
    return caught.value


@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (4, []), (4, [f"{TP}=2", f"{PP}=2"]), (8, [f"{TP}=2"])])
def test_numbers_of_ranks_that_fit(files, ranks, overrides):
    check_topology(files.load(GOOD, *overrides), ranks)


def test_ranks_that_are_no_whole_number_of_copies(files):
    error = refused(files, 6, f"{TP}=2", f"{PP}=2")
    assert error.problem.startswith("6 ranks are not a multiple of parallel.tensor_model_parallel_size 2 x ")
    assert "= 4" in error.problem
    assert error.fix == (
        "start 4, 8, 12, ... ranks, or with 6 ranks take TP 1 with PP 1, 2; TP 2 with PP 1"
    )  # 3 stages would be more than the layers


def test_valid_sizes_under_zero_2_have_one_stage(files):
    assert refused(files, 5, f"{TP}=2", "parallel.zero_stage=2").fix.endswith("take TP 1 with PP 1")


def test_batch_that_does_not_divide(files):
    error = refused(files, 6, f"{TP}=2")
    assert "global_batch_size 8 is not a multiple of micro_batch_size 2 x 3 data-parallel ranks" in error.problem


def test_fewer_micro_batches_than_stages(files):
    error = refused(files, 8, f"{PP}=2", "training.global_batch_size=12")
    assert "12 makes 1 micro-batches of 2 on each of 4 data-parallel ranks, fewer than the 2 stages" in (
        error.problem.replace("pipeline ", "")
    )
    assert error.fix.startswith("set training.global_batch_size to 16 or a larger multiple of 8")
    check_topology(files.load(GOOD, f"{PP}=2", "training.global_batch_size=16"), 8)


def test_offloading_the_optimizer_needs_zero_2_or_3(files):
    said = said_about(files, "parallel.offload_optimizer=cpu")
    assert said.startswith("parallel.offload_optimizer: 'cpu' does not work with zero_stage 1")
    assert said.endswith("take zero_stage 2 or 3")
    files.load(GOOD, "parallel.offload_optimizer=cpu", "parallel.zero_stage=2")


def test_offloading_parameters_needs_zero_3(files):
    said = said_about(files, "parallel.offload_parameters=cpu", "parallel.zero_stage=2")
    assert said.startswith("parallel.offload_parameters: 'cpu' needs zero_stage 3")
    files.load(GOOD, "parallel.offload_parameters=cpu", "parallel.zero_stage=3")


def test_the_papers_weight_decay_in_a_pipeline(files):
    """Only the embedding's stage then has a group without decay, and DeepSpeed waits for all stages' norms of it."""
    sizes = [f"{PP}=2", "training.precision=fp32", "optimizer.weight_decay_rule=paper"]
    said = said_about(files, *sizes)
    assert said.startswith(
        "optimizer.weight_decay_rule: 'paper' hangs with pipeline_model_parallel_size above 1 in fp32"
    )
    files.load(GOOD, *sizes, "training.precision=bf16")


def test_only_sizes_that_fit_are_offered(files):
    config = files.load(GOOD, f"{TP}=2", "parallel.sequence_parallel=true")
    with pytest.raises(ConfigError) as caught:
        check_topology(config, 3)
    assert "no sizes: none fit" in caught.value.fix


def test_tasks_while_training_need_a_whole_model_on_each_rank(files):
    for key in (TP, PP):
        said = said_about(files, "evaluation.tasks=[math]", f"{key}=2")
        assert said.startswith(f"evaluation.tasks: cannot be scored while training with {key} 2")
    files.load(GOOD, "evaluation.tasks=[math]", "parallel.zero_stage=3")
