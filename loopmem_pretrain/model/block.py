"""One transformer block: attention and feed-forward, each added to the residual stream with a scale c.

    u        = x + c * attention(rms_norm(x))
    Blk(x,c) = u + c * feed_forward(rms_norm(u))

Shapes and names as in model/loopmem.py, which loops it. Imports torch, the standard library and two files beside it
only: the exported Hugging Face model inlines the files as text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmem_pretrain.model.backend import Backend, wide
from loopmem_pretrain.model.decoding import Attends, Decoding, attend


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(NamedTuple):
    """Cosine and signed sine of the rotary angles, each [.., T, 1, d]; the first half of the sines is negated."""

    cos: Tensor
    sin: Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float, like: Tensor) -> Rotary:
    """Angles position * theta^(-2i/d), half-split (dimension i turns with i + d/2), on `like`'s device and dtype."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=wide(like.dtype)) / head_dim
    # In the form in which published models are trained and run: late positions multiply the rounding of a frequency.
    angles = positions[..., None, None] * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return Rotary(torch.cat((cos, cos), dim=-1).to(like.dtype), torch.cat((-sin, sin), dim=-1).to(like.dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn [B, T, heads, d] by its positions' angles: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    return torch.addcmul(x * rotary.cos, x.roll(x.shape[-1] // 2, dims=-1), rotary.sin)


class Attention(nn.Module):
    """Causal multi-head attention; queries and keys are RMS-normalised per head where `qk_norm` says."""

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        width, self.head_dim, self.qk_norm = config.hidden_size, config.head_width, config.qk_norm
        bias, output_bias = config.attention_bias != "none", config.attention_bias == "all"
        self.heads = backend.local_heads(config.num_attention_heads)
        self.kv_heads = backend.local_heads(config.num_key_value_heads)
        self.backend = backend
        self.q_proj = backend.column_linear(width, config.num_attention_heads * self.head_dim, bias)
        self.k_proj = backend.column_linear(width, config.num_key_value_heads * self.head_dim, bias)
        self.v_proj = backend.column_linear(width, config.num_key_value_heads * self.head_dim, bias)
        self.o_proj = backend.row_linear(config.num_attention_heads * self.head_dim, width, output_bias)
        if self.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, decoding: Attends | None) -> Tensor:
        x = self.backend.enter(x)
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.qk_norm == "before_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if self.qk_norm == "after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast widens the norms and the rotation, and a cache holds one dtype
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = attend(q, k, v) if decoding is None else decoding.attend(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: W_down(SiLU(W_gate z) * W_up z)."""

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.gate_proj = backend.column_linear(config.hidden_size, config.intermediate_size)
        self.up_proj = backend.column_linear(config.hidden_size, config.intermediate_size)
        self.down_proj = backend.row_linear(config.intermediate_size, config.hidden_size)

    def forward(self, z: Tensor) -> Tensor:
        z = self.backend.enter(z)
        return self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


def add_scaled(x: Tensor, scale: Tensor, branch: Tensor) -> Tensor:
    """x + scale * branch in float32 or wider, rounded once; a GPU would else round the 0-dim scale to bf16 first."""
    precise = wide(x.dtype)
    return torch.addcmul(x.to(precise), scale, branch.to(precise)).to(x.dtype)


class Block(nn.Module):
    """Blk(x, c): attention and feed-forward, each added to the residual stream with scale c."""

    one_loop: Callable[..., Any]
    """What a subclass does once, or in each loop; its last argument is the Decoding."""
    run: Callable[..., Any] | None = None
    """Called in place of `one_loop`: training may compile it, verification watches it. None, not `one_loop` itself:
    that is bound to this layer, and the replicas that nn.DataParallel makes take over what a layer holds."""
    recompute: Callable[..., Any] | None = None
    """(function, arguments) -> result, such as torch's `checkpoint`: in training it calls each loop, and the backward
    pass runs the loop again instead of keeping what it computed."""

    def __init__(self, config: Any, backend: Backend, index: int) -> None:
        super().__init__()
        self.backend = backend
        self.index, self.num_layers = index, config.num_hidden_layers
        self.rope_theta = config.rope_theta
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, backend)

    def block(self, x: Tensor, scale: Tensor, rotary: Rotary, decoding: Attends | None = None) -> Tensor:
        """Blk(x, c): [B, T', D] and c, float32 or wider [] -> [B, T', D]."""
        u = add_scaled(x, scale, self.self_attn(self.input_layernorm(x), rotary, decoding))
        return add_scaled(u, scale, self.mlp(self.post_attention_layernorm(u)))

    def run_loop(self, *arguments: Any) -> Any:
        """What `one_loop` returns of these arguments; compiled, watched or recomputed where that was asked for."""
        run, decoding = self.run or self.one_loop, arguments[-1]
        fills_cache = decoding is not None and decoding.cache is not None  # which a second run would do again
        if self.recompute is None or not self.training or fills_cache:
            return run(*arguments)
        return self.recompute(run, *arguments)

    def rotary(self, hidden: Tensor, decoding: Decoding | None = None) -> Rotary:
        """The angles of the tokens of `hidden` [B, T', D], in its dtype: of all T, also where ranks share them."""
        tokens = self.backend.whole_length(hidden.shape[1])
        positions = torch.arange(tokens, device=hidden.device) if decoding is None else decoding.positions
        return rotary_angles(positions, self.self_attn.head_dim, self.rope_theta, hidden)

    def slot(self, n: int) -> int:
        """Where the cache holds loop n of this layer, n from 1."""
        return (n - 1) * self.num_layers + self.index

    def at_loop(self, n: int, decoding: Decoding | None) -> Decoding | None:
        """`decoding` for loop n of this layer."""
        return None if decoding is None else decoding.at(self.slot(n))
