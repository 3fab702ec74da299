"""Peak memory of every pipeline stage's ranks, by formula: model states, activations in flight, the loss.

`tests/unit/tools/test_memory_plan.py` holds model states against the live tensors of real engines.
"""

import math
from typing import NamedTuple

from loopmem_pretrain.config.run import RunConfig, check_topology, gradient_accumulation_steps
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.parallel.stages import layers_of_stage, stage_bounds
from loopmem_pretrain.tools.activations import (
    WIDE,
    Sizes,
    head_bytes,
    loop_bytes,
    stage_keys_bytes,
    visit_bytes,
)
from loopmem_pretrain.tools.weights import Weight, local_numel, shared_weights, stage_weights
from loopmem_pretrain.words import counted

BUCKET = 500_000_000  # elements; training/ds_config.py asks for it where the model has as many
ZERO3_LIVE = 1_000_000_000  # parameters that DeepSpeed's ZeRO 3 keeps gathered at most, by default


class Layout(NamedTuple):
    """A run spread over a number of ranks: what every estimate starts from."""

    config: RunConfig
    ranks: int
    data_ranks: int
    """DP = ranks / (TP x PP)"""
    micro_batches: int
    """that a rank adds up in a step"""
    bounds: list[int]
    """cut of the layer list into pipeline stages"""

    @classmethod
    def of(cls, config: RunConfig, ranks: int) -> "Layout":
        """
        Raises:
            ConfigError: the ranks, the batch and the parallel sizes do not fit together.
        """
        check_topology(config, ranks)
        parallel = config.parallel
        data_ranks = ranks // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        return cls(
            config,
            ranks,
            data_ranks,
            gradient_accumulation_steps(config.training, data_ranks),
            stage_bounds(config.model, config.data.seq_length, parallel.pipeline_model_parallel_size),
        )

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    def describe(self) -> str:
        """8 ranks = TP 2 x PP 1 x DP 4."""
        parallel = self.config.parallel
        cut = f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
        return f"{counted(self.ranks, 'rank')} = {cut} x DP {self.data_ranks:,}"

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once: a forward pass of each later stage fits before the
        first backward pass comes back."""
        return min(self.micro_batches, self.stages - stage)

    def weights(self, stage: int) -> list[Weight]:
        """Every parameter of the stage, whole."""
        return stage_weights(self.config.model, self.bounds, stage)

    def parameters(self, stage: int) -> int:
        """Elements on one rank of the stage."""
        return sum(local_numel(weight, self.config.parallel) for weight in self.weights(stage))


class RankMemory(NamedTuple):
    """Bytes of one rank of a stage at the worst moment of a step."""

    weights: int
    """working copy, in the run's precision"""
    gradients: int
    """float32 sums, and with ZeRO 1 the gradients of the micro-batch beside them"""
    optimizer: int
    """float32 master weights and two moments"""
    zero_buckets: int
    """flat buffers that gradients are reduced in (ZeRO 2 and 3)"""
    zero3_gathered: int
    """parameters that ZeRO 3 has gathered, and the copies in which layers read the shared memory"""
    activations: int
    """kept from forward to backward, all micro-batches in flight"""
    logits: int
    """logits and cross-entropy, on the last stage"""
    backward: int
    """what the backward pass adds where the sum is greatest: gradients of logits, or a loop that is recomputed"""

    @property
    def total(self) -> int:
        return sum(self)


def model_states(config: RunConfig, elements: int, data_ranks: int) -> dict[str, int]:
    """Weights, gradients, optimizer and ZeRO's buffers of a rank that has `elements` parameters to care for.

    On the device: what is offloaded does not count here.
    """
    parallel = config.parallel
    size, stage = 2 if config.training.precision == "bf16" else WIDE, config.parallel.zero_stage
    own = math.ceil(elements / data_ranks)
    bucket = min(BUCKET, parameter_counts(config.model).total)
    shared = sum(local_numel(weight, parallel) for weight in shared_weights(config.model))
    gathered = min(max(ZERO3_LIVE, shared), elements) + shared
    # ZeRO 1: bf16 keeps whole float32 sums and the micro-batch's gradients; fp32 sums up in .grad, then cuts.
    gradients = elements * (WIDE + size) if size < WIDE else WIDE * (elements + own)
    return {
        "weights": 0 if parallel.offload_parameters == "cpu" else size * (own if stage == 3 else elements),
        "gradients": gradients if stage == 1 else WIDE * own,
        "optimizer": 0 if parallel.offload_optimizer == "cpu" else 3 * WIDE * own,
        "zero_buckets": size * bucket if stage > 1 else 0,
        "zero3_gathered": size * gathered if stage == 3 else 0,
    }


def stage_memory(layout: Layout, stage: int, fused_norms: bool = True) -> RankMemory:
    """The memory of one rank of pipeline stage `stage`."""
    config = layout.config
    s = Sizes.of(config, fused_norms)
    width, flying = config.model.hidden_size, layout.in_flight(stage)
    layers = len(layers_of_stage(config.model, layout.bounds, stage))
    is_last = stage == layout.stages - 1
    sent = 0 if is_last else s.bytes * s.stream * width  # the stage's output, held until its gradient is there
    kept = flying * (layers * visit_bytes(s) + stage_keys_bytes(s) + sent)
    # The backward pass of a layer: gradients of the feed-forward's inner width and of the stream.
    inner = 2 * s.bytes * s.tokens * config.model.intermediate_size // s.tensor_ranks + 2 * WIDE * s.stream * width
    in_layer = inner + (loop_bytes(s) if s.recompute else 0)
    logits, in_head = head_bytes(s) if is_last else (0, 0)
    logits_alone = s.bytes * s.tokens * math.ceil(config.model.vocab_size / s.tensor_ranks) if is_last else 0
    # The loss's backward pass comes first and frees what it kept; then come the layers.
    backward = max(in_head, in_layer - (logits - logits_alone))
    states = model_states(config, layout.parameters(stage), layout.data_ranks)
    return RankMemory(**states, activations=kept, logits=logits, backward=backward)


def bank_bytes(layout: Layout, stage: int) -> int:
    """Of the model states, those of memory banks (keys and values), on one rank of a stage."""
    banks = [weight for weight in layout.weights(stage) if weight.kind == "memory banks"]
    elements = sum(local_numel(weight, layout.config.parallel) for weight in banks)
    states = model_states(layout.config, elements, layout.data_ranks)
    return states["weights"] + states["gradients"] + states["optimizer"]


def worst_stage(layout: Layout) -> tuple[int, RankMemory]:
    """The stage whose ranks need most, and what they need."""
    each = [stage_memory(layout, stage) for stage in range(layout.stages)]
    worst = max(range(layout.stages), key=lambda stage: each[stage].total)
    return worst, each[worst]
