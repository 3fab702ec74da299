"""Parameters and FLOPs of a config, by formula and without torch. A multiply-add counts 2; training is 3x forward,
but for a search of slots, which has no backward pass.

Attention is causal: a token sees T/2 keys on average. Recomputation (activation checkpointing) comes on top and is
not counted in MFU. `tests/unit/model/test_flops.py` holds these formulas against torch's own counters.
"""

import math
from typing import Any, NamedTuple


class ParameterCounts(NamedTuple):
    """Parameters by owner."""

    embedding: int
    head: int
    blocks: int
    """Attention, feed-forward and norms of all layers, and the final norm."""
    looping: int
    """Routers and step scales."""
    memory: int
    """Banks, gates, projections and their norms."""

    @property
    def total(self) -> int:
        return sum(self)


class ForwardFlops(NamedTuple):
    """Forward FLOPs per token by part, for the given number of executed loops."""

    blocks: int
    routers: int
    local_reads: int
    """Scores, mixture and gate."""
    global_reads: int
    projections: int
    """P of both banks, applied to slots or to reads (model/memory.py), this token's share."""
    slot_search: int
    """Finding the best slots of the global bank (`retrieval: topk`): has no backward pass."""
    head: int

    @property
    def total(self) -> int:
        return sum(self)


def parameter_counts(config: Any) -> ParameterCounts:
    """Exact parameter counts of a model config."""
    width, ffn, layers, vocab = _sizes(config)
    queries, keys = (heads * config.head_width for heads in (config.num_attention_heads, config.num_key_value_heads))
    biases = {"none": 0, "qkv": queries + 2 * keys, "all": queries + 2 * keys + width}[config.attention_bias]
    norms = 2 * width + (0 if config.qk_norm == "none" else 2 * config.head_width)
    block = 2 * width * (queries + keys) + biases + 3 * width * ffn + norms
    looping = layers * (width + 2 + config.max_loops) if config.max_loops else 0
    memory = 0
    if config.local_slots or config.global_slots:
        memory += 4 * width + layers * 2 * width  # LN_q and LN_k once, LN_m per layer
        gate = {"vector": width * width + width, "scalar": width + 1, "constant": 0}[config.gate]
        banks = bool(config.local_slots) + bool(config.global_slots)
        memory += layers * banks * (gate + width * width)
        memory += 2 * width * (layers * config.local_slots + config.global_slots)
        if config.retrieval == "product_keys":  # 2 n half-keys for n^2 slots
            memory -= width * (config.global_slots - math.isqrt(config.global_slots))
    head = 0 if config.tie_word_embeddings else vocab * width
    return ParameterCounts(vocab * width, head, layers * block + width, looping, memory)


def forward_flops_per_token(
    config: Any, seq_length: int, num_loops: int | None = None, causal: bool = True, tokens: int = 1
) -> ForwardFlops:
    """Forward FLOPs of one token in a sequence of `seq_length`, with n = `num_loops` (default N) loops a layer.

    `causal=False` counts every key of the sequence, as counters that see the full matmul do. `tokens` are those of a
    forward pass: with many of them P is applied to slots; with one, as in generation, to each read.
    """
    width, ffn, layers, vocab = _sizes(config)
    loops = num_loops if num_loops is not None else max(1, config.max_loops)
    visits = layers * loops
    queries, keys = (heads * config.head_width for heads in (config.num_attention_heads, config.num_key_value_heads))
    keys_seen = seq_length / 2 if causal else seq_length
    block = 2 * (2 * width * (queries + keys) + 3 * width * ffn) + 4 * keys_seen * queries
    return ForwardFlops(
        blocks=round(visits * block),
        routers=visits * 2 * (width + 1) if config.max_loops else 0,
        local_reads=visits * _read_flops(config, config.local_slots, 4 * config.local_slots * width),
        global_reads=visits * _read_flops(config, config.global_slots, _global_lookup_flops(config)),
        projections=round(layers * projection_flops(config, tokens * loops) / tokens),
        slot_search=visits * 2 * config.global_slots * width if config.retrieval == "topk" else 0,
        head=2 * width * vocab,
    )


def forward_flops_at(config: Any, seq_length: int, mean_loops: float, causal: bool = True, tokens: int = 1) -> int:
    """Forward FLOPs of one token where layers run so many loops on average: early exit."""
    one, two = (forward_flops_per_token(config, seq_length, loops, causal, tokens).total for loops in (1, 2))
    return round(one + (mean_loops - 1) * (two - one))


def training_flops_per_token(config: Any, seq_length: int, samples: int, causal: bool = True) -> int:
    """Forward and backward of micro-batches of `samples` sequences, all loops, no recomputation: MFU is against it."""
    forward = forward_flops_per_token(config, seq_length, causal=causal, tokens=samples * seq_length)
    return 3 * forward.total - 2 * forward.slot_search


def gate_flops(config: Any) -> int:
    """The gate of one bank for one token in one loop."""
    width: int = config.hidden_size
    return {"vector": 2 * width * width, "scalar": 2 * width, "constant": 0}[config.gate]


def projection_flops(config: Any, reads: int, ranks: int = 1) -> int:
    """P of both banks in one visit of a layer that reads them `reads` times, with slots cut over `ranks`."""
    rows = sum(min(slots // ranks, reads) for slots in (config.local_slots, config.global_slots))
    return rows * 2 * int(config.hidden_size) ** 2


def _global_lookup_flops(config: Any) -> int:
    """Scores and mixture of one read of the global bank, the search of `topk` not counted."""
    width, slots, k = config.hidden_size, config.global_slots, config.retrieval_topk
    scores, mixed = {
        "dense": (slots, slots),
        "topk": (k, k),
        "product_keys": (math.isqrt(slots), k),  # n scores of each half
    }[config.retrieval]
    return 2 * (scores + mixed) * width


def _read_flops(config: Any, slots: int, lookup: int) -> int:
    """One read of one bank: scores and mixture (`lookup`), gate."""
    return lookup + gate_flops(config) if slots else 0


def _sizes(config: Any) -> tuple[int, int, int, int]:
    return config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
