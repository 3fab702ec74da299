"""Bytes that one rank sends in one training step, by kind of parallelism, and how many collectives that takes.

Collectives run as rings: of g ranks, each sends (g - 1) / g of the tensor in an all-gather or a reduce-scatter, and
twice that in an all-reduce, which is the two after each other.
"""

from typing import NamedTuple

from loopmem_pretrain.parallel.placement import placement
from loopmem_pretrain.parallel.stages import layers_of_stage
from loopmem_pretrain.tools.activations import WIDE, Sizes
from loopmem_pretrain.tools.memory_plan import Layout
from loopmem_pretrain.tools.weights import local_numel, shared_weights


class Traffic(NamedTuple):
    """What one rank sends in a step."""

    bytes: float
    messages: int
    """Collectives, or sends to a neighbour."""

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(self.bytes + other.bytes, self.messages + other.messages)

    def times(self, count: int) -> "Traffic":
        return Traffic(self.bytes * count, self.messages * count)


NOTHING = Traffic(0, 0)


def all_reduce(size: int, ranks: int) -> Traffic:
    """Sum a tensor of `size` bytes; every rank has the whole sum."""
    return Traffic(2 * size * (ranks - 1) / ranks, 1) if ranks > 1 else NOTHING


def gather_or_scatter(size: int, ranks: int) -> Traffic:
    """All-gather or reduce-scatter of a tensor that is `size` bytes when whole."""
    return Traffic(size * (ranks - 1) / ranks, 1) if ranks > 1 else NOTHING


def tensor_parallel_loop(layout: Layout) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one loop of a layer and one micro-batch.

    Attention and feed-forward each enter and leave: without sequence parallelism an all-reduce when leaving and one
    when entering in the backward pass, with it an all-gather and a reduce-scatter in both passes. A read of sharded
    banks adds the query, one maximum and one sum.
    """
    s, ranks = Sizes.of(layout.config), layout.config.parallel.tensor_model_parallel_size
    sequence = layout.config.parallel.sequence_parallel
    hidden = s.bytes * s.tokens * s.model.hidden_size
    once = gather_or_scatter(hidden, ranks)
    forward = once.times(4) if sequence else all_reduce(hidden, ranks).times(2)
    backward = forward
    banks = bool(s.model.local_slots) + bool(s.model.global_slots)
    if s.sharded and banks:
        sums = WIDE * s.tokens * banks * (s.model.hidden_size + 1)
        forward += all_reduce(s.bytes * s.tokens * banks, ranks)  # maxima
        if sequence:
            forward += once + gather_or_scatter(sums, ranks)
            backward += once + gather_or_scatter(sums, ranks)
        else:
            forward += all_reduce(sums, ranks)
            backward += all_reduce(hidden, ranks)
        if s.model.retrieval == "topk" and s.model.global_slots:
            candidates = min(s.model.retrieval_topk, s.slots(s.model.global_slots))
            forward += gather_or_scatter(s.bytes * s.tokens * candidates * ranks, ranks)
    return forward, backward


def tensor_parallel(layout: Layout, stage: int) -> Traffic:
    """All collectives over tensor-parallel ranks of one step on one rank of `stage`."""
    config, ranks = layout.config, layout.config.parallel.tensor_model_parallel_size
    if ranks == 1:
        return NOTHING
    s, sequence = Sizes.of(config), config.parallel.sequence_parallel
    hidden = s.bytes * s.tokens * s.model.hidden_size
    once = gather_or_scatter(hidden, ranks)
    forward, backward = tensor_parallel_loop(layout)
    layers = len(layers_of_stage(s.model, layout.bounds, stage))
    total = (forward.times(2 if s.recompute else 1) + backward).times(layers * max(1, s.model.max_loops))
    if s.sharded and not sequence:  # the gradient of a P that was applied to slots, once a visit
        total += all_reduce(s.bytes * s.model.hidden_size**2, ranks).times(
            layers * sum(s.projected(slots) for slots in s.banks)
        )
    if stage == 0:  # embedding
        total += once.times(2) if sequence else all_reduce(hidden, ranks)
    if stage == layout.stages - 1:  # head, and three numbers a token of the cross-entropy
        total += once.times(2) if sequence else all_reduce(hidden, ranks)
        total += all_reduce(WIDE * s.tokens, ranks).times(3)
    # Gradients that each rank sees a part of: summed in float32 once a step by the pipeline engine, else in the
    # working type once a backward pass.
    once_a_step = config.parallel.zero_stage == 1
    partial = NOTHING
    for weight in layout.weights(stage):
        if placement(weight.name, config.parallel).partial:
            elements = local_numel(weight, config.parallel) // weight.copies
            partial += all_reduce((WIDE if once_a_step else s.bytes) * elements, ranks).times(weight.copies)
    return total.times(layout.micro_batches) + partial.times(1 if once_a_step else layout.micro_batches)


def pipeline(layout: Layout, stage: int) -> Traffic:
    """Activations to the next stage and gradients to the one before."""
    s = Sizes.of(layout.config)
    neighbours = (stage > 0) + (stage < layout.stages - 1)
    return Traffic(s.bytes * s.stream * s.model.hidden_size, 1).times(neighbours * layout.micro_batches)


def tied(layout: Layout, stage: int) -> Traffic:
    """Gradients of parameters that several stages hold, once a step in float32: the shared memory, a tied embedding.

    Without bf16 they go to the first data-parallel rank before that (training/pipeline_engine.py).
    """
    parallel, stages = layout.config.parallel, layout.stages
    held = []
    if stages > 1:
        held += [(weight, stages) for weight in shared_weights(layout.config.model)]
    if stages > 1 and layout.config.model.tie_word_embeddings and stage in (0, stages - 1):
        held += [(weight, 2) for weight in layout.weights(stage) if "embed_tokens" in weight.name]
    total = NOTHING
    for weight, copies in held:
        size = WIDE * local_numel(weight, parallel)
        total += all_reduce(size, copies)
        if layout.config.training.precision == "fp32" and layout.data_ranks > 1:
            total += Traffic(size, 1)
    return total


def data_parallel(layout: Layout, stage: int) -> Traffic:
    """Gradients and weights over data-parallel ranks.

    ZeRO 1 all-reduces the step's float32 sums once and gathers the new weights. ZeRO 2 all-reduces the gradients of
    every micro-batch (DeepSpeed's default, though each rank keeps only its share). ZeRO 3 reduce-scatters them, and
    gathers the weights of each layer in every forward and every backward pass instead of once.
    """
    ranks, zero_stage = layout.data_ranks, layout.config.parallel.zero_stage
    size, elements = Sizes.of(layout.config).bytes, layout.parameters(stage)
    weights = gather_or_scatter(size * elements, ranks)
    if zero_stage == 1:
        return all_reduce(WIDE * elements, ranks) + weights
    if zero_stage == 2:
        return all_reduce(size * elements, ranks).times(layout.micro_batches) + weights
    layers = len(layers_of_stage(layout.config.model, layout.bounds, stage)) if ranks > 1 else 0
    gathered = Traffic(weights.bytes, layers).times(2 * layout.micro_batches)
    return gather_or_scatter(size * elements, ranks).times(layout.micro_batches) + gathered


def traffic(layout: Layout, stage: int) -> dict[str, Traffic]:
    """All kinds, by name; `tensor` and `sequence` are the same collectives with and without sequence parallelism."""
    name = "sequence parallel" if layout.config.parallel.sequence_parallel else "tensor parallel"
    return {
        name: tensor_parallel(layout, stage),
        "pipeline": pipeline(layout, stage),
        "data parallel": data_parallel(layout, stage),
        "tied weights": tied(layout, stage),
    }
