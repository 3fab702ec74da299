"""Gated memory banks: learned slots that every loop reads before its block.

    q         = LN_q(LN_m(h))                                  query; no projection, one head of width D
    m_x       = softmax(q LN_k(K_x)^T / sqrt(D)) V_x           x = the layer's local bank, the global bank of all layers
    g_x       = sigmoid(A_x h + a_x)                           gate
    inject(h) = h + sum over x of g_x * (P_x m_x)              what the block of this loop starts from

`LayerMemory` is what a layer owns, `SharedMemory` what all layers share. Where ranks hold different slots of a bank,
the backend merges their softmaxes (model/backend.py). Imports torch and model/backend.py only: the exported Hugging
Face model inlines this file as text.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmem_pretrain.model.backend import Backend, SlotRead


class SharedRead(NamedTuple):
    """What every layer needs of the memory the layers share; made once a forward pass by SharedMemory."""

    query_norm: tuple[Tensor, Tensor]
    key_norm: tuple[Tensor, Tensor]
    global_keys: Tensor | None  # LN_k(K^G), [S_g, D] or this rank's slots of it
    global_values: Tensor | None  # V^G, likewise


class SharedMemory(nn.Module):
    """The global bank, and the two LayerNorms (LN_q, LN_k) that all layers and both banks share."""

    global_keys: nn.Parameter | None
    global_values: nn.Parameter | None

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        if config.retrieval != "dense":
            raise ValueError(f"retrieval {config.retrieval!r} is not known to this model; valid: 'dense'")
        width = config.hidden_size
        self.query_norm, self.key_norm = (nn.LayerNorm(width, config.rms_norm_eps) for _ in range(2))
        self.global_keys = self.global_values = None
        if config.global_slots:
            slots = len(backend.slot_range(config.global_slots))
            self.global_keys = nn.Parameter(torch.empty(slots, width))
            self.global_values = nn.Parameter(torch.empty(slots, width))

    def forward(self) -> SharedRead:
        q_norm, k_norm = self.query_norm, self.key_norm
        keys = None if self.global_keys is None else k_norm(self.global_keys)
        return SharedRead((q_norm.weight, q_norm.bias), (k_norm.weight, k_norm.bias), keys, self.global_values)


class LayerMemory(nn.Module):
    """One layer's local bank, and its gates and projections for both banks; a bank without slots has none of them."""

    local_gate: nn.Module
    local_proj: nn.Module
    global_gate: nn.Module
    global_proj: nn.Module

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        width, slots = config.hidden_size, len(backend.slot_range(config.local_slots))
        self.backend, self.eps = backend, config.rms_norm_eps
        self.norm = nn.LayerNorm(width, config.rms_norm_eps)
        self.has_local = slots > 0
        if self.has_local:
            self.local_keys = nn.Parameter(torch.empty(slots, width))
            self.local_values = nn.Parameter(torch.empty(slots, width))
            self.local_gate = make_gate(config)
            self.local_proj = nn.Linear(width, width, bias=False)
        if config.global_slots:
            self.global_gate = make_gate(config)
            self.global_proj = nn.Linear(width, width, bias=False)

    def normed_local_keys(self, shared: SharedRead) -> Tensor | None:
        """LN_k(K^l), [S_l, D]: once a visit, not once a loop."""
        if not self.has_local:
            return None
        return F.layer_norm(self.local_keys, self.local_keys.shape[-1:], *shared.key_norm, eps=self.eps)

    def forward(
        self, hidden: Tensor, shared: SharedRead, local_keys: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """inject(h): [B, T', D] -> ([B, T', D], local gate [B, T', D | 1] or None, global gate or None)."""
        query = F.layer_norm(self.norm(hidden), hidden.shape[-1:], *shared.query_norm, eps=self.eps)
        query = self.backend.enter_read(query)
        reads: list[SlotRead] = []
        if local_keys is not None:
            reads.append(dense_read(query, local_keys, self.local_values))
        if shared.global_keys is not None and shared.global_values is not None:
            reads.append(dense_read(query, shared.global_keys, shared.global_values))
        mixed = iter(self.backend.softmax_reads(reads))

        injected, local_gate, global_gate = hidden, None, None
        if local_keys is not None:
            local_gate = self.local_gate(hidden)
            injected = injected + local_gate * self.local_proj(next(mixed))
        if shared.global_keys is not None:
            global_gate = self.global_gate(hidden)
            injected = injected + global_gate * self.global_proj(next(mixed))
        return injected, local_gate, global_gate


def dense_read(query: Tensor, keys: Tensor, values: Tensor) -> SlotRead:
    """All [S, D] slots are candidates; written out, for one head of width D is too wide for fused attention."""
    scores = F.linear(query, keys * query.shape[-1] ** -0.5)
    return SlotRead(scores, lambda weights: weights @ values)


class LinearGate(nn.Module):
    """sigmoid(A h + a) in (0, 1): one gate a channel (vector) or one a token (scalar); h is not normalised."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(hidden, self.weight, self.bias))


class ConstantGate(nn.Module):
    """sigmoid(g0), for ever: no parameters."""

    def __init__(self, gate_init_bias: float) -> None:
        super().__init__()
        self.value = 1 / (1 + math.exp(-gate_init_bias))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.full_like(hidden[..., :1], self.value)


def make_gate(config: Any) -> nn.Module:
    """The gate of `config.gate`: a new kind of gate is a new line here."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "vector": lambda: LinearGate(nn.Linear(config.hidden_size, config.hidden_size)),
        "scalar": lambda: LinearGate(nn.Linear(config.hidden_size, 1)),
        "constant": lambda: ConstantGate(config.gate_init_bias),
    }
    if config.gate not in makers:
        raise ValueError(f"gate {config.gate!r} is not known; valid: {', '.join(makers)}")
    return makers[config.gate]()
