"""Steps that are not finite, weights that are not, and loss spikes that are rewound."""

import json
import math
import shutil

import pytest

from loopmem_pretrain.checkpoint.manifest import encode_manifest, read_manifest
from tests.distributed import run_ranks
from tests.e2e.test_training import config_for, exact, lines, run

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def faults(run_dir):
    path = run_dir / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def step_on_rank(rank, world_size, config, bad_step, how):
    """Five steps; in `bad_step` the last rank meets a number that is not finite, or (how "left out") it is left out.

    Returns (losses, whether the bad step left every bit of weights and moments alone, skipped steps, Adam's steps).
    """
    import torch

    from loopmem_pretrain.parallel.checks import held_part
    from loopmem_pretrain.training.trainer import Trainer

    trainer = Trainer(config)
    engine, batches = trainer.engine, trainer._batches()
    module, inner = engine.engine.module, engine.engine.optimizer.optimizer

    def bits():
        moments = [s[key].clone() for s in inner.state.values() for key in ("exp_avg", "exp_avg_sq", "step")]
        return [held_part(weight).clone() for weight in module.parameters()] + moments

    losses, untouched, loss_fn = [], None, module.loss_fn
    for step in range(5):
        handle = None
        if step == bad_step and how == "left out":
            for _ in range(engine.accumulation_steps):
                next(batches)
            continue
        if step == bad_step and rank == world_size - 1:
            if how == "loss":
                module.loss_fn = lambda *args: loss_fn(*args) * math.nan
            else:
                # Not of a weight that is whole on several tensor-parallel ranks: its gradient is the same on all.
                cut = [p for name, p in module.named_parameters() if name.endswith("q_proj.weight")][-1]
                handle = cut.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float(how)))
        before = bits()
        loss = float(engine.train_batch(batches, step))
        module.loss_fn = loss_fn
        if step == bad_step:
            untouched = all(torch.equal(*pair) for pair in zip(before, bits(), strict=True))
        else:
            losses.append(loss)
        if handle:
            handle.remove()
    return losses, untouched, engine.skipped_steps, {float(state["step"]) for state in inner.state.values()}


LAYOUTS = {
    "dp2": ({}, 2),
    "dp2 zero2": ({"zero_stage": 2}, 2),
    "dp2 zero3": ({"zero_stage": 3}, 2),
    "tp2": ({TP: 2}, 2),
    "pp2": ({PP: 2}, 2),
    "tp2 pp2": ({TP: 2, PP: 2}, 4),
    "tp2 zero2": ({TP: 2, "zero_stage": 2}, 2),
    "tp2 zero3": ({TP: 2, "zero_stage": 3}, 2),
    "dp2 zero2 offload": ({"zero_stage": 2, "offload_optimizer": "cpu"}, 2),
    "dp2 zero3 offload": ({"zero_stage": 3, "offload_optimizer": "cpu"}, 2),
}
QUICK = [
    ("dp2", "fp32", "nan"),
    ("dp2 zero3", "bf16", "inf"),
    ("tp2 pp2", "bf16", "nan"),
    ("dp2 zero2", "bf16", "loss"),
    ("dp2 zero2 offload", "bf16", "nan"),
]
ALL = [(layout, precision, how) for layout in LAYOUTS for precision in ("fp32", "bf16") for how in ("nan", "loss")]


@pytest.mark.parametrize(
    ("layout", "precision", "how"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
    ids=lambda value: value.replace(" ", "-"),
)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, sentences, layout, precision, how):
    """DeepSpeed's doing, of which the rest is built: it must hold for every layout and version."""
    parallel, ranks = LAYOUTS[layout]
    results = {}
    for name in (how, "left out"):
        config = config_for(
            tmp_path / name.replace(" ", "-"),
            sentences,
            model={"num_key_value_heads": 4},
            parallel=parallel,
            training={"precision": precision},
        )
        results[name] = run_ranks("tests.e2e.test_faults:step_on_rank", ranks, config, 2, name)
    for (losses, untouched, skipped, steps), (expected, *_) in zip(results[how], results["left out"], strict=True):
        assert (untouched, skipped, steps) == (True, 1, {4.0})
        assert losses == expected and all(map(math.isfinite, losses))


BAD_LOSS = """
import torch
module, steps = trainer.engine.engine.module, {steps}
loss_fn = module.loss_fn
def spoiled(*args):
    is_bad = torch.is_grad_enabled() and trainer.position.step + 1 in steps  # no validation
    return loss_fn(*args) * (float("nan") if is_bad else 1)
module.loss_fn = spoiled
"""


def test_skipped_steps_are_counted_over_starts(tmp_path, sentences):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    bad = BAD_LOSS.format(steps={3, 9, 10, 11, 17})
    assert run(config_for(whole, sentences), before=bad) == ("done", None)
    assert run(config_for(halves, sentences), before=bad, stop_at_step=10) == ("interrupted", None)
    assert run(config_for(halves, sentences), before=bad) == ("done", None)
    assert [line["skipped_steps"] for line in lines(whole)] == [1, 3, 4, 5]
    assert exact(whole) == exact(halves)
    assert all(line["loss"] < 6 and line["expected_loops"] for line in lines(whole))  # means of what was finite
    said = [(fault["kind"], fault["step"], fault["steps"]) for fault in faults(halves)]
    assert said == [
        ("not_finite", 5, [3]),
        ("not_finite", 10, [9, 10]),
        ("not_finite", 15, [11]),
        ("not_finite", 20, [17]),
    ]


def test_gives_up_after_steps_in_a_row(tmp_path, sentences):
    config = config_for(tmp_path, sentences, faults={"max_skipped_steps": 6})
    _, error = run(config, before=BAD_LOSS.format(steps=range(8, 100)))
    assert error.exit_code == 7 and "8 steps in a row, at step 15" in error.problem
    # In the streak, but the weights are those of step 7: whole and worth going on from.
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000010\n"
    assert lines(tmp_path)[-1]["loss"] is None
    assert [fault["kind"] for fault in faults(tmp_path)] == ["not_finite", "not_finite", "gave_up"]
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    _, error = run(config, before=BAD_LOSS.format(steps=range(8, 100)))  # the count goes on from the checkpoint
    assert error.exit_code == 7 and "8 steps in a row, at step 15" in error.problem


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, sentences, zero_stage):
    """One number of one rank; the step before a save, so that no loss has seen it yet."""
    config = config_for(tmp_path, sentences, parallel={"zero_stage": zero_stage})
    before = """
advance = trainer._advance
def damage():
    advance()
    if trainer.position.step == 10 and trainer.rank == 1:
        weight = list(trainer.engine.engine.module.parameters())[-1]
        getattr(weight, "ds_tensor", weight).data.view(-1)[0] = float("nan")
trainer._advance = damage
"""
    _, error = run(config, before=before)
    assert error.exit_code == 7 and "a weight is not finite, at step 10" in error.problem
    assert not (tmp_path / "checkpoints" / "latest").exists()


def test_a_gradient_that_one_tensor_parallel_rank_alone_has_ends_the_run(tmp_path, sentences):
    """DeepSpeed's norm counts whole weights on the first of them only: the step is applied, the weight is hit."""
    config = config_for(tmp_path, sentences, model={"num_key_value_heads": 4}, parallel={TP: 2})
    before = """
def spoil(gradient):
    return gradient * float("nan") if trainer.position.step == 7 and trainer.rank == 1 else gradient
weights = trainer.engine.engine.module.named_parameters()
[weight for name, weight in weights if name.endswith("norm.weight")][-1].register_hook(spoil)
"""
    _, error = run(config, before=before)
    assert error.exit_code == 7 and "a weight is not finite, at step 10" in error.problem
    assert not (tmp_path / "checkpoints" / "latest").exists()


# Multiplies the last norm by 50 after step 23; the loss of step 24 is the first to see it. Notes who read which sample.
SPIKE = """
import deepspeed
from loopmem_pretrain.data.dataset import BlendedDataset
from loopmem_pretrain.training.master_state import set_state

advance, get, seen = trainer._advance, BlendedDataset.__getitem__, []

def spoil():
    advance()
    if trainer.position.step != 23 or (seen and {once}):
        return
    seen.append(23)
    for name, weight in trainer.engine.engine.module.named_parameters():
        if trainer.engine.public_names[name] == "model.norm.weight":
            with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                value = weight.detach().float() * 50
            set_state(weight, "fp32", value)

def note(self, sample):
    with open(trainer.run_dir.parent / f"samples-{{trainer.run_dir.name}}", "a") as file:
        file.write(f"{{trainer.position.step}} {{sample}}\\n")
    return get(self, sample)

trainer._advance, BlendedDataset.__getitem__ = spoil, note
"""
ONCE, ALWAYS = SPIKE.format(once=True), SPIKE.format(once=False)


def spiking(run_dir, data_dir, layout="dp2", precision="fp32", **sections):
    faults = {"spike_action": "rewind", "spike_window_steps": 16, "spike_patience_steps": 4}
    return config_for(
        run_dir,
        data_dir,
        model={"num_key_value_heads": 4},
        parallel=LAYOUTS[layout][0],
        training={"train_steps": 40, "precision": precision},
        checkpoint={"interval_steps": 5, **sections.get("checkpoint", {})},
        faults={**faults, **sections.get("faults", {})},
    )


def manifest(run_dir, step):
    return json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())


def samples_by_step(path, readers):
    """Samples read for each step when it was trained last, each by `readers` ranks."""
    table = {}
    for line in path.read_text().splitlines():
        step, sample = map(int, line.split())
        table.setdefault(step, []).append(sample)
    return {step: set(samples[-8 * readers :]) for step, samples in table.items()}


REWOUND = [("dp2 zero3", "bf16")]
ALSO = [
    ("dp2", "fp32"),
    ("dp2", "bf16"),
    ("dp2 zero2", "bf16"),
    ("dp2 zero3", "fp32"),
    ("tp2 pp2", "bf16"),
    ("tp2 zero3", "fp32"),
]


def leave_out_by_hand(run_dir):
    """Edit the checkpoint of step 20 to what a rewind to it leaves behind."""
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    edited = read_manifest(checkpoint)
    assert edited["position"] == {"step": 20, "samples": 160, "tokens": 20 * 8 * 16, "skipped_ranges": []}
    edited["position"] |= {"samples": 240, "skipped_ranges": [[160, 240]]}
    (checkpoint / "manifest.json").write_bytes(encode_manifest(edited))


@pytest.mark.parametrize("zero", ["zero1", pytest.param("zero2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_spike_is_rewound_to_a_checkpoint_of_other_ranks(tmp_path, sentences, zero, precision):
    """One rank goes back to what two saved, after it has trained: Adam's moments come back too."""
    layout = "dp2 zero2" if zero == "zero2" else "dp2"
    rewound, by_hand = (spiking(tmp_path / name, sentences, layout, precision) for name in ("rewound", "by_hand"))
    for config in (rewound, by_hand):
        assert run(config, 2, stop_at_step=20) == ("interrupted", None)
    leave_out_by_hand(tmp_path / "by_hand")
    assert run(rewound, 1, before=ONCE) == ("done", None)
    assert run(by_hand, 1) == ("done", None)
    assert [line["step"] for line in faults(tmp_path / "rewound")][-1:] == [20]
    assert exact(tmp_path / "rewound")[-2:] == exact(tmp_path / "by_hand")[-2:]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [*REWOUND, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALSO)],
    ids=lambda value: value.replace(" ", "-"),
)
def test_a_spike_is_rewound(tmp_path, sentences, layout, precision):
    """What follows is, bit for bit, what a fresh start from that checkpoint with the later samples does."""
    ranks = LAYOUTS[layout][1]
    rewound, by_hand = (spiking(tmp_path / name, sentences, layout, precision) for name in ("rewound", "by_hand"))
    # The spike is noticed at step 30, this start's last: it goes back and comes to step 30 again.
    assert run(rewound, ranks, before=ONCE, stop_at_step=30) == ("interrupted", None)
    assert run(rewound, ranks) == ("done", None)

    assert run(by_hand, ranks, stop_at_step=20) == ("interrupted", None)
    leave_out_by_hand(tmp_path / "by_hand")
    assert run(by_hand, ranks) == ("done", None)

    history, expected = exact(tmp_path / "rewound"), exact(tmp_path / "by_hand")
    assert [line["step"] for line in history] == [5, 10, 15, 20, 25, 30, 25, 30, 35, 40]
    assert history[:4] + history[6:] == expected
    assert history[5]["loss"] > 2 * history[3]["loss"] > 2 * history[-1]["loss"]
    last = manifest(tmp_path / "rewound", 40)
    assert last["position"] == {"step": 40, "samples": 400, "tokens": 40 * 8 * 16, "skipped_ranges": [[160, 240]]}
    for key in ("position", "statistics"):
        assert last[key] == manifest(tmp_path / "by_hand", 40)[key]
    read = samples_by_step(tmp_path / "samples-rewound", readers=1 if layout.startswith("dp") else ranks)
    for step in range(30):
        first = 8 * step + (80 if step >= 20 else 0)
        assert read[step] == set(range(first, first + 8)), step
    left = {path.name for path in (tmp_path / "rewound" / "checkpoints").iterdir()}
    assert "abandoned-step_00000025-at-20" in left
    spike, back = faults(tmp_path / "rewound")
    assert (spike["kind"], spike["first_step"], spike["last_step"], spike["samples"]) == ("spike", 24, 27, [184, 216])
    assert (back["kind"], back["from_step"], back["step"], back["samples"]) == ("rewind", 30, 20, [160, 240])


def test_a_spike_is_rewound_to_weights_that_gave_a_usual_loss(tmp_path, sentences):
    """The checkpoint of step 23 is from before the first high loss, 24, and it is the one that gives it."""
    config = spiking(tmp_path / "run", sentences, checkpoint={"interval_steps": 1, "keep_last": 20})
    assert run(config, 1, before=ONCE, stop_at_step=28) == ("interrupted", None)
    spike, back = faults(tmp_path / "run")
    assert (spike["first_step"], back["from_step"], back["step"]) == (24, 27, 22)


def test_what_was_left_out_stays_so_on_other_ranks(tmp_path, sentences):
    assert run(spiking(tmp_path / "run", sentences), before=ONCE, stop_at_step=30) == ("interrupted", None)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for name, ranks in (("run", 2), ("other", 1)):
        assert run(spiking(tmp_path / name, sentences), ranks, before=ONCE) == ("done", None)
    assert manifest(tmp_path / "run", 40)["position"] == manifest(tmp_path / "other", 40)["position"]
    same, other = lines(tmp_path / "run"), lines(tmp_path / "other")
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in same], rel=1e-4)


def test_rewinds_are_bounded(tmp_path, sentences):
    config = spiking(tmp_path / "run", sentences, faults={"max_rewinds": 2})
    _, error = run(config, before=ALWAYS)
    assert error.exit_code == 7 and "a loss spike after 2 rewinds to step 20" in error.problem
    kinds = [fault["kind"] for fault in faults(tmp_path / "run")]
    assert kinds == ["spike", "rewind", "spike", "rewind", "spike", "gave_up"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000020\n"
    # Each time other samples.
    ranges = [fault["samples"] for fault in faults(tmp_path / "run") if fault["kind"] == "rewind"]
    assert ranges == [[160, 240], [160, 320]]


def test_a_spike_with_nothing_to_go_back_to(tmp_path, sentences):
    config = spiking(tmp_path / "run", sentences, checkpoint={"interval_steps": 25})
    assert run(config, before=ONCE) == ("done", None)
    assert [fault["kind"] for fault in faults(tmp_path / "run")] == ["spike", "no_checkpoint"]


@pytest.mark.parametrize("action", ["off", "warn"])
def test_a_spike_may_be_left_alone(tmp_path, sentences, action):
    assert run(spiking(tmp_path / "run", sentences, faults={"spike_action": action}), before=ONCE) == ("done", None)
    assert [fault["kind"] for fault in faults(tmp_path / "run")] == (["spike"] if action == "warn" else [])
