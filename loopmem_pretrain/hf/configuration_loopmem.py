"""Configuration of a transformer whose layers loop adaptively and read gated memory banks.

Every exported model folder carries a copy of this file: it needs transformers and the standard library only.
"""

# transformers annotates a part of itself only:
# mypy: disable-error-code="misc,no-untyped-call"

import importlib
import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

_CHOICES = {
    "qk_norm": ("after_rope", "before_rope", "none"),
    "attention_bias": ("none", "qkv", "all"),
    "residual_scale": ("learned", "one", "inverse_depth"),
    "gate": ("vector", "scalar", "constant"),
    "retrieval": ("dense", "topk", "product_keys"),
    "exit_rule": ("halting", "confidence"),
}
_TOPK = 32
FORMAT_VERSION = 1
"""Of config.json and the tensors it describes; rises when code that reads the version before would misread them."""
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "retrieval_topk",
)


class LoopMemConfig(PretrainedConfig):
    """Sizes and variants of one model; the defaults are a 12-layer model of three loops without memory.

    Raises:
        ValueError: a value that does not fit, with what would be valid; all problems at once.
    """

    model_type = "loopmem"
    # Trainer gathers every other output of a forward pass over all batches of an evaluation.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "cross_entropy", "ponder_cost", "loop_stats"]  # noqa: RUF012

    format_version: int = FORMAT_VERSION
    """Of this file and the tensors beside it."""
    vocab_size: int = 50304
    """V: rows of the embedding and of the head."""
    hidden_size: int = 768
    """D: width of the residual stream."""
    intermediate_size: int = 2048
    """F: width of the SwiGLU feed-forward."""
    num_hidden_layers: int = 12
    """L: sets of weights; never layers times loops."""
    num_attention_heads: int = 12
    """H: query heads; divides hidden_size, unless head_dim is given."""
    num_key_value_heads: int = 12
    """K: key/value heads; divides num_attention_heads."""
    head_dim: int | None = None
    """d: width of a head; none is hidden_size / num_attention_heads."""
    qk_norm: str = "after_rope"
    """Where queries and keys are RMS-normalised per head: `after_rope`, `before_rope`, or `none`."""
    attention_bias: str = "none"
    """Which projections of attention have biases: `none`, `qkv`, or `all` (the output's too)."""
    max_loops: int = 3
    """N: how often a layer may be applied; 0 means plain blocks."""
    residual_scale: str = "learned"
    """Scale of both residual branches: `learned` (looped), `one` or `inverse_depth` (plain)."""
    local_slots: int = 0
    """S_l: slots of each layer's own memory bank; 0 leaves the bank out."""
    global_slots: int = 0
    """S_g: slots of the bank shared by all layers; 0 leaves the bank out."""
    gate: str = "vector"
    """What opens the memory: a gate per channel (`vector`), per token (`scalar`), or `constant`."""
    gate_init_bias: float = -3.0
    """g0: the gate's bias at the start; the value of a constant gate is sigmoid(g0)."""
    retrieval: str = "dense"
    """How the global bank is read: all slots (`dense`), or the best ones (`topk`, `product_keys`)."""
    retrieval_topk: int = _TOPK
    """k: slots of the global bank that a token reads, where it does not read all."""
    rope_theta: float = 500000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm and LayerNorm."""
    ponder_weight: float = 0.0
    """Weight of the ponder cost in the loss."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's transpose."""
    max_position_embeddings: int | None = None
    """Tokens of a training sequence; nothing was learned about later positions."""
    bos_token_id: int | None = None
    """Beginning of sequence."""
    eos_token_id: int | list[int] | None = None
    """End of a document; generation stops there, or at any of several."""
    pad_token_id: int | None = None
    """Fills finished sequences of a batch in generation."""
    use_cache: bool = True
    """Whether generation keeps the keys and values of earlier tokens, those of every loop."""

    exit_threshold: float | None = None
    """Inference: a token leaves a layer as soon as `exit_rule` says so, in (0, 1]; none, or 1, runs all loops."""
    exit_rule: str = "halting"
    """Leave once the router has given out this share of the token's mass (`halting`), or once a loop changes the token
    by less than 1 - exit_threshold of its length (`confidence`)."""

    def __post_init__(self, **kwargs: Any) -> None:
        problems = config_problems(self)
        if problems:
            raise ValueError("this is no valid LoopMemConfig:\n  " + "\n  ".join(problems))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the code that it names: of a model that was loaded with the folder's code,
        transformers copies it; this package, whose files import each other, writes what an export has."""
        if __name__.startswith("loopmem_pretrain."):  # a folder's copy of this file does without
            code_files = importlib.import_module("loopmem_pretrain.hf.code_files")
            self.auto_map = dict(code_files.AUTO_MAP)
            code_files.write_code(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def head_width(self) -> int:
        """d, where head_dim leaves it open too."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def config_problems(config: Any) -> list[str]:
    """What is wrong with the fields of a config, one line each: field, value, and what would be valid."""
    return _version_problems(config) or _value_problems(config) or _cross_problems(config)


def _version_problems(config: Any) -> list[str]:
    version = config.format_version
    if _is_int(version) and 1 <= version <= FORMAT_VERSION:
        return []
    if _is_int(version) and version > FORMAT_VERSION:
        return [
            f"format_version: {version} is newer than {FORMAT_VERSION}, the newest that this code reads; use "
            "newer code, or the code that lies beside it (trust_remote_code=True)"
        ]
    return [f"format_version: {version!r} is not valid; valid: 1 to {FORMAT_VERSION}"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _value_problems(config: Any) -> list[str]:
    """Each field by itself."""
    problems = []

    def expect(fits: bool, key: str, valid: str) -> None:
        if not fits:
            problems.append(f"{key}: {getattr(config, key)!r} is not valid; valid: {valid}")

    for key in _POSITIVE:
        value = getattr(config, key)
        expect(_is_int(value) and value > 0, key, "a whole number above 0")
    for key in ("max_loops", "local_slots", "global_slots"):
        value = getattr(config, key)
        expect(_is_int(value) and value >= 0, key, "a whole number, 0 or above")
    for key, choices in _CHOICES.items():
        expect(getattr(config, key) in choices, key, ", ".join(repr(choice) for choice in choices))
    for key in ("rope_theta", "rms_norm_eps"):
        value = getattr(config, key)
        expect(_is_number(value) and value > 0, key, "a finite number above 0")
    for key in ("gate_init_bias", "ponder_weight"):
        expect(_is_number(getattr(config, key)), key, "a finite number")
    for key in ("tie_word_embeddings", "use_cache"):
        expect(isinstance(getattr(config, key), bool), key, "true or false")
    share = config.exit_threshold
    expect(share is None or (_is_number(share) and 0 < share <= 1), "exit_threshold", "none, or above 0 and at most 1")
    for key in ("max_position_embeddings", "head_dim"):
        value = getattr(config, key)
        expect(value is None or (_is_int(value) and value > 0), key, "none, or above 0")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value, size = getattr(config, key), config.vocab_size
        several = key == "eos_token_id" and isinstance(value, list) and value
        tokens = value if several else [] if value is None else [value]
        fits = all(_is_int(token) and _is_int(size) and 0 <= token < size for token in tokens)
        expect(fits, key, f"none, or a token id from 0 to vocab_size - 1 (vocab_size is {size!r})")
    return problems


def _cross_problems(config: Any) -> list[str]:
    """Fields that do not fit each other."""
    problems = []
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if config.head_dim is not None:
        if config.head_dim % 2:
            problems.append(f"head_dim: {config.head_dim} is odd; valid: an even width, which rotary embedding needs")
    elif width % heads:
        problems.append(
            f"num_attention_heads: {heads} does not divide hidden_size {width}; valid: a divisor of {width}"
        )
    elif width // heads % 2:
        problems.append(
            f"num_attention_heads: {heads} heads of hidden_size {width} are {width // heads} wide; valid: heads of "
            "even width, which rotary embedding needs"
        )
    if heads % kv_heads:
        problems.append(
            f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}; valid: a divisor of {heads}"
        )
    if config.max_loops and config.residual_scale != "learned":
        problems.append(
            f"residual_scale: {config.residual_scale!r} belongs to plain blocks (max_loops 0); with max_loops "
            f"{config.max_loops} valid: 'learned'"
        )
    if not config.max_loops and config.residual_scale == "learned":
        problems.append("residual_scale: 'learned' needs max_loops of 1 or above; valid: 'one', 'inverse_depth'")
    if not config.max_loops and config.exit_threshold is not None:
        problems.append(
            f"exit_threshold: {config.exit_threshold} with max_loops 0; valid: none, there is no loop to leave"
        )
    if not config.max_loops and (config.local_slots or config.global_slots):
        key = "local_slots" if config.local_slots else "global_slots"
        problems.append(
            f"{key}: {getattr(config, key)} with max_loops 0; valid: 0, since memory is read at every loop "
            "(max_loops 1 is memory without looping)"
        )
    return problems + _retrieval_problems(config)


def _retrieval_problems(config: Any) -> list[str]:
    """How the global bank is read, and whether it can be."""
    slots, k, side = config.global_slots, config.retrieval_topk, math.isqrt(config.global_slots)
    if config.retrieval == "dense":
        return [] if k == _TOPK else [f"retrieval_topk: {k} has no effect with retrieval 'dense'; valid: {_TOPK}"]
    if not slots:
        return [f"retrieval: {config.retrieval!r} reads the global bank, and there is none; valid: 'dense'"]
    if config.retrieval == "product_keys" and side * side != slots:
        return [f"global_slots: {slots} is not valid with retrieval 'product_keys'; valid: a square number"]
    most = side if config.retrieval == "product_keys" else slots
    if k > most:
        return [f"retrieval_topk: {k} with {slots} global_slots and retrieval {config.retrieval!r}; valid: 1 to {most}"]
    return []
