"""Early exit: at inference a token leaves a layer as soon as a rule says so, whoever else is in the batch.

One visit of a looped layer of at most N loops (`visit`):

      all tokens that are no padding are in the layer        R_0 = 1,  y = 0
    ------------------------------------------------------------------------------ n = 1 .. N
      h, R, y   of the tokens in the layer, packed: [n_active, D]
      k, v      theirs of this loop, and of every other token those of its last loop (PackedAttention)
      h         = memory and block, as in training, with attention to these k, v
      p_n       = R * lambda_n;  R -= p_n
      p_n      += R   where the token leaves: where the rule says so, in loop N everywhere
      y        += p_n * h
    ------------------------------------------------------------------------------
      y                                                      and how many loops each token ran

A token that has left costs no memory read, projection, feed-forward or router. In the later loops of this layer its
keys and values are those of its last loop, so later tokens, of this pass or another, find it in every loop they run.

Only the device knows how many tokens stay: each loop but the last copies one bool a token to the host and waits for it.
Imports torch, the standard library and files beside it only: the exported Hugging Face model inlines the files as text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmem_pretrain.model.backend import wide
from loopmem_pretrain.model.block import Rotary
from loopmem_pretrain.model.decoding import Decoding, attend, make_decoding
from loopmem_pretrain.model.loopmem import (
    LoopedLayer,
    LoopMemBody,
    NumLoops,
    expected_loops,
    halting_lambda,
    token_norm,
)
from loopmem_pretrain.model.memory import SharedRead

# ------------------------------------------------------------------------------------------------ who leaves, and when


class EarlyExit(NamedTuple):
    """When a token leaves a layer before its last loop."""

    threshold: float
    """t in (0, 1)"""
    rule: str
    """one of EXIT_RULES"""


def halting_mass(threshold: float, remaining: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    """1 - R_n >= t: the router has given out a share t of the token's mass."""
    return remaining <= 1 - threshold


def small_change(threshold: float, remaining: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    """|h_n - h_{n-1}| <= (1 - t) |h_n|: the loop has hardly changed the token; no gate is asked."""
    return token_norm(hidden - before) <= (1 - threshold) * token_norm(hidden)


EXIT_RULES: Mapping[str, Callable[[float, Tensor, Tensor, Tensor], Tensor]] = {
    "halting": halting_mass,
    "confidence": small_change,
}
"""(t, R_n, h_n, h_{n-1}) -> which tokens leave after loop n: a new rule is a new function and a line here."""


def early_exit(threshold: float | None, rule: str) -> EarlyExit | None:
    """None where all loops run: no threshold, or 1."""
    return None if threshold is None or threshold == 1 else EarlyExit(threshold, rule)


class ExitStats(NamedTuple):
    """What one visit of a looped layer did; zeros for padding."""

    halting_probs: Tensor
    """p_n per token, [B, T, N]; sums to 1, zero after the loop at which the token left"""
    loops: Tensor
    """loops that each token ran, [B, T]"""

    def expected_loops(self) -> Tensor:
        """E per token, [B, T]."""
        return expected_loops(self.halting_probs)


# ------------------------------------------------------------------------------------------------------------ packing


class Tokens(NamedTuple):
    """The n tokens that are in the layer, packed."""

    hidden: Tensor
    """h, [1, n, D], model dtype"""
    remaining: Tensor
    """R, [1, n], float32 or wider"""
    output: Tensor
    """y so far, [1, n, D], float32 or wider"""
    rotary: Rotary
    """of their positions, [n, 1, d]"""

    def take(self, chosen: Tensor | None) -> "Tokens":
        """Those among them with these numbers; None: all."""
        if chosen is None:
            return self
        rotary = Rotary(self.rotary.cos[chosen], self.rotary.sin[chosen])
        return Tokens(self.hidden[:, chosen], self.remaining[:, chosen], self.output[:, chosen], rotary)


class PackedAttention:
    """Which tokens are in the layer, and their attention to the keys and values of all, whoever is in it.

    Args:
        decoding: positions, padding and cache, of loop 1.
        batch: B.
        length: T.
        unfilled: zeros [B * T, K, d]: keys and values of tokens that are never in the layer, at which nobody looks.
    """

    def __init__(self, decoding: Decoding, batch: int, length: int, unfilled: Tensor) -> None:
        self.decoding, self.batch, self.length = decoding, batch, length
        self.keys = self.values = unfilled
        """of all tokens, in their last loop, [B * T, K, d]"""
        self.index: Tensor | None = None
        """which of the B * T tokens are in the layer, ascending; None: all"""
        self.counts: list[int] = []
        """how many of each sequence, where they are not all"""

    def narrow(self, stays: Tensor) -> Tensor | None:
        """Keep those of the n tokens in the layer; returns their numbers among the n, or None where all stay."""
        host = stays.cpu()  # waits for the device
        chosen = host.nonzero().squeeze(1)
        if len(chosen) == len(host):
            return None
        index = chosen if self.index is None else self.index.cpu()[chosen]
        self.counts = torch.bincount(index // self.length, minlength=self.batch).tolist()
        self.index = index.to(stays.device)
        return chosen.to(stays.device)

    def place(self, whole: Tensor, part: Tensor) -> Tensor:
        """`whole` [B * T, ..] with the packed tokens' `part` [n, ..] in their places."""
        return part if self.index is None else whole.to(part.dtype).index_copy(0, self.index, part)

    def extend(self) -> tuple[Tensor, Tensor]:
        """Put keys and values into the cache for one loop; returns those of earlier tokens too, [B, K, S, d]."""
        shape = (self.batch, self.length, *self.keys.shape[1:])
        keys, values = (part.view(shape).transpose(1, 2) for part in (self.keys, self.values))
        return self.decoding.extend(keys, values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[1, heads, n, d] of the packed tokens -> [1, H, n, d]."""
        self.keys = self.place(self.keys, keys[0].transpose(0, 1))
        self.values = self.place(self.values, values[0].transpose(0, 1))
        keys, values = self.extend()
        if self.index is None:
            queries = queries.view(-1, self.batch, self.length, queries.shape[-1]).transpose(0, 1)
            return attend(queries, keys, values, self.decoding.mask).transpose(0, 1).flatten(1, 2).unsqueeze(0)
        # Sequence by sequence, reading keys where they lie: to gather the keys of some sequences would copy more than
        # attention in all of them reads.
        columns = torch.split(self.index % self.length, self.counts)
        parts = torch.split(queries, self.counts, dim=2)
        mixed = [
            attend(parts[row], keys[row : row + 1], values[row : row + 1], self._seen(row, columns[row], keys.shape[2]))
            for row, count in enumerate(self.counts)
            if count
        ]
        return torch.cat(mixed, dim=2)

    def _seen(self, row: int, columns: Tensor, width: int) -> Tensor | None:
        """Which of `width` keys the tokens at `columns` of a sequence see, [1, 1, n, width]; None: all."""
        real = None if self.decoding.real is None else self.decoding.real[row]
        if self.length == 1:
            return None if real is None else real[None, None, None]
        seen = torch.arange(width, device=columns.device) <= (width - self.length + columns).unsqueeze(-1)
        return (seen if real is None else seen & real)[None, None]


# ------------------------------------------------------------------------------------------------ one layer, all layers


def visit(
    layer: LoopedLayer,
    hidden: Tensor,
    memory: SharedRead | None,
    loops: int,
    decoding: Decoding | None,
    early: EarlyExit,
) -> tuple[Tensor, ExitStats]:
    """[B, T, D] -> ([B, T, D], ExitStats): the drawing at the head of this file."""
    (batch, length, width), precise, device = hidden.shape, wide(hidden.dtype), hidden.device
    everyone = batch * length
    decoding = make_decoding(length, 0, device) if decoding is None else decoding
    angles = layer.rotary(hidden, decoding)
    rotary = Rotary(*(part.expand(batch, length, *part.shape[-2:]).flatten(0, 1) for part in angles))
    banks = layer.banks(memory, everyone * loops)
    zeta, router = F.softplus(layer.step_scales.to(precise)), layer.halting(precise)
    output = torch.zeros(everyone, width, device=device, dtype=precise)
    nowhere = output.new_zeros(everyone)
    tokens = Tokens(hidden.reshape(1, everyone, width), torch.ones_like(nowhere)[None], output[None], rotary)
    unfilled = hidden.new_zeros(everyone, layer.self_attn.kv_heads, layer.self_attn.head_dim)
    packed = PackedAttention(decoding, batch, length, unfilled)
    if decoding.real is not None:
        tokens = tokens.take(packed.narrow(decoding.real[:, -length:].flatten()))
    probs, ran = [], torch.zeros(everyone, device=device, dtype=torch.long)
    for n in range(1, loops + 1):
        packed.decoding = decoding.at(layer.slot(n))
        if not tokens.hidden.shape[1]:  # all have left: their keys and values are all that is left to do
            packed.extend()
            probs.append(nowhere)
            continue
        before = injected = tokens.hidden
        if layer.memory is not None and banks is not None:
            injected, _, _ = layer.memory(before, banks)
        zeta_n, tau_n = layer.step(zeta, n)
        after = layer.block(injected, zeta_n, tokens.rotary, packed)
        prob = tokens.remaining * halting_lambda(router, after, tau_n)
        remaining = tokens.remaining - prob
        leaves = torch.ones_like(remaining, dtype=torch.bool)
        if n < loops:
            leaves = EXIT_RULES[early.rule](early.threshold, remaining, after, before)
        prob = torch.where(leaves, tokens.remaining, prob)
        tokens = Tokens(after, remaining, tokens.output + prob.unsqueeze(-1) * after, tokens.rotary)
        output = packed.place(output, tokens.output[0])  # the last time that a token is placed is when it leaves
        probs.append(packed.place(nowhere, prob[0]))
        ran = packed.place(ran, torch.full_like(ran[: prob.shape[1]], n))
        if n < loops:
            tokens = tokens.take(packed.narrow(~leaves[0]))
    stats = ExitStats(torch.stack(probs, dim=-1).view(batch, length, loops), ran.view(batch, length))
    return output.to(hidden.dtype).view(batch, length, width), stats


def exit_forward(
    model: LoopMemBody,
    input_ids: Tensor,
    early: EarlyExit,
    num_loops: NumLoops = None,
    decoding: Decoding | None = None,
    on_layer: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, list[ExitStats]]:
    """LoopMemBody.forward with early exit: [B, T] -> (hidden [B, T, D] after the final norm, one ExitStats a layer).

    Args:
        model: of looped layers.
        input_ids: token ids, or embeddings [B, T, D].
        early: when tokens leave.
        num_loops: the most loops that a layer runs, where not max_loops.
        decoding: positions, padding and cache, as for LoopMemBody.forward.
        on_layer: is told what each layer is given.
    """
    return model(input_ids, num_loops, decoding, partial(visit, early=early), on_layer)
