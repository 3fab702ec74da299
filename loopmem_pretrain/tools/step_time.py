"""Time of a training step on a cluster, from FLOPs, volumes, latencies and bandwidths: a simulation, not a measurement.

What it assumes is ASSUMPTIONS, which the print-out repeats.
"""

import math
from typing import NamedTuple

from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.model.flops import (
    forward_flops_per_token,
    gate_flops,
    projection_flops,
    training_flops_per_token,
)
from loopmem_pretrain.parallel.stages import layers_of_stage
from loopmem_pretrain.tools.activations import WIDE, Sizes
from loopmem_pretrain.tools.communication import Traffic, data_parallel, pipeline, tensor_parallel, tied
from loopmem_pretrain.tools.memory_plan import Layout

ASSUMPTIONS = (
    "all kernels are equally efficient, whatever their size and whether compiled; every layer runs all its loops",
    "nothing overlaps: communication waits for computation, and computation for communication",
    "a group whose ranks do not fit into one node runs at a GPU's share of the network, which is never congested",
    "a collective of g ranks takes 2 log2(g) latencies, a message to a neighbour one",
    "the slowest pipeline stage sets the pace; filling and draining cost one micro-batch of every other stage",
    "loading data, checkpoints, logging, slow or failing nodes cost nothing",
)


class StepTime(NamedTuple):
    """Seconds of one step, by what the slowest stage does."""

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    """waiting for the pipeline to fill and drain"""
    data: float
    """data-parallel reduction and gathering, tied weights"""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Share of the pipeline's time in which a stage waits, where all are equally slow: (P - 1) / (M + P - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def transfer_time(traffic: Traffic, hops: int, spans_nodes: bool, cluster: ClusterConfig) -> float:
    """Seconds for messages that cost `hops` latencies each."""
    if spans_nodes:
        bandwidth, latency = cluster.inter_node_gb_per_s, cluster.inter_node_latency_us
    else:
        bandwidth, latency = cluster.intra_node_gb_per_s, cluster.intra_node_latency_us
    return traffic.bytes / (bandwidth * 1e9 * cluster.bandwidth_fraction) + traffic.messages * hops * latency * 1e-6


def collective_hops(ranks: int) -> int:
    """Latencies of one collective: 2 log2(ranks), as over a tree."""
    return 2 * math.ceil(math.log2(ranks))


def stage_flops(layout: Layout, stage: int) -> float:
    """Forward and backward FLOPs of one micro-batch on one rank of `stage`, recomputation included.

    Without sequence parallelism every tensor-parallel rank computes router, gates and reads of replicated banks for all
    tokens: only blocks, head and sharded banks are cut. Slots that are whole on every rank are projected by each.
    """
    s, model = Sizes.of(layout.config), layout.config.model
    forward = forward_flops_per_token(model, layout.config.data.seq_length)
    layers, passes = len(layers_of_stage(model, layout.bounds, stage)), 4 if s.recompute else 3
    reads = forward.local_reads + forward.global_reads
    banks, loops = bool(model.local_slots) + bool(model.global_slots), max(1, model.max_loops)
    gates = banks * gate_flops(model) * model.num_hidden_layers * loops
    cut_reads = reads - gates if s.sharded else 0
    projections = projection_flops(model, s.stream * loops, s.tensor_ranks if s.sharded else 1)
    search = forward.slot_search * (s.tokens / s.tensor_ranks if s.sharded else s.stream)
    everywhere = (forward.routers + reads - cut_reads) * s.stream
    of_layers = (forward.blocks + cut_reads) * s.tokens / s.tensor_ranks + everywhere
    head = 3 * forward.head * s.tokens / s.tensor_ranks if stage == layout.stages - 1 else 0.0
    of_layers = passes * of_layers + (passes - 2) * search
    # Slots are projected once a visit, outside of what is recomputed.
    return layers * (of_layers / model.num_hidden_layers + 3 * projections) + head


def step_time(layout: Layout, cluster: ClusterConfig) -> StepTime:
    """The step as its slowest stage sees it."""
    busy = [_busy_time(layout, stage, cluster) for stage in range(layout.stages)]
    each = []
    for stage, (compute, tensor, passing) in enumerate(busy):
        others = sum(sum(parts) for other, parts in enumerate(busy) if other != stage)
        bubble = others / layout.micro_batches
        each.append(StepTime(compute, tensor, passing, bubble, *_end_of_step(layout, stage, cluster)))
    return max(each, key=lambda time: time.total)


def _busy_time(layout: Layout, stage: int, cluster: ClusterConfig) -> tuple[float, float, float]:
    """Seconds of a stage for all micro-batches: computing, tensor-parallel collectives, passing to its neighbours."""
    ranks, node = layout.config.parallel.tensor_model_parallel_size, cluster.gpus_per_node
    flops = layout.micro_batches * stage_flops(layout, stage)
    # Ranks are numbered TP fastest, then DP, then PP: a neighbour in the pipeline is TP x DP ranks away.
    return (
        flops / (cluster.peak_tflops * 1e12 * cluster.achievable_fraction),
        transfer_time(tensor_parallel(layout, stage), collective_hops(ranks), ranks > node, cluster),
        transfer_time(pipeline(layout, stage), 1, layout.ranks > node, cluster),
    )


def _end_of_step(layout: Layout, stage: int, cluster: ClusterConfig) -> tuple[float, float]:
    """Seconds of a stage once a step: reducing and gathering over data-parallel ranks and tied stages, and AdamW."""
    node = cluster.gpus_per_node
    far_data = layout.config.parallel.tensor_model_parallel_size * layout.data_ranks > node
    data = transfer_time(data_parallel(layout, stage), collective_hops(layout.data_ranks), far_data, cluster)
    data += transfer_time(tied(layout, stage), collective_hops(layout.stages), layout.ranks > node, cluster)
    # AdamW reads gradient, master weight and moments and writes all but the gradient, in float32.
    own = layout.parameters(stage) / layout.data_ranks
    return data, 7 * WIDE * own / (cluster.memory_gb_per_s * 1e9)


def tokens_per_step(layout: Layout) -> int:
    return layout.config.training.global_batch_size * layout.config.data.seq_length


def mfu(layout: Layout, seconds: float, cluster: ClusterConfig) -> float:
    """Model FLOPs utilisation: 3 x forward of all loops, recomputation not counted, of the peak of all GPUs."""
    config = layout.config
    per_token = training_flops_per_token(config.model, config.data.seq_length, config.training.micro_batch_size)
    return per_token * tokens_per_step(layout) / (seconds * layout.ranks * cluster.peak_tflops * 1e12)
