"""Gated memory banks: learned slots that every loop reads before its block.

    q         = LN_q(LN_m(h))                                  query; no projection, one head of width D
    m_x       = softmax(q LN_k(K_x)^T / sqrt(D)) V_x           x = the layer's local bank, the global bank of all layers
    g_x       = sigmoid(A_x h + a_x)                           gate
    inject(h) = h + sum over x of g_x * (P_x m_x)              what the block of this loop starts from

P_x m_x = softmax(..) (V_x P_x^T): P_x is applied once a visit to the slots where they are fewer than the tokens that
read them in all loops of the visit, as in training, and else to what each token has read, as in generation.

`LayerMemory` is what a layer owns, `SharedMemory` what all layers share. A large global bank is read through its k
best slots only (`RETRIEVALS`); local banks are small and read whole. Where ranks hold different slots of a bank, the
backend merges their softmaxes (model/backend.py), so a retrieval returns scores and never normalises them itself.
Imports torch and model/backend.py only: the exported Hugging Face model inlines this file as text.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmem_pretrain.model.backend import Backend, SlotRead

SEARCH_BYTES = 2**28
"""What the scores of one chunk of slots may take while the best slots of a large bank are searched."""


class SharedRead(NamedTuple):
    """What every layer needs of the memory the layers share; made once a forward pass by SharedMemory."""

    query_norm: tuple[Tensor, Tensor]
    key_norm: tuple[Tensor, Tensor]
    global_keys: Tensor | None  # LN_k(K^G), [S_g, D] or this rank's slots of it; product keys: both halves, [2, n, D/2]
    global_values: Tensor | None  # V^G, [S_g, D] or this rank's slots of it


class SharedMemory(nn.Module):
    """The global bank, and the two LayerNorms (LN_q, LN_k) that all layers and both banks share.

    With product keys, n^2 = S_g, the bank has `global_subkeys` [2, n, D/2] in place of `global_keys` [S_g, D]; every
    rank holds all of them, of the values its own slots.
    """

    global_keys: nn.Parameter | None
    global_subkeys: nn.Parameter | None
    global_values: nn.Parameter | None

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        width = config.hidden_size
        self.query_norm, self.key_norm = (nn.LayerNorm(width, config.rms_norm_eps) for _ in range(2))
        self.global_keys = self.global_subkeys = self.global_values = None
        if config.global_slots:
            slots = len(backend.slot_range(config.global_slots))
            if config.retrieval == "product_keys":
                self.global_subkeys = nn.Parameter(torch.empty(2, math.isqrt(config.global_slots), width // 2))
            else:
                self.global_keys = nn.Parameter(torch.empty(slots, width))
            self.global_values = nn.Parameter(torch.empty(slots, width))

    def forward(self) -> SharedRead:
        """Normalise the keys once for all reads of a forward pass: one more copy of them, and of their gradient."""
        q_norm, k_norm = self.query_norm, self.key_norm
        keys = None
        if self.global_keys is not None:
            keys = k_norm(self.global_keys)
        elif self.global_subkeys is not None:
            # Each half-key by itself, with its half of LN_k's weight and bias: the norm of a whole key would mix its
            # halves, and its scores would no longer be sums of two.
            normed = F.layer_norm(self.global_subkeys, self.global_subkeys.shape[-1:], eps=k_norm.eps)
            keys = normed * k_norm.weight.view(2, 1, -1) + k_norm.bias.view(2, 1, -1)
        return SharedRead((q_norm.weight, q_norm.bias), (k_norm.weight, k_norm.bias), keys, self.global_values)


class Bank(NamedTuple):
    """One bank as every loop of a visit reads it."""

    keys: Tensor
    """LN_k(K), [S, D] or this rank's slots of it; product keys: both halves, [2, n, D/2]"""
    values: Tensor
    """V, or V P^T where it is projected, [S, D] or this rank's slots of it"""
    projected: bool


class LayerBanks(NamedTuple):
    """What the loops of one visit of a layer read; made once a visit by LayerMemory.banks."""

    query_norm: tuple[Tensor, Tensor]
    local_bank: Bank | None
    global_bank: Bank | None


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
            if config.retrieval not in RETRIEVALS:
                raise ValueError(f"retrieval {config.retrieval!r} is not known; valid: {', '.join(RETRIEVALS)}")
            self.read_global = RETRIEVALS[config.retrieval]
            k = config.global_slots if config.retrieval == "dense" else config.retrieval_topk
            self.lookup = Lookup(k, backend.slot_range(config.global_slots), backend)
            self.global_gate = make_gate(config)
            self.global_proj = nn.Linear(width, width, bias=False)

    def banks(self, shared: SharedRead, reads: int) -> LayerBanks:
        """What is the same in all loops of a visit: LN_k(K^l), and V P^T where there are at most `reads` slots.

        `reads` is how often P would be applied otherwise: tokens in this rank's part of the stream times loops.
        """
        local_bank = global_bank = None
        if self.has_local:
            keys = F.layer_norm(self.local_keys, self.local_keys.shape[-1:], *shared.key_norm, eps=self.eps)
            local_bank = self._bank(keys, self.local_values, self.local_proj, reads)
        if shared.global_keys is not None and shared.global_values is not None:
            global_bank = self._bank(shared.global_keys, shared.global_values, self.global_proj, reads)
        return LayerBanks(shared.query_norm, local_bank, global_bank)

    def _bank(self, keys: Tensor, values: Tensor, proj: nn.Module, reads: int) -> Bank:
        projected = len(values) <= reads
        return Bank(keys, self.backend.project_slots(proj, values) if projected else values, projected)

    def forward(self, hidden: Tensor, banks: LayerBanks) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """inject(h): [B, T', D] -> ([B, T', D], local gate [B, T', D | 1] or None, global gate or None)."""
        query = F.layer_norm(self.norm(hidden), hidden.shape[-1:], *banks.query_norm, eps=self.eps)
        query = self.backend.enter_read(query)
        reads: list[SlotRead] = []
        if (bank := banks.local_bank) is not None:
            reads.append(dense_read(query, bank.keys, bank.values))
        if (bank := banks.global_bank) is not None:
            reads.append(self.read_global(query, bank.keys, bank.values, self.lookup))
        mixed = iter(self.backend.softmax_reads(reads))

        injected, local_gate, global_gate = hidden, None, None
        if (bank := banks.local_bank) is not None:
            local_gate = self.local_gate(hidden)
            injected = injected + local_gate * (next(mixed) if bank.projected else self.local_proj(next(mixed)))
        if (bank := banks.global_bank) is not None:
            global_gate = self.global_gate(hidden)
            injected = injected + global_gate * (next(mixed) if bank.projected else self.global_proj(next(mixed)))
        return injected, local_gate, global_gate


def dense_read(query: Tensor, keys: Tensor, values: Tensor) -> SlotRead:
    """All [S, D] slots are candidates; written out, for one head of width D is too wide for fused attention."""
    scores = F.linear(query, keys * query.shape[-1] ** -0.5)
    return SlotRead(scores, lambda weights: weights @ values)


class Lookup(NamedTuple):
    """What a retrieval needs to know besides query, keys and values."""

    k: int
    """slots that a token reads, of all ranks"""
    slots: range
    """the slots of the bank that this rank holds"""
    backend: Backend


def topk_read(query: Tensor, keys: Tensor, values: Tensor, lookup: Lookup) -> SlotRead:
    """The k slots with the largest scores, found exactly: all [S, D] keys are scored, without gradient.

    Costs memory: the selected keys, [B, T, k, D], are kept for the backward pass of each read (recomputing loops frees
    them), and there each read makes a gradient of the size of the keys and one of the size of the values.
    """
    query = query * query.shape[-1] ** -0.5
    slots = best_slots(query, keys, lookup.k)
    scores = (F.embedding(slots, keys) @ query.unsqueeze(-1)).squeeze(-1)
    counts = lookup.backend.top_candidates(scores.detach(), lookup.k)
    return SlotRead(scores.masked_fill(~counts, -math.inf), mixture_of(slots, values))


def best_slots(query: Tensor, keys: Tensor, k: int) -> Tensor:
    """The min(k, S) slots of [S, D] keys with the largest q . k, best first: [B, T, k], without gradient.

    Scores are made for a chunk of slots at a time, SEARCH_BYTES of them; [B, T, S] never exists. They have the query's
    dtype; which of several slots with equal scores are taken is torch.topk's choice.
    """
    chunk = max(k, SEARCH_BYTES // (query[..., 0].numel() * query.element_size()))
    with torch.no_grad():
        best, found = query[..., :0], query[..., :0].long()
        for start in range(0, len(keys), chunk):
            part = keys[start : start + chunk]
            scores, slots = F.linear(query, part).topk(min(k, len(part)), dim=-1)
            best, found = torch.cat((best, scores), dim=-1), torch.cat((found, slots + start), dim=-1)
            best, order = best.topk(min(k, best.shape[-1]), dim=-1)
            found = found.gather(-1, order)
    return found


def product_key_read(query: Tensor, subkeys: Tensor, values: Tensor, lookup: Lookup) -> SlotRead:
    """The k slots with the largest scores, by product keys (Lample et al., 2019, arXiv 1907.05242).

    Slot i n + j has the key [subkeys[0, i]; subkeys[1, j]], so its score is the sum of one score of each half of the
    query, and the k best slots are among the k x k sums of the k best of each half. `subkeys` [2, n, D/2] are the same
    on all ranks, `values` [S, D] are this rank's slots: every rank finds the same k and counts those it holds.
    """
    first, second = (query * query.shape[-1] ** -0.5).chunk(2, dim=-1)
    best_rows, i = F.linear(first, subkeys[0]).topk(lookup.k, dim=-1)
    best_columns, j = F.linear(second, subkeys[1]).topk(lookup.k, dim=-1)
    # Gradients go through topk, which takes no score twice: gathering half-scores, which sums share, would add their
    # gradients up in no fixed order on a GPU, and tensor-parallel ranks would drift apart.
    scores, pairs = (best_rows.unsqueeze(-1) + best_columns.unsqueeze(-2)).flatten(-2).topk(lookup.k, dim=-1)
    i, j = i.gather(-1, pairs // lookup.k), j.gather(-1, pairs % lookup.k)
    slots = i * subkeys.shape[1] + j - lookup.slots.start
    held = (slots >= 0) & (slots < len(values))
    slots = slots % len(values)  # slots that others hold have weight 0: any row will do, but not one for all
    return SlotRead(scores.masked_fill(~held, -math.inf), mixture_of(slots, values))


def mixture_of(slots: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    """weights [B, T, C] -> sum over c of weights[c] values[slots[c]], [B, T, D]; no [B, T, C, D] is made."""

    def mix(weights: Tensor) -> Tensor:
        weights = weights.flatten(0, 1).to(values.dtype)  # under autocast the softmax is float32, V P^T is not
        mixed = F.embedding_bag(slots.flatten(0, 1), values, per_sample_weights=weights, mode="sum")
        return mixed.view(*slots.shape[:2], -1)

    return mix


def all_slots_read(query: Tensor, keys: Tensor, values: Tensor, lookup: Lookup) -> SlotRead:
    """`dense_read`, called as the others are."""
    return dense_read(query, keys, values)


RETRIEVALS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Lookup], SlotRead]] = {
    "dense": all_slots_read,  # no lambda: layers hold what they read with, and a model can be pickled
    "topk": topk_read,
    "product_keys": product_key_read,
}
"""How the global bank is read, by `retrieval`; what else a new way needs: CONTRIBUTING.md, "A new variant"."""


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
    """The gate of `config.gate`; what else a new kind needs: CONTRIBUTING.md, "A new variant"."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "vector": lambda: LinearGate(nn.Linear(config.hidden_size, config.hidden_size)),
        "scalar": lambda: LinearGate(nn.Linear(config.hidden_size, 1)),
        "constant": lambda: ConstantGate(config.gate_init_bias),
    }
    if config.gate not in makers:
        raise ValueError(f"gate {config.gate!r} is not known; valid: {', '.join(makers)}")
    return makers[config.gate]()
