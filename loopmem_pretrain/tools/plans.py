"""The ways to spread a model over a number of GPUs of a given memory, and which of them is best."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.load import differences
from loopmem_pretrain.config.preflight import tensor_parallel_sizes
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.tools.memory_plan import Layout, worst_stage
from loopmem_pretrain.tools.step_time import step_time

USABLE = 0.9  # of a GPU's memory: the rest is for CUDA and NCCL themselves, and for gaps between blocks
NODE = 8  # GPUs a tensor-parallel group may have where no cluster says how many a node has


class Plan(NamedTuple):
    """One way that fits."""

    layout: Layout
    stage: int
    """whose ranks need most memory"""
    bytes: int
    """what they need"""
    seconds: float | None
    """of a step, where a cluster is given"""

    def overrides(self, config: RunConfig) -> list[str]:
        """What to add to the command line for this plan."""
        changes = (line.split(": ", 1) for line in differences(config, self.layout.config))
        return [f"{key}={change.split(' -> ')[1].lower()}" for key, change in changes]


def plans(config: RunConfig, ranks: int, gpu_bytes: float, cluster: ClusterConfig | None = None) -> list[Plan]:
    """Every way that fits into USABLE of `gpu_bytes`, best first.

    With a cluster the fastest first. Without, what cuts the model least (TP x PP, then TP), and of that what computes
    least: no recomputation, low ZeRO stage, large micro-batches.
    """
    found = []
    for candidate in _candidates(config, ranks, cluster.gpus_per_node if cluster else NODE):
        try:
            layout = Layout.of(candidate, ranks)
        except ConfigError:  # the global batch does not divide
            continue
        stage, memory = worst_stage(layout)
        if memory.total <= USABLE * gpu_bytes:
            seconds = step_time(layout, cluster).total if cluster else None
            found.append(Plan(layout, stage, memory.total, seconds))
    return sorted(found, key=_rank)


def best_of_each_cut(found: list[Plan]) -> list[Plan]:
    """Of sorted plans, the first of each (TP, PP)."""
    best: dict[tuple[int, int], Plan] = {}
    for plan in found:
        parallel = plan.layout.config.parallel
        best.setdefault((parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size), plan)
    return list(best.values())


def _rank(plan: Plan) -> tuple[Any, ...]:
    parallel, training = plan.layout.config.parallel, plan.layout.config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    simplest = (
        tp * pp,
        tp,
        training.activation_checkpointing != "none",
        parallel.zero_stage,
        parallel.memory_placement != "replicated",
        -training.micro_batch_size,
        parallel.sequence_parallel,
    )
    return (plan.seconds or 0.0, *simplest)


def _candidates(config: RunConfig, ranks: int, node: int) -> Iterator[RunConfig]:
    """Every valid combination of sizes and switches; a tensor-parallel group stays within a node."""
    model, training = config.model, config.training
    tensor_sizes = [size for size in tensor_parallel_sizes(model) if ranks % size == 0 and size <= node]
    for tp in tensor_sizes:
        rest = ranks // tp
        for pp in (size for size in range(1, min(rest, model.num_hidden_layers) + 1) if rest % size == 0):
            samples = training.global_batch_size // (rest // pp)
            micro_batches = [size for size in range(1, samples + 1) if samples % size == 0]
            for sequence, placement, zero_stage, recompute, size in product(
                (False, True) if tp > 1 else (False,),
                ("replicated", "sharded") if tp > 1 else ("replicated",),
                (1, 2, 3) if pp == 1 else (1,),
                ("none", "loop"),
                micro_batches,
            ):
                parallel = config.parallel.model_copy(
                    update={
                        "tensor_model_parallel_size": tp,
                        "pipeline_model_parallel_size": pp,
                        "sequence_parallel": sequence,
                        "memory_placement": placement,
                        "zero_stage": zero_stage,
                    }
                )
                compile_ = training.compile if tp == 1 and zero_stage < 3 else "none"
                update = {"micro_batch_size": size, "activation_checkpointing": recompute, "compile": compile_}
                changed = {"parallel": parallel, "training": training.model_copy(update=update)}
                candidate = config.model_copy(update=changed)
                if not run_problems(candidate):
                    yield candidate
