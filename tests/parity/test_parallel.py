"""Every mix of tensor, pipeline, data and sequence parallelism against one plain process, in float32.

Five optimizer steps: losses, gradient norms, the gradients of the first step, parameters and statistics. `make test`
runs a covering subset of the matrix, `make test-all` the full product.
"""

from functools import lru_cache

import pytest
import torch

from loopmem_pretrain.parallel.placement import part_of
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


@lru_cache(maxsize=4)
def expected(config_json):
    from loopmem_pretrain.config.run import RunConfig

    return reference(RunConfig.model_validate_json(config_json))


def check(config, world_size):
    plain = config.model_copy(update={"parallel": tiny_run().parallel})
    losses, norms, expected_loops, parameters, gradients = expected(plain.model_dump_json())
    seen = set()
    for result in run_ranks("tests.parity.test_parallel:train_on_rank", world_size, config):
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(norms), rtol=1e-5, atol=0)
        if config.model.max_loops:
            torch.testing.assert_close(
                torch.tensor(result["stats"]["expected_loops"]), expected_loops, rtol=1e-5, atol=1e-6
            )
        for name, value in result["parameters"].items():
            seen.add(name)
            part = part_of(name, value.shape, config.parallel, result["tensor_rank"], config.model.vocab_size)
            largest = gradients[name].abs().max().item()
            # A gradient that is zero in theory (LN_k's bias) is rounding noise, judged against the whole norm.
            limit = 1e-5 * max(largest, 1e-3 * norms[0])
            close(result["gradients"][name], gradients[name], part, limit, f"gradient of {name}")
            limit = STEPS * config.optimizer.lr if name.endswith("key_norm.bias") else 2e-4
            close(value, parameters[name], part, limit, name)
    assert seen == set(gradients)


def close(value, whole, part, limit, what):
    """`value` is the given part of `whole`, and zero where it is padding."""
    if part is not None:
        size = max(0, min(value.shape[part.dimension], part.whole - part.first))
        padding = value.narrow(part.dimension, size, value.shape[part.dimension] - size)
        assert not padding.any(), f"{what}: padding is not zero"
        value, whole = value.narrow(part.dimension, 0, size), whole.narrow(part.dimension, part.first, size)
    torch.testing.assert_close(value, whole, rtol=0, atol=limit, msg=lambda m: f"{what}: {m}")


def run(tp=1, pp=1, dp=1, zero=1, sp=False, banks="replicated", accumulation=2, **model):
    """The tiny model of four layers on tp x pp x dp ranks."""
    layers = {"num_hidden_layers": 4}
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "zero_stage": zero,
        "sequence_parallel": sp,
        "memory_placement": banks,
    }
    training = {"global_batch_size": 2 * dp * accumulation, "micro_batch_size": 2}
    return tiny_run(parallel=parallel, training=training, model=layers | model)


CASES = {
    "tp2": {"tp": 2},
    "tp2-sharded": {"tp": 2, "banks": "sharded"},
    "tp2-sp": {"tp": 2, "sp": True},
    "tp2-sp-sharded": {"tp": 2, "sp": True, "banks": "sharded"},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case):
    settings = CASES[case]
    config = run(**settings)
    world_size = settings.get("tp", 1) * settings.get("pp", 1) * settings.get("dp", 1)
    check(config, world_size)
