"""Bytes that autograd keeps between forward and backward pass, by formula; all for one micro-batch and one rank.

Each term is a tensor of model/loopmem.py or model/memory.py, in the order of its operations.
tests/unit/tools/test_activations.py holds the sums against the tensors that are alive after a forward pass.

Letters: n tokens of the micro-batch, n' those of the part of the residual stream that this rank holds (n, or n / TP
with sequence parallelism), a bytes of one activation, t = TP.

On a GPU an RMSNorm is one kernel that keeps its input; on a CPU it keeps its input and its normalised input, both in
float32 (`fused_norms=False`): what is printed is for a GPU, what tests measure is a CPU. Attention keeps q, k, v, its
output and one float32 a head and token, as flash attention does. A compiled loop keeps less (`made_anew`).
"""

import math
from typing import NamedTuple

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.run import RunConfig

WIDE = 4  # bytes of a float32


class Sizes(NamedTuple):
    """What the formulas are made of."""

    model: ModelConfig
    tokens: int
    """n"""
    stream: int
    """n'"""
    seq_length: int
    """T"""
    tensor_ranks: int
    """t"""
    bytes: int
    """a"""
    sharded: bool
    """Whether memory banks are cut over slots."""
    recompute: bool
    """Whether loops are recomputed in the backward pass."""
    compiled: bool
    fused_norms: bool

    @classmethod
    def of(cls, config: RunConfig, fused_norms: bool = True) -> "Sizes":
        parallel, training = config.parallel, config.training
        tokens, ranks = training.micro_batch_size * config.data.seq_length, parallel.tensor_model_parallel_size
        return cls(
            model=config.model,
            tokens=tokens,
            stream=tokens // ranks if parallel.sequence_parallel else tokens,
            seq_length=config.data.seq_length,
            tensor_ranks=ranks,
            bytes=2 if training.precision == "bf16" else 4,
            sharded=parallel.memory_placement == "sharded",
            recompute=training.activation_checkpointing == "loop",
            compiled=training.compile == "loop",
            fused_norms=fused_norms or training.compile == "loop",
        )

    @property
    def banks(self) -> tuple[int, int]:
        """Slots of the local and of the global bank."""
        return self.model.local_slots, self.model.global_slots

    @property
    def has_memory(self) -> bool:
        return any(self.banks)

    def norm(self, elements: int) -> int:
        """What an RMSNorm of so many elements keeps, besides one float32 a row."""
        return elements * (self.bytes if self.fused_norms else 2 * WIDE)

    def slots(self, slots: int) -> int:
        """Of a bank of so many, those that this rank holds."""
        return slots // self.tensor_ranks if self.sharded else slots

    def projected(self, slots: int) -> bool:
        """Whether P is applied to the slots, once a visit, and not to each read (model/memory.py)."""
        return 0 < self.slots(slots) <= self.stream * max(1, self.model.max_loops)


def loop_bytes(s: Sizes) -> int:
    """One loop of a layer (or one plain layer), kept whole."""
    model, t, a = s.model, s.tensor_ranks, s.bytes
    width, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    stream, full = s.stream * width, s.tokens * width  # elements of [B, T', D] and [B, T, D]
    queries, keys = (s.tokens * count * model.head_width for count in (heads, kv_heads))
    attention = (
        s.norm(stream) + a * full  # input norm, and what q_proj, k_proj and v_proj take
        + 2 * a * (queries + keys) // t  # what attention takes, q, k and v, and the mixed values
        + WIDE * heads * s.tokens // t  # one number a head and token of attention
    )  # fmt: skip
    if model.qk_norm != "none":  # what is normalised, and one number a head and token
        attention += (s.norm(queries) + s.norm(keys) + WIDE * (heads + kv_heads) * s.tokens) // t
    # Second norm, what gate_proj and up_proj take, and gate, SiLU(gate), up and their product.
    feed_forward = s.norm(stream) + a * full + 4 * a * s.tokens * model.intermediate_size // t
    rows = 2 * WIDE * s.stream
    whole = attention + feed_forward + rows - (made_anew(s) if s.compiled else 0)
    if not model.max_loops:
        return whole
    # Each branch in float32, for the gradient of its scale; h in float32, for the router (in fp32 that is h itself).
    looping = 2 * WIDE * stream + (WIDE * stream if a < WIDE else 0) + 4 * WIDE * s.stream
    if s.has_memory or (not s.fused_norms and a < WIDE):
        looping += a * stream  # h itself, where the input norm does not keep it
    return whole + looping + (_memory_bytes(s) if s.has_memory else 0)


def made_anew(s: Sizes) -> int:
    """What a compiled loop makes anew from what it keeps: torch's partitioner decides; measured with torch 2.13."""
    model, a = s.model, s.bytes
    silu = a * s.tokens * model.intermediate_size
    if not model.max_loops:
        return silu
    stream = s.stream * model.hidden_size
    branches = 2 * (WIDE - a) * stream + WIDE * s.stream  # they are kept as they are, not in float32
    others = (1 if model.gate == "constant" else 2) if s.has_memory else int(a == WIDE)
    return silu + branches + others * a * stream


def _memory_bytes(s: Sizes) -> int:
    """Both reads of one loop."""
    model, a, width = s.model, s.bytes, s.model.hidden_size
    stream = s.stream * width
    readers = s.tokens if s.sharded else s.stream  # tokens whose queries this rank answers
    total = 2 * a * stream + 4 * WIDE * s.stream  # LN_m(h), query; mean and deviation of the two norms
    if s.sharded and readers > s.stream:
        total += a * (readers * width - stream)  # the query was gathered
    for slots, dense in ((model.local_slots, True), (model.global_slots, model.retrieval == "dense")):
        if not slots:
            continue
        total += a * stream if s.projected(slots) else 2 * a * stream  # P m, and the mixture m that P was applied to
        total += {"vector": a * stream, "scalar": a * s.stream, "constant": a * s.stream - a * stream}[model.gate]
        if s.sharded:
            total += WIDE * (stream + s.stream)  # numerators and denominators
        total += dense_bytes(s, slots, readers) if dense else sparse_bytes(s, readers)
    return total


def dense_bytes(s: Sizes, slots: int, readers: int) -> int:
    """Softmax over all slots, and the scaled keys."""
    return s.bytes * s.slots(slots) * (readers + s.model.hidden_size)


def sparse_bytes(s: Sizes, readers: int) -> int:
    """Reads of k slots: scaled query, weights, and the indices that gathering and embedding_bag keep."""
    model, a = s.model, s.bytes
    k = min(model.retrieval_topk, s.slots(model.global_slots)) if model.retrieval == "topk" else model.retrieval_topk
    kept = a * readers * model.hidden_size + readers * k * (a + 1)  # scaled query, weights, mask
    of_a_slot = {
        "topk": a * model.hidden_size + 2 * 8,  # selected key, int64 indices
        "product_keys": 4 * 8,  # int64 indices of row, column, pair and slot
    }
    return kept + readers * k * of_a_slot[model.retrieval]


def visit_bytes(s: Sizes) -> int:
    """One visit of a layer: all its loops, whole or recomputed."""
    model, a, stream = s.model, s.bytes, s.stream * s.model.hidden_size
    rotary = 2 * a * s.seq_length * model.head_width  # all samples share them
    loops = max(1, model.max_loops)
    values = sum(a * s.slots(slots) * model.hidden_size for slots in s.banks if s.projected(slots))  # V P^T
    if s.recompute:
        # Input of each loop: h, and for looped layers the mixture so far in float32, |h| and R.
        each = a * stream + (WIDE * stream + 2 * WIDE * s.stream if model.max_loops else 0)
        keys = a * s.slots(model.local_slots) * model.hidden_size
        return loops * each + keys + values + rotary
    last = a * stream if model.max_loops and (s.fused_norms or a == WIDE or s.has_memory) else 0  # h_N
    return loops * loop_bytes(s) + last + values + rotary


def head_bytes(s: Sizes) -> tuple[int, int]:
    """(kept, more of it during the backward pass) of final norm, head and cross-entropy, on the last stage."""
    model, a = s.model, s.bytes
    norm = s.norm(s.stream * model.hidden_size) + a * s.tokens * model.hidden_size + 8 * s.tokens
    logits = s.tokens * math.ceil(model.vocab_size / s.tensor_ranks)
    # The engine holds the logits. The compiled loss adds their maximum and sum for each token and makes one gradient.
    # Eager, the loss holds their log-softmax in float32, and backward makes two float32 gradients of them; Megatron's
    # (TP > 1) keeps exp(logits) and turns it into the gradient in place.
    if s.compiled:
        return norm + a * logits + 2 * WIDE * s.tokens, a * logits
    return norm + logits * (a + WIDE), logits * (2 * WIDE if s.tensor_ranks == 1 else a)


def stage_keys_bytes(s: Sizes) -> int:
    """LN_k of the global bank's keys, which recomputed loops go on holding; once a micro-batch and stage."""
    model = s.model
    if not (s.recompute and model.global_slots):
        return 0
    slots = math.isqrt(model.global_slots) if model.retrieval == "product_keys" else s.slots(model.global_slots)
    return s.bytes * slots * model.hidden_size
