"""Rules between sections, and the batch arithmetic."""

import pytest

from loopmem_pretrain.config.run import gradient_accumulation_steps
from loopmem_pretrain.errors import ConfigError
from tests.unit.config.conftest import GOOD


def said_about(files, *overrides: str) -> str:
    lines = files.problems(GOOD, *overrides).splitlines()
    assert lines[0] == "1 problem in the configuration", lines
    return lines[1].strip()


def test_warmup_that_leaves_no_step(files):
    said = said_about(files, "schedule.warmup_steps=20")
    assert said == "command line: schedule.warmup_steps: 20 leaves no step after it; must be < 20"


def test_wsd_without_a_decay(files):
    said = said_about(files, "schedule.type=wsd")
    assert said.endswith("schedule.decay_steps: wsd needs a final decay; usual: a tenth of train_steps")


def test_wsd_decay_that_does_not_fit(files):
    said = said_about(files, "schedule.type=wsd", "schedule.decay_steps=19")
    assert said.endswith("schedule.decay_steps: 19 does not fit; at most 18")


def test_wsd_whose_warmup_leaves_no_room_is_one_problem(files):
    said = said_about(files, "schedule.type=wsd", "schedule.decay_steps=5", "schedule.warmup_steps=30")
    assert "schedule.warmup_steps: 30 leaves no step after it" in said


def test_decay_steps_of_another_schedule(files):
    said = said_about(files, "schedule.decay_steps=5")
    assert said.endswith("schedule.decay_steps: belongs to type wsd, not cosine; leave it out")


def test_beta1_min_of_another_schedule(files):
    said = said_about(files, "schedule.beta1_min=0.8")
    assert said.endswith("schedule.beta1_min: belongs to type one_cycle, not cosine; leave it out")


def test_beta1_min_above_beta1(files):
    said = said_about(files, "schedule.type=one_cycle", "schedule.beta1_min=0.95")
    assert said.endswith("schedule.beta1_min: 0.95 is above optimizer.beta1 0.9")


def test_min_lr_above_the_peak(files):
    said = said_about(files, "schedule.min_lr=0.1")
    assert said.endswith("schedule.min_lr: 0.1 is above the peak optimizer.lr 0.01")


def test_micro_batch_that_does_not_divide_the_batch(files):
    said = said_about(files, "training.micro_batch_size=3")
    assert said.endswith("training.micro_batch_size: 3 does not divide global_batch_size 8")


def test_rewinding_with_one_checkpoint(files):
    said = said_about(files, "faults.spike_action=rewind", "checkpoint.keep_last=1")
    assert "checkpoint.keep_last" in said and "at least 2" in said


@pytest.mark.parametrize("every", [15, 5])
def test_a_step_to_keep_at_which_nothing_is_saved(files, every):
    """Of every 15 and every 10 steps only those of every 30 would be kept."""
    said = said_about(files, "checkpoint.interval_steps=10", f"checkpoint.keep_every_steps={every}")
    assert said.endswith(
        f"checkpoint.keep_every_steps: {every} must be 0 or a multiple of checkpoint.interval_steps 10"
    )
    files.load(GOOD, "checkpoint.interval_steps=10", "checkpoint.keep_every_steps=30")


def test_keeping_the_best_of_checkpoints_without_a_loss(files):
    steps = ["checkpoint.interval_steps=10", "validation.interval_steps=4"]
    said = said_about(files, *steps, "checkpoint.keep_best=2")
    assert "checkpoint.keep_best: 2 needs a validation loss at each checkpoint" in said
    assert said.endswith("10 must be a multiple of validation.interval_steps 4")
    files.load(GOOD, *steps)
    files.load(GOOD, "checkpoint.interval_steps=8", "validation.interval_steps=4", "checkpoint.keep_best=2")


@pytest.mark.parametrize("schedule", ["linear", "cyclic"])
def test_ponder_schedule_without_a_weight(files, schedule):
    said = said_about(files, f"training.ponder_schedule={schedule}")
    assert said.endswith(f"training.ponder_schedule: '{schedule}' modulates model.ponder_weight, which is 0")


def test_compiled_loops_under_zero_3(files):
    said = said_about(files, "training.compile=loop", "parallel.zero_stage=3")
    assert "training.compile: 'loop' does not work with zero_stage 3" in said


def test_stage_0_is_not_offered(files):
    said = said_about(files, "parallel.zero_stage=0")
    assert said.startswith("command line: parallel.zero_stage: must be 1, 2 or 3: stage 0 is not offered because ")
    assert "phantom optimizer step" in said and said.endswith("(got 0)")


def test_tasks_that_nobody_knows(files):
    said = said_about(files, "evaluation.tasks=[math,arc_esay,hellaswaq]")
    assert "evaluation.tasks: arc_esay, hellaswaq not known; valid: arc_challenge, arc_easy, " in said
    files.load(GOOD, "evaluation.tasks=[math,arc_easy]")


def test_all_rules_at_once(files):
    said = files.problems(
        GOOD, "schedule.warmup_steps=50", "training.micro_batch_size=3", "model.num_attention_heads=6"
    )
    assert said.startswith("3 problems in the configuration")


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_gradient_accumulation(files, ranks, steps):
    assert gradient_accumulation_steps(files.load(GOOD).training, ranks) == steps


def test_batch_that_is_no_whole_number_of_passes(files):
    training = files.load(GOOD, "training.global_batch_size=100", "training.micro_batch_size=4").training
    with pytest.raises(ConfigError) as caught:
        gradient_accumulation_steps(training, 3)
    assert caught.value.problem == (
        "training.global_batch_size 100 is not a multiple of micro_batch_size 4 x 3 data-parallel ranks = 12"
    )
    assert caught.value.fix.endswith("a multiple of 12, the nearest is 96, or change the number of ranks")


def test_the_nearest_batch_may_be_a_larger_one(files):
    training = files.load(GOOD, "training.global_batch_size=88", "training.micro_batch_size=4").training
    with pytest.raises(ConfigError, match="a multiple of 32, the nearest is 96,"):
        gradient_accumulation_steps(training, 8)


def test_micro_batches_that_would_fit_are_named(files):
    training = files.load(GOOD, "training.global_batch_size=96", "training.micro_batch_size=32").training
    with pytest.raises(ConfigError) as caught:
        gradient_accumulation_steps(training, 4)
    assert caught.value.fix.startswith(
        "set training.micro_batch_size to 24, which keeps the batch, or set training.glob"
    )


def test_more_ranks_than_samples(files):
    with pytest.raises(ConfigError) as caught:
        gradient_accumulation_steps(files.load(GOOD).training, 8)
    assert "the nearest is 16" in caught.value.fix
