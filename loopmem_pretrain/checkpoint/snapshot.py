"""States as they are at one moment: nested containers of tensors, copied to host memory or made fit to be written."""

import copy
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """Copies states to host memory, into buffers that are kept from one save to the next.

    New memory costs several times the copying itself (page faults; on a GPU pinning, too), so it is paid for once.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, name: str, state: Any) -> Any:
        """`state` with every tensor copied into a buffer of this name; copies from a GPU are still under way.

        Wait for the device before you read them. The copies are valid until the next `copy` of this name.
        """
        count = 0

        def to_buffer(tensor: Tensor) -> Tensor:
            nonlocal count
            key, count = (name, count), count + 1
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                pin = self._pin_memory and tensor.numel() > 0
                buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            return buffer.copy_(tensor.detach(), non_blocking=True)

        return map_tensors(state, to_buffer)


def frozen(state: Any) -> Any:
    """`state` with the same tensors in containers of its own: other values may change from now on."""
    return map_tensors(state, lambda tensor: tensor)


def compact(state: Any) -> Any:
    """`state` as it can be written: tensors on the CPU, and no part of a larger one, which would be written whole."""

    def alone(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()

    return map_tensors(state, alone)


def map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples with `function` of each tensor; one found twice is done once.

    A number of an enumeration becomes a plain one: how an enumeration is pickled depends on the version of Python, and
    that of 3.11.2 is a call (checkpoint/safe_load.py).
    """
    done: dict[int, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = function(value)
            return done[id(value)]
        if isinstance(value, int) and isinstance(value, enum.Enum):
            return int(value)
        if isinstance(value, dict):
            copied = copy.copy(value)  # with what subclasses carry, such as the _metadata of a state_dict
            copied.update((key, walk(item)) for key, item in value.items())
            return copied
        if isinstance(value, list):
            return [walk(item) for item in value]
        if type(value) is tuple:
            return tuple(walk(item) for item in value)
        return copy.deepcopy(value)

    return walk(state)
