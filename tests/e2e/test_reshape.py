"""A run saved on some ranks goes on with others: the same samples, the same losses, the same weights and moments."""

import pytest
import torch

from loopmem_pretrain.checkpoint.universal import fp32_weights
from tests.e2e.test_training import config_for, exact, lines, run

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS = {
    "one": ({}, 1),
    "dp2": ({}, 2),
    "dp3": ({}, 3),
    "tp2": ({TP: 2}, 2),
    "tp2 sp": ({TP: 2, "sequence_parallel": True}, 2),
    "tp2 sharded": ({TP: 2, "memory_placement": "sharded"}, 2),
    "tp4 sharded sp": ({TP: 4, "memory_placement": "sharded", "sequence_parallel": True}, 4),
    "pp2": ({PP: 2}, 2),
    "pp4": ({PP: 4}, 4),
    "tp2 pp2": ({TP: 2, PP: 2}, 4),
    "dp2 zero2": ({"zero_stage": 2}, 2),
    "dp3 zero3": ({"zero_stage": 3}, 3),
    "tp2 dp2 zero3": ({TP: 2, "zero_stage": 3}, 4),
    "tp2 zero3": ({TP: 2, "zero_stage": 3, "memory_placement": "sharded"}, 2),
}


def config(run_dir, data_dir, parallel, precision="fp32"):
    return config_for(
        run_dir,
        data_dir,
        model={"num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": 321},
        parallel=parallel,
        training={"train_steps": 4, "precision": precision, "global_batch_size": 12, "micro_batch_size": 2},
        # With eps 1e-8 Adam would make whole steps of the rounding noise of gradients that are next to zero.
        optimizer={"lr": 1e-2, "eps": 1e-5},
        checkpoint={"interval_steps": 2},
        logging={"interval_steps": 1, "peak_tflops": 0.05},
        validation={"interval_steps": 2, "num_samples": 12},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, sentences):
    """Four steps on one rank, by precision."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for precision in ("fp32", "bf16"):
        run(config(folder / precision, sentences, {}, precision), 1)
    return folder


PAIRS = [
    ("tp2 pp2", "one", "fp32"),
    ("one", "tp2 dp2 zero3", "fp32"),
    ("dp3 zero3", "tp2 sharded", "bf16"),
]
ALSO = [("tp2 sharded", "pp2", "fp32"), ("dp3 zero3", "tp2 sp", "fp32"), ("tp2 zero3", "dp2 zero2", "fp32")]
BF16 = [("tp2 pp2", "dp3 zero3", "bf16"), ("dp2 zero2", "tp2 pp2", "bf16"), ("one", "tp2 dp2 zero3", "bf16")]
# A layout is right with every other if it writes the right merged form and reads one rightly.
THERE = [("one", layout, "fp32") for layout in LAYOUTS if layout != "one"]
BACK = [(layout, "one", "fp32") for layout in LAYOUTS if layout != "one"]
SLOW = [pair for pair in (*ALSO, *BF16, *THERE, *BACK) if pair not in PAIRS]


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
    ids=lambda value: value.replace(" ", "-"),
)
def test_goes_on_at_another_size(tmp_path, sentences, undisturbed, before, after, precision):
    run_dir, reference = tmp_path / "run", undisturbed / precision
    (first, ranks), (second, other_ranks) = LAYOUTS[before], LAYOUTS[after]
    assert run(config(run_dir, sentences, first, precision), ranks, stop_at_step=2) == ("interrupted", None)
    assert run(config(run_dir, sentences, second, precision), other_ranks) == ("done", None)

    relative = 1e-5 if precision == "fp32" else 1e-2
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3, 4]
    for line, expected in zip(lines(run_dir), lines(reference), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=relative)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * relative)
        assert line["lr"] == expected["lr"]
    weights, expected = (dict(fp32_weights(path / "checkpoints" / "step_00000004")) for path in (run_dir, reference))
    for name, value in weights.items():
        limit = 1e-4 if precision == "fp32" else 3e-2
        torch.testing.assert_close(value, expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"latest", "step_00000002", "step_00000004"}


def test_stages_that_share_out_a_tied_bank_differently(tmp_path, sentences):
    """Two of three layers on the first stage: LN_q is on its first data-parallel rank, elsewhere on the second."""

    def uneven(run_dir, parallel):
        values = config(tmp_path / run_dir, sentences, parallel)
        return values.model_copy(
            update={"model": values.model.model_copy(update={"num_hidden_layers": 3, "global_slots": 16})}
        )

    run(uneven("whole", {}), 1)
    run(uneven("run", {PP: 2}), 4, stop_at_step=2)
    assert run(uneven("run", {}), 1) == ("done", None)
    for line, expected in zip(lines(tmp_path / "run"), lines(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_there_and_back_changes_nothing(tmp_path, sentences):
    """Weights and moments survive the detour bit for bit: what follows is as if it had not been."""
    straight, detour = tmp_path / "straight", tmp_path / "detour"
    for run_dir in (straight, detour):
        run(config(run_dir, sentences, {}), 2, stop_at_step=2)
    run(config(straight, sentences, {}), 2)
    # Loaded on four ranks, saved at once: stopping at the step already reached writes no step of its own.
    before = "trainer.saver.save(wait=True)"
    run(config(detour, sentences, {TP: 2, PP: 2}), 4, stop_at_step=2, before=before)
    run(config(detour, sentences, {}), 2)
    assert exact(detour) == exact(straight)


def test_merging_may_take_longer_than_a_collective(tmp_path, sentences):
    run(config(tmp_path / "run", sentences, {}), 2, stop_at_step=2)
    slowly = """
import time, loopmem_pretrain.checkpoint.state as state
merge = state.merge
state.merge = lambda *where: (time.sleep(6), merge(*where))[1]
"""
    patient = {TP: 2, "collective_timeout_seconds": 4}
    assert run(config(tmp_path / "run", sentences, patient), 2, first=slowly) == ("done", None)


def test_another_cut_of_the_pipeline(tmp_path, sentences):
    """The cut follows from a formula, which another version of the package may have improved."""
    run(config(tmp_path / "run", sentences, {PP: 2}), 2, stop_at_step=2)
    other = """
import loopmem_pretrain.training.engine as engine
engine.stage_bounds = lambda *sizes: [0, 7, 11]
"""
    assert run(config(tmp_path / "run", sentences, {PP: 2}), 2, first=other) == ("done", None)


def test_another_order_of_parameter_groups(tmp_path, sentences, undisturbed):
    """DeepSpeed numbers them; the order of earlier versions made ZeRO 2 reduce gradients in float32."""
    zero2 = config(tmp_path / "run", sentences, {"zero_stage": 2}, "bf16")
    earlier = """
import loopmem_pretrain.training.engine as engine
ours = engine.make_optimizer
def other_order(*arguments):
    optimizer = ours(*arguments)
    optimizer.param_groups.sort(key=lambda group: group["params"][0].dtype == torch.bfloat16)
    return optimizer
engine.make_optimizer, engine.GROUP_ORDER = other_order, "float32 first"
"""
    run(zero2, 2, stop_at_step=2, first=f"import torch{earlier}")
    assert run(zero2, 2) == ("done", None)
    for line, expected in zip(lines(tmp_path / "run"), lines(undisturbed / "bf16"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
