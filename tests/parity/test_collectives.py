"""How many collectives a visit of a looped layer costs: counted by torch's profiler, equal to docs/parallelism.md."""

from collections import Counter

import pytest
import torch

from tests.configs import tiny_run
from tests.distributed import run_ranks

KINDS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
}


def counted(profile) -> Counter:
    return Counter({KINDS[e.key]: e.count for e in profile.key_averages() if e.key in KINDS})


def one_visit(rank, world_size, config):
    """Collectives of one forward, and of one backward pass through one layer; parameters' own hooks counted apart."""
    from loopmem_pretrain.model.init import initialize
    from loopmem_pretrain.model.loopmem import make_layer
    from loopmem_pretrain.model.memory import SharedMemory
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import init_distributed, make_backend, prepare_parameters

    init_distributed(torch.device("cpu"), config.parallel)
    topology = Topology.join(config.parallel)
    backend = make_backend(config.model, config.parallel, topology)
    layer, memory = make_layer(config.model, backend, 0), SharedMemory(config.model, backend)
    module = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"memory": memory, "layer": layer})})
    names = {name: name.replace("model.layer.", "model.layers.0.") for name, _ in module.named_parameters()}
    initialize([(names[name], parameter) for name, parameter in module.named_parameters()], config.model, 1)
    tokens = config.data.seq_length // (world_size if config.parallel.sequence_parallel else 1)
    hidden = torch.randn(2, tokens, config.model.hidden_size, requires_grad=True)
    counts = []
    for hooks in (False, True):
        if hooks:
            prepare_parameters(module, names, config.parallel, topology.groups["tensor"])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
            output, _ = layer(hidden, memory())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
            output.sum().backward()
        counts += [counted(forward), counted(backward)]
    return counts[0], counts[1], counts[3] - counts[1]


# For each loop, forward and backward; for the visit, backward: P of each bank, which a rank applies to its own slots;
# hooks: one for each parameter whose gradient is partial on a rank, once a backward pass with ZeRO 2 and 3 (the
# pipeline engine does the same once a step).
DESIGN = [
    ({}, {"all-reduce": 2}, {"all-reduce": 2}, 0, 2),
    ({"memory_placement": "sharded"}, {"all-reduce": 4}, {"all-reduce": 3}, 2, 4),
    (
        {"sequence_parallel": True},
        {"all-gather": 2, "reduce-scatter": 2},
        {"all-gather": 2, "reduce-scatter": 2},
        0,
        23,
    ),
    (
        {"sequence_parallel": True, "memory_placement": "sharded"},
        {"all-gather": 3, "reduce-scatter": 3, "all-reduce": 1},
        {"all-gather": 3, "reduce-scatter": 3},
        0,
        19,
    ),
]


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize(("parallel", "forward", "backward", "visit", "hooks"), DESIGN, ids=lambda value: str(value))
def test_as_designed(parallel, forward, backward, visit, hooks, loops):
    model = {"max_loops": loops, "ponder_weight": 0.0}
    config = tiny_run(model=model, parallel={"tensor_model_parallel_size": 2, **parallel})
    for seen in run_ranks("tests.parity.test_collectives:one_visit", 2, config):
        assert seen[0] == {kind: count * loops for kind, count in forward.items()}
        expected = Counter({kind: count * loops for kind, count in backward.items()}) + Counter({"all-reduce": visit})
        assert seen[1] == expected
        assert seen[2] == {"all-reduce": hooks}


def zero3_step(rank, world_size, config):
    from tests.parity.test_engines import batches, make_engine

    engine = make_engine(config)
    micro_batches = batches(config, 0)[rank::world_size]
    engine.train_batch(iter(micro_batches), 0)  # DeepSpeed's first step is for finding the order of things
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train_batch(iter(micro_batches), 1)
    return counted(profile)


def test_zero3_gathers_a_layer_once_a_visit_however_many_loops():
    counts = []
    for loops in (1, 3):
        model = {"max_loops": loops, "ponder_weight": 0.0, "hidden_size": 128, "intermediate_size": 256}
        config = tiny_run(model=model, parallel={"zero_stage": 3})
        counts.append(run_ranks("tests.parity.test_collectives:zero3_step", 2, config)[0])
    assert counts[0]["all-gather"] == counts[1]["all-gather"] > 0
    assert counts[0] == counts[1]
