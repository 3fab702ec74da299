"""The key/value cache of generation: a slot for each layer and loop, with room for the tokens to come.

transformers' own layers copy all earlier tokens for every new one, in every loop, those that nobody runs included.
"""

# transformers annotates a part of itself only:
# mypy: disable-error-code="misc,no-untyped-call,no-any-return"

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

ROOM = 64
"""Tokens that a slot makes room for at least, beyond those it holds."""


class RoomyLayer(DynamicLayer):
    """Keys and values [B, K, S, d] as views of buffers with room for more: a new token is written, nothing is copied.

    What reorders, crops or repeats the cache replaces `keys` and `values`; those that are no longer the buffers'
    beginning are copied into new ones when the next token comes. After a crop the next tokens are written over those
    that were dropped, also where somebody still holds a view of them: keep a copy instead.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        if torch.is_grad_enabled():  # what is differentiated may not be written over, and queries alone may be
            return super().update(key_states, value_states, *args, **kwargs)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = self._append("key_room", self.keys, key_states)
        self.values = self._append("value_room", self.values, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens; a slot that no token has reached, of a loop that its layer does not run, has none."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def _append(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        length = 0 if held is None else held.shape[-2]
        total = length + new.shape[-2]
        room = getattr(self, name, None)
        if room is None or held is None or not _begins(room, held, total):
            room = new.new_empty(*new.shape[:-2], total + max(ROOM, total // 4), new.shape[-1])
            if held is not None:
                room[..., :length, :] = held
            setattr(self, name, room)
        room[..., length:total, :] = new
        return room[..., :total, :]


def _begins(room: Tensor, held: Tensor, total: int) -> bool:
    """Whether `held` is the beginning of `room`, which has place for `total` tokens and may be written."""
    same = room.data_ptr() == held.data_ptr() and room.shape[:-2] == held.shape[:-2] and room.stride() == held.stride()
    return same and total <= room.shape[-2] and (torch.is_inference_mode_enabled() or not room.is_inference())


def cache_with_slots(cache: DynamicCache, loops: Sequence[int], batch: int) -> int:
    """Give an empty cache its slots, or check those of a filled one; returns how many tokens it holds.

    Slot (n - 1) * L + l is loop n of layer l. DynamicCache(config=...), which `generate` makes, has one slot a layer
    and does not grow by itself.

    Args:
        cache: empty, or what an earlier call returned.
        loops: how many loops each layer runs at most.
        batch: sequences of this call.

    Raises:
        ValueError: it was filled with other numbers of loops or of sequences, or it moves slots to the CPU.
    """
    _refuse_offloading(cache)
    filled = {slot for slot in range(len(cache.layers)) if cache.get_seq_length(slot) > 0}
    if not filled:
        cache.layers[:] = [RoomyLayer() for _ in range(len(loops) * max(loops))]
    else:
        _require_slots(filled, _slots(loops))
        _require_batch(cache.layers[0], batch)
    return int(cache.get_seq_length())


def static_cache_with_slots(cache: StaticCache, loops: Sequence[int], batch: int) -> int:
    """The same for a cache of fixed size, which compiled code can write; returns that size."""
    _refuse_offloading(cache)
    size, used = int(cache.layers[0].get_max_length()), _slots(loops)
    made = {slot for slot, layer in enumerate(cache.layers) if getattr(layer, "is_initialized", False)}
    if made != used:
        if made and int(cache.get_seq_length()):
            _require_slots(made, used)
        cache.layers[:] = [StaticLayer(max_cache_len=size) for _ in range(len(loops) * max(loops))]
    elif made:
        _require_batch(cache.layers[0], batch)
    return size


def _refuse_offloading(cache: DynamicCache | StaticCache) -> None:
    if cache.offloading:
        raise ValueError(
            "past_key_values is offloading: it would fetch the slots of the next layer, and a layer reads those of its "
            "next loop; leave cache_implementation out, or use 'static'"
        )


def _require_batch(layer: Any, batch: int) -> None:
    held = layer.keys.shape[0]
    if held != batch:
        raise ValueError(f"past_key_values holds {held} sequences and this call has {batch}")


def _slots(loops: Sequence[int]) -> set[int]:
    return {n * len(loops) + layer for layer, most in enumerate(loops) for n in range(most)}


def _require_slots(filled: set[int], needed: set[int]) -> None:
    if filled != needed:
        others = ", and they are of other loops" if len(filled) == len(needed) else ""
        raise ValueError(
            f"past_key_values holds {len(filled)} slots and this call needs {len(needed)}, one for each layer and "
            f"loop{others}: continue with the model and the num_loops that filled it"
        )
