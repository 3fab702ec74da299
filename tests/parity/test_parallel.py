"""Every mix of tensor, pipeline, data and sequence parallelism against one plain process, in float32.

Five optimizer steps: losses, gradient norms, the gradients of the first step, parameters, statistics, the loss of
validation. `make test` runs a subset of the matrix in which every pair of choices occurs; `make test-all` the full
product, 3,696 runs, which take some two hours on two cores; with LOOPMEM_SHARD=2/7 the second seventh of it, so that
machines can share it.
"""

import itertools
import math
import os
from functools import lru_cache
from typing import Any

import pytest
import torch

from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.parallel.placement import part_of, placement
from tests.configs import tiny_run
from tests.distributed import run_ranks
from tests.parity.test_engines import STEPS, batches, make_engine, reference


def train_on_rank(rank, world_size, config):
    """Five steps; gradients of the first one are caught as the engine sees them, then summed over data ranks."""
    import torch.distributed as dist

    engine = make_engine(config)
    topology = engine.topology
    gradients: dict[str, torch.Tensor] = {}
    handles = []
    named = {engine.public_names[name]: parameter for name, parameter in engine.engine.module.named_parameters()}
    for name, parameter in named.items():
        gradients[name] = torch.zeros(parameter.shape) if config.parallel.zero_stage < 3 else None

        def catch(gradient, name=name):
            known = gradients[name]
            gradients[name] = gradient.clone() if known is None else known + gradient

        handles.append(parameter.register_hook(catch))
    losses, norms = [], []
    for step in range(STEPS):
        engine.step_context.accumulator.read_and_reset()
        mine = batches(config, step)[topology.data_rank :: topology.data_size]
        losses.append(float(engine.train_batch(iter(mine), step)))
        norms.append(engine.grad_norm())
        for handle in handles:
            handle.remove()
        handles = []
    stats = engine.step_context.accumulator.read_and_reset()
    # The pipeline engine divides by the accumulation steps before the backward pass, the plain one too.
    for name in sorted(gradients):
        dist.all_reduce(gradients[name], group=topology.groups["data"])
        gradients[name] /= topology.data_size
        if config.parallel.zero_stage == 1 and placement(name, config.parallel).partial:
            dist.all_reduce(gradients[name], group=topology.groups["tensor"])  # the engine does so at the end of a step
    if topology.pipeline_size > 1:  # tied parameters: the sum over the stages that hold them
        stages = [None] * topology.pipeline_size
        dist.all_gather_object(stages, gradients, group=topology.groups["pipeline"])
        for name in gradients:
            gradients[name] = sum(stage[name] for stage in stages if name in stage)
    parameters = {}
    import deepspeed

    for name, parameter in named.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=config.parallel.zero_stage == 3):
            parameters[name] = parameter.detach().clone()
    mine = batches(config, 99)[topology.data_rank :: topology.data_size]
    validation = float(engine.evaluate(iter(mine), len(mine)))
    return {
        "tensor_rank": topology.tensor_rank,
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": parameters,
        "stats": stats,
        "scales": engine.step_scales(),
        "validation": validation,
    }


@lru_cache(maxsize=8)  # see EVERYTHING
def expected(config_json):
    from loopmem_pretrain.config.run import RunConfig

    return reference(RunConfig.model_validate_json(config_json))


def check(config, world_size):
    plain = config.model_copy(update={"parallel": tiny_run().parallel})
    losses, norms, expected_loops, parameters, gradients = expected(plain.model_dump_json())
    # Which slots a read chooses is a jump: where two are equally good to within rounding, two runs may choose
    # differently. Among some ten thousand choices that happens now and then, after the first step.
    later, later_norms, drift = (1e-5, 1e-5, 1e-2) if config.model.retrieval == "dense" else (1e-3, 1e-2, 1.0)
    model = LoopMemLM(config.model, TorchBackend())
    model.load_state_dict(parameters)
    with torch.no_grad():
        held_out = [model(*micro_batch).cross_entropy.item() for micro_batch in batches(plain, 99)]
    scales = [value for name, value in parameters.items() if name.endswith("step_scales")]
    seen = set()
    for result in run_ranks("tests.parity.test_parallel:train_on_rank", world_size, config):
        # One other slot for one token moves a gradient norm by some 1e-3, ten times more than a loss.
        for seen_values, values, rel in ((result["losses"], losses, later), (result["norms"], norms, later_norms)):
            assert seen_values[0] == pytest.approx(values[0], rel=1e-5)
            assert seen_values == pytest.approx(values, rel=rel)
        if config.model.max_loops:
            torch.testing.assert_close(
                torch.tensor(result["stats"]["expected_loops"]), expected_loops, rtol=later, atol=1e-6
            )
            # Of all layers, whichever stage holds them.
            close(torch.tensor(result["scales"]), torch.stack(scales), None, drift * config.optimizer.lr, "step scales")
        assert result["validation"] == pytest.approx(sum(held_out) / len(held_out), rel=later)
        for name, value in result["parameters"].items():
            seen.add(name)
            part = part_of(name, value.shape, config.parallel, result["tensor_rank"], config.model.vocab_size)
            largest = gradients[name].abs().max().item()
            # A gradient that is zero in theory (LN_k's bias) is rounding noise, judged against the whole norm.
            limit = 1e-5 * max(largest, 1e-3 * norms[0])
            close(result["gradients"][name], gradients[name], part, limit, f"gradient of {name}")
            close(value, parameters[name], part, drift * config.optimizer.lr, name)
    assert seen == set(gradients)


def close(value, whole, part, limit, what):
    """`value` is the given part of `whole`, and zero where it is padding."""
    if part is not None:
        size = max(0, min(value.shape[part.dimension], part.whole - part.first))
        padding = value.narrow(part.dimension, size, value.shape[part.dimension] - size)
        assert not padding.any(), f"{what}: padding is not zero"
        value, whole = value.narrow(part.dimension, 0, size), whole.narrow(part.dimension, part.first, size)
    if not (value - whole).abs().max() <= limit:  # assert_close says more and takes ten times longer
        torch.testing.assert_close(value, whole, rtol=0, atol=limit, msg=lambda m: f"{what}: {m}")
        raise AssertionError(f"{what}: further than {limit} from the plain process's")


# ---- the matrix ------------------------------------------------------------------------------------------------------

LAYOUTS = {  # tensor, pipeline, data-parallel size
    "tp2": (2, 1, 1),
    "tp4": (4, 1, 1),
    "pp2": (1, 2, 1),
    "pp4": (1, 4, 1),
    "tp2-pp2": (2, 2, 1),
    "tp2-dp2": (2, 1, 2),
    "pp2-dp2": (1, 2, 2),
    "tp2-pp2-dp2": (2, 2, 2),
    "dp3": (1, 1, 3),
}
PARALLEL_AXES = {"layout": list(LAYOUTS), "zero": [1, 2, 3], "sp": [False, True], "banks": ["replicated", "sharded"]}
MODEL_AXES = {
    "retrieval": ["dense", "topk", "product_keys"],
    "kv_heads": [4, 2],
    "loops": [3, 1],
    "accumulation": [4, 1],
    "vocab": [96, 97],
    "tied": [False, True],
}
Case = dict[str, Any]


def is_offered(case: Case) -> bool:
    """What the preflight lets pass, and no value twice under two names."""
    tensor, pipeline, _ = LAYOUTS[case["layout"]]
    return (
        (case["zero"] == 1 or pipeline == 1)
        and (tensor > 1 or not (case["sp"] or case["banks"] == "sharded"))
        and case.get("kv_heads", 4) % tensor == 0
        and case.get("accumulation", 4) >= pipeline
    )


def product(axes: dict[str, list[Any]]) -> list[Case]:
    """Every combination that is offered."""
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [case for case in cases if is_offered(case)]


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(case.items(), 2))


def covering(cases: list[Case]) -> list[Case]:
    """A small subset in which every pair of values that occurs in `cases` occurs; greedy, always the same."""
    table = [(pairs(case), case) for case in cases]
    open_pairs = set().union(*(found for found, _ in table))
    chosen = []
    while open_pairs:
        found, best = max(table, key=lambda entry: len(entry[0] & open_pairs))
        chosen.append(best)
        open_pairs -= found
    return chosen


def shard(text: str) -> list[Case]:
    """Part k of n ("k/n") of the full product.

    Runs that are compared with the same plain process stand together, and it runs once for them.
    """
    part, parts = (int(number) for number in text.split("/"))
    models = [dict(zip(MODEL_AXES, values, strict=True)) for values in itertools.product(*MODEL_AXES.values())]
    own = models[part - 1 :: parts]
    return [model | case for model in own for case in product(PARALLEL_AXES) if is_offered(model | case)]


EVERYTHING = shard(os.environ.get("LOOPMEM_SHARD", "1/1"))
COVERING = covering(product(PARALLEL_AXES | MODEL_AXES))


def run_of(case: Case):
    tensor, pipeline, data = LAYOUTS[case["layout"]]
    parallel = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "zero_stage": case["zero"],
        "sequence_parallel": case["sp"],
        "memory_placement": case["banks"],
    }
    model = {
        "num_hidden_layers": {1: 2, 2: 3, 4: 4}[pipeline],  # two stages are not equally long
        "num_key_value_heads": case["kv_heads"],
        "max_loops": case["loops"],
        "ponder_weight": 0.05 if case["loops"] > 1 else 0.0,
        "vocab_size": case["vocab"],
        "tie_word_embeddings": case["tied"],
        "retrieval": case["retrieval"],
        "global_slots": 16,
    }
    if case["retrieval"] != "dense":
        model["retrieval_topk"] = 3
    training = {"global_batch_size": 2 * data * case["accumulation"], "micro_batch_size": 2}
    # With eps 1e-8 Adam would turn the rounding noise of gradients next to zero (LN_k's bias, slots that hardly any
    # token reads) into steps of the learning rate's size, and with `topk` another slot might then be the k-th best.
    return tiny_run(parallel=parallel, training=training, model=model, optimizer={"lr": 1e-2, "eps": 1e-5})


def name_of(case: Case) -> str:
    return " ".join(str(case[key]) if isinstance(case[key], str) else f"{key}={case[key]}" for key in case)


@pytest.mark.parametrize("case", COVERING, ids=name_of)
def test_every_pair_of_choices(case):
    check(run_of(case), math.prod(LAYOUTS[case["layout"]]))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYTHING, ids=name_of)
def test_everything(case):
    check(run_of(case), math.prod(LAYOUTS[case["layout"]]))


ATTENTION = {
    "normalised before": ("tp2", {"head_dim": 12, "qk_norm": "before_rope", "attention_bias": "qkv"}),
    "not normalised": ("tp2-pp2", {"head_dim": 6, "qk_norm": "none", "attention_bias": "all"}),
    "zero 3": ("tp2-dp2", {"qk_norm": "before_rope", "attention_bias": "all"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_other_attention(name):
    layout, fields = ATTENTION[name]
    zero = 3 if name == "zero 3" else 1
    config = run_of(COVERING[0] | {"layout": layout, "zero": zero, "sp": True, "kv_heads": 2, "retrieval": "dense"})
    model = config.model.model_copy(update=fields)
    check(config.model_copy(update={"model": model}), math.prod(LAYOUTS[layout]))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("how", ["offloaded", "recomputed"])
def test_tensor_parallel_with_recomputation_and_offloading(zero, how):
    config = run_of(COVERING[0] | {"layout": "tp2-dp2", "zero": zero, "sp": True, "banks": "sharded", "tied": True})
    parallel, training = config.parallel, config.training
    if how == "offloaded":
        parallel = parallel.model_copy(update={"offload_optimizer": "cpu"})
    else:
        training = training.model_copy(update={"activation_checkpointing": "loop"})
    check(config.model_copy(update={"parallel": parallel, "training": training}), 4)


@pytest.mark.slow
def test_compiled_loops_in_a_pipeline():
    config = run_of(COVERING[0] | {"layout": "pp2"})
    check(config.model_copy(update={"training": config.training.model_copy(update={"compile": "loop"})}), 2)


def test_the_covering_cases_use_every_value_with_every_other():
    for axis, values in (PARALLEL_AXES | MODEL_AXES).items():
        assert {case[axis] for case in COVERING} == set(values), axis
    everything = product(PARALLEL_AXES | MODEL_AXES)
    assert set().union(*map(pairs, COVERING)) == set().union(*map(pairs, everything))
    assert len(COVERING) < 40 < len(everything)
    parts = [case for part in range(1, 8) for case in shard(f"{part}/7")]
    assert sorted(map(name_of, parts)) == sorted(map(name_of, shard("1/1")))
    assert {frozenset(case.items()) for case in parts} == {frozenset(case.items()) for case in everything}
    assert len(parts) == len(everything)
