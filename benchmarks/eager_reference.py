"""The method written down as plainly as possible: what `bench_training.py` measures the package against.

One class a part, eager torch, one device, the formulas in the order in which the paper gives them. It takes the config
and the parameters of `loopmem_pretrain.model.loopmem` (same names), and computes the same loss to rounding; the
benchmark checks that before it times anything. Attention is torch's fused one, as anybody would write it today.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn [B, H, T, d] by position * theta^(-2i/d), half-split."""
    tokens, width = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(tokens, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        if config.num_key_value_heads != self.heads:
            raise ValueError("the reference has as many key/value heads as query heads, like the paper")
        self.theta = config.rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // self.heads, config.rms_norm_eps)
        self.k_norm = RMSNorm(width // self.heads, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(rotate(q, self.theta)), self.k_norm(rotate(k, self.theta))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


class Memory(nn.Module):
    """inject(h) = h + the gated read of the local and of the global bank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, config.rms_norm_eps)
        self.local_keys = nn.Parameter(torch.empty(config.local_slots, width))
        self.local_values = nn.Parameter(torch.empty(config.local_slots, width))
        self.local_gate, self.global_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.local_proj = nn.Linear(width, width, bias=False)
        self.global_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, shared: "SharedMemory") -> Tensor:
        query = shared.query_norm(self.norm(hidden))
        local = read(query, shared.key_norm(self.local_keys), self.local_values)
        everywhere = read(query, shared.key_norm(shared.global_keys), shared.global_values)
        injected = hidden + torch.sigmoid(self.local_gate(hidden)) * self.local_proj(local)
        return injected + torch.sigmoid(self.global_gate(hidden)) * self.global_proj(everywhere)


def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(D)) V"""
    scores = query @ keys.T / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1) @ values


class SharedMemory(nn.Module):
    """The global bank and the norms that all layers share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.global_keys = nn.Parameter(torch.empty(config.global_slots, config.hidden_size))
        self.global_values = nn.Parameter(torch.empty(config.global_slots, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.key_norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)


class Layer(nn.Module):
    """N loops of one block, their results mixed by the halting probabilities."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.loops = config.max_loops
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.step_scales = nn.Parameter(torch.empty(config.max_loops))
        self.halting = nn.Linear(config.hidden_size + 1, 1)
        self.memory = Memory(config) if config.local_slots else None

    def forward(self, x: Tensor, shared: SharedMemory | None) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> (mixture [B, T, D], expected loops per token [B, T, 1])."""
        hidden, mixture, expected = x, torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x[..., :1])
        remaining = torch.ones_like(x[..., :1], dtype=torch.float32)
        for n in range(1, self.loops + 1):
            zeta = F.softplus(self.step_scales[n - 1])
            if self.memory is not None and shared is not None:
                hidden = self.memory(hidden, shared)
            hidden = hidden + zeta * self.self_attn(self.input_layernorm(hidden))
            hidden = hidden + zeta * self.mlp(self.post_attention_layernorm(hidden))
            tau = torch.full_like(hidden[..., :1], (n - 1) / max(1, self.loops - 1))
            lam = torch.sigmoid(self.halting(torch.cat((hidden, tau), dim=-1)).float())
            prob = remaining * lam if n < self.loops else remaining
            mixture = mixture + prob * hidden
            expected = expected + n * prob
            remaining = remaining - prob
        return mixture.to(x.dtype), expected


class Model(nn.Module):
    """Everything below the head, under the names of the package's model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.memory = SharedMemory(config) if config.global_slots else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EagerReference(nn.Module):
    """The looped language model, with both banks or none."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not config.max_loops or bool(config.local_slots) != bool(config.global_slots):
            raise ValueError("the reference is for looped models with both memory banks or none")
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """[B, T] and [B, T] -> cross-entropy + ponder_weight * ponder cost."""
        hidden, costs = self.model.embed_tokens(input_ids), []
        for layer in self.model.layers:
            hidden, expected = layer(hidden, self.model.memory)
            costs.append((expected - 1).mean() / max(1, self.config.max_loops - 1))
        logits = self.lm_head(self.model.norm(hidden)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss + self.config.ponder_weight * torch.stack(costs).mean()
