"""The model's sizes and variants. Field names are the public ones of the Hugging Face config."""

import math
from typing import Literal

from pydantic import Field

from loopmem_pretrain.config.base import Problem, Section


class ModelConfig(Section):
    """One looped memory model (or, with `max_loops: 0`, one plain transformer)."""

    vocab_size: int = Field(gt=0)
    """V: rows of the embedding and of the head; at least the tokenizer's size, padded as you like."""
    hidden_size: int = Field(gt=0)
    """D: width of the residual stream."""
    intermediate_size: int = Field(gt=0)
    """F: the real width of the SwiGLU feed-forward."""
    num_hidden_layers: int = Field(gt=0)
    """L: number of layers, each with weights of its own; loops do not count."""
    num_attention_heads: int = Field(gt=0)
    """H: query heads; divides hidden_size, unless head_dim is given."""
    num_key_value_heads: int = Field(gt=0)
    """K: key/value heads; divides num_attention_heads."""
    head_dim: int | None = Field(default=None, gt=0)
    """d: width of a head; null is hidden_size / num_attention_heads."""
    qk_norm: Literal["after_rope", "before_rope", "none"] = "after_rope"
    """Where queries and keys are RMS-normalised per head: after the rotation, before it (Qwen3), or not (Llama)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which attention projections have biases: none; q, k and v (Qwen2); or these and the output."""
    max_loops: int = Field(ge=0)
    """N: how many times a layer may be applied; 0 means plain blocks without router and step scales."""
    residual_scale: Literal["learned", "one", "inverse_depth"] = "learned"
    """Scale of both residual branches: `learned` per loop (looped), `one` or `inverse_depth` 1/(l+1) (plain)."""
    local_slots: int = Field(default=0, ge=0)
    """S_l: slots of each layer's own memory bank; 0 leaves the bank out."""
    global_slots: int = Field(default=0, ge=0)
    """S_g: slots of the one bank shared by all layers; 0 leaves the bank out."""
    gate: Literal["vector", "scalar", "constant"] = "vector"
    """What opens the memory: a gate per channel, one number per token, or sigmoid(gate_init_bias), fixed."""
    gate_init_bias: float = Field(default=-3.0, ge=-50, le=50)
    """g0: the gate's bias at the start; sigmoid(-3) = 0.047, 0 gives 0.5, +3 gives 0.953."""
    retrieval: Literal["dense", "topk", "product_keys"] = "dense"
    """How the global bank is read: softmax over all slots (`dense`), over the retrieval_topk best of all (`topk`), or
    over the best found by product keys, which stay cheap at millions of slots. Local banks are always read densely."""
    retrieval_topk: int = Field(default=32, gt=0)
    """k: slots of the global bank that a token reads with retrieval `topk` or `product_keys`."""
    rope_theta: float = Field(default=500000.0, gt=0)
    """Base of the rotary position embedding."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm and LayerNorm."""
    ponder_weight: float = 0.0
    """Constant weight w of the ponder loss; `training.ponder_schedule` may modulate it over steps."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's transpose."""

    @property
    def head_width(self) -> int:
        """d, where head_dim leaves it open too."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def model_problems(model: ModelConfig) -> list[Problem]:
    """Rules between the model's fields; each problem is (path of the key, what is wrong and what is valid)."""
    problems: list[Problem] = []

    def say(key: str, message: str) -> None:
        problems.append((("model", key), message))

    if model.head_dim is not None:
        if model.head_dim % 2:
            say("head_dim", f"{model.head_dim} is odd, rotary embedding needs an even width; valid: an even number")
    elif model.hidden_size % model.num_attention_heads:
        say(
            "num_attention_heads",
            f"{model.num_attention_heads} does not divide hidden_size {model.hidden_size}; "
            f"nearest valid: {_nearest_divisors(model.hidden_size, model.num_attention_heads, even_quotient=True)}",
        )
    elif (model.hidden_size // model.num_attention_heads) % 2:
        say(
            "num_attention_heads",
            f"the head width {model.hidden_size // model.num_attention_heads} is odd, "
            "rotary embedding needs an even one; nearest valid: "
            + _nearest_divisors(model.hidden_size, model.num_attention_heads, even_quotient=True),
        )
    if model.num_attention_heads % model.num_key_value_heads:
        say(
            "num_key_value_heads",
            f"{model.num_key_value_heads} does not divide num_attention_heads "
            f"{model.num_attention_heads}; nearest valid: "
            + _nearest_divisors(model.num_attention_heads, model.num_key_value_heads),
        )
    looped = model.max_loops > 0
    if looped and model.residual_scale != "learned":
        say(
            "residual_scale",
            f"'{model.residual_scale}' belongs to plain blocks (max_loops: 0); "
            f"with max_loops {model.max_loops} only 'learned' is valid",
        )
    if not looped and model.residual_scale == "learned":
        say("residual_scale", "'learned' needs max_loops >= 1; plain blocks take 'one' or 'inverse_depth'")
    if not looped and (model.local_slots or model.global_slots):
        key = "local_slots" if model.local_slots else "global_slots"
        say(key, "memory is read at every loop, so it needs max_loops >= 1 (1 for memory without looping)")
    if model.max_loops <= 1 and model.ponder_weight:
        say("ponder_weight", f"{model.ponder_weight} has no effect with max_loops {model.max_loops}; set it to 0")
    problems += _retrieval_problems(model)
    return problems


def _retrieval_problems(model: ModelConfig) -> list[Problem]:
    """How the global bank is read, and whether it can be."""
    slots, k, side = model.global_slots, model.retrieval_topk, math.isqrt(model.global_slots)
    key, message = "", ""
    if model.retrieval == "dense":
        if k != ModelConfig.model_fields["retrieval_topk"].default:
            key = "retrieval_topk"
            message = f"{k} has no effect with retrieval 'dense'; leave it out, or set retrieval: topk or product_keys"
    elif not slots:
        key, message = "retrieval", f"'{model.retrieval}' reads the global bank, and there is none; set global_slots"
    elif model.retrieval == "product_keys" and side * side != slots:
        key = "global_slots"
        message = (
            f"{slots} is no square, and product_keys makes the keys of n x n slots from 2 x n half-keys; "
            f"nearest valid: {side**2} or {(side + 1) ** 2}"
        )
    elif model.retrieval == "product_keys" and model.hidden_size % 2:
        key, message = "hidden_size", f"{model.hidden_size} is odd, and product_keys compares halves of it"
    elif model.retrieval == "product_keys" and k > side:
        key = "retrieval_topk"
        message = f"{k} is more than the {side} half-keys of a side of {slots} slots; valid: 1 to {side}"
    elif k > slots:
        key, message = "retrieval_topk", f"{k} is more than global_slots {slots}; valid: 1 to {slots}"
    return [(("model", key), message)] if key else []


def _nearest_divisors(number: int, wanted: int, even_quotient: bool = False) -> str:
    """The divisors of `number` around `wanted`, in words; heads are counted in hundreds at most, so few are tried."""
    divisors = [n for n in range(1, min(number, 4096) + 1) if number % (2 * n if even_quotient else n) == 0]
    if not divisors:
        return "none, hidden_size is odd"
    return " or ".join(str(n) for n in sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:2]))
