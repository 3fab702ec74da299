"""What generation adds to a forward pass: positions, a padding mask, and the keys and values of earlier tokens.

In loop n a token attends to what the earlier tokens were in loop n, so every layer keeps keys and values of each loop:
slot (n - 1) * L + l is loop n of layer l. Memory banks depend on no other token and need no cache.

T tokens of this pass follow `earlier` ones in the cache. Imports torch and the standard library only: the exported
Hugging Face model inlines this file as text.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v: [B, H, T, d] queries, [B, K, S, d] keys and values -> [B, H, T, d].

    `mask` is bool, whether a token sees another; without one S = T and a token sees all up to itself, or T = 1 and it
    sees all there is.
    """
    causal = mask is None and queries.shape[2] > 1
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class Attends(Protocol):
    """Attention of a pass that is told more than training is."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As the function `attend`; keys and values are those of this pass alone."""


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, by slot. transformers' DynamicCache is one."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, d] to slot `layer_idx`; returns all keys and values of that slot."""


class Decoding(NamedTuple):
    """What layers are told in generation; training passes none: sequences are whole, unpadded, from position 0."""

    positions: Tensor
    """of the T tokens, [T] or [B, T]"""
    mask: Tensor | None
    """bool, whether a token sees another, [T, S] or [B, 1, T, S], S = earlier + T or the cache's fixed size; None: all
    up to itself, which attention can tell where there are no earlier ones or T is 1"""
    cache: KeyValueCache | None
    real: Tensor | None = None
    """bool, which tokens are no padding, [B, earlier + T]; None: all"""
    slot: int = 0

    def at(self, slot: int) -> "Decoding":
        """The same for one layer and loop."""
        return self._replace(slot=slot)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these tokens -> those of the earlier ones and these."""
        return (keys, values) if self.cache is None else self.cache.update(keys, values, self.slot)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention to the earlier tokens and to these."""
        return attend(queries, *self.extend(keys, values), self.mask)


def make_decoding(
    tokens: int,
    earlier: int | Tensor,
    device: torch.device,
    real: Tensor | None = None,
    positions: Tensor | None = None,
    cache: KeyValueCache | None = None,
    width: int | None = None,
) -> Decoding:
    """Positions and mask of `tokens` tokens after `earlier` ones in `cache`.

    Args:
        tokens: T, tokens of this forward pass.
        earlier: tokens in the cache, as a tensor where the host does not know.
        device: of the model's input.
        real: bool [B, earlier + T] or [B, width], False where a token is padding; None without padding.
        positions: of the T tokens, where they do not count the real tokens from 0.
        cache: takes and gives keys and values; None for a pass that is not continued.
        width: keys that a slot has at any time, with a cache of fixed size; None: earlier + T.
    """
    own = earlier + torch.arange(tokens, device=device)
    if positions is None:
        positions = own if real is None else (real.cumsum(-1) - 1).clamp_min(0)[:, own]
    mask = None
    if real is not None or width is not None or (earlier and tokens > 1):
        index = torch.arange(int(earlier) + tokens if width is None else width, device=device)
        mask = index <= own[:, None]
        if real is not None:  # padding sees itself, so that no softmax is empty
            mask = mask & real[:, None, None, :] | (index == own[:, None])
    return Decoding(positions, mask, cache, real)
