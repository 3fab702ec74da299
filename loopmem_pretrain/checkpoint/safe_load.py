"""Reading a checkpoint's pickles without running what they say.

A pickle names functions to call. torch's weights-only reader calls none but those that build tensors and containers,
and the classes of ALLOWED. DeepSpeed asks for the reader that calls anything, in many places; `weights_only` overrules
it.
"""

import contextlib
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from loopmem_pretrain.errors import CheckpointError

ALLOWED = {
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler",
}
"""Classes in DeepSpeed's files (ZeRO 1, 2 and 3, both engines, tensor parallelism, both precisions), by module: two
integers, an enumeration, a number with two flags. None defines how it is unpickled: only its attributes are set."""

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_FIX = "use a checkpoint that `loopmem train` wrote, untouched; ask who made this one, it may be meant to run code"


def allowed_classes() -> list[Any]:
    """The classes of ALLOWED; imports DeepSpeed."""
    from importlib import import_module

    return [getattr(import_module(module), name) for module, name in ALLOWED.items()]


def _allowed() -> list[Any]:
    """What torch's reader may call. Python 3.11.2 pickles a member of an enumeration as getattr(class, name)."""
    return [*allowed_classes(), (_member, "builtins.getattr")]


def _member(of: Any, name: str) -> object:
    """What stands in for getattr: a member of an allowed enumeration, nothing else."""
    if not (of in allowed_classes() and name in getattr(of, "__members__", ())):
        raise pickle.UnpicklingError(f"getattr of {name!r}, which is no member of an enumeration")
    return of[name]


@contextlib.contextmanager
def weights_only(checkpoint: Path) -> Iterator[None]:
    """Inside, every torch.load, DeepSpeed's too, is a weights-only one.

    Raises:
        CheckpointError: a file of `checkpoint` names something else; `check_pickles` says which file.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(_allowed()):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"a file of {checkpoint} is not only weights: {error}", _FIX) from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def pickles(checkpoint: Path) -> list[Path]:
    """Every pickle in the folder, sorted; whether the manifest lists it or not, DeepSpeed may read it."""
    return sorted(checkpoint.rglob("*.pt"))


def check_pickles(paths: Iterable[Path]) -> None:
    """See, without unpickling, that files written by torch.save name nothing but what `weights_only` allows.

    Only their structure is read, not the tensors.

    Raises:
        CheckpointError: with every other class or function that a file names.
    """
    with safe_globals(_allowed()):
        for path in paths:
            try:
                foreign = get_unsafe_globals_in_checkpoint(path)
            except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{path} is no file that torch.save wrote: {error}", _FIX) from error
            if foreign:
                raise CheckpointError(f"{path} names {', '.join(sorted(foreign))}, which are no weights", _FIX)


def load(path: Path) -> object:
    """What torch.save wrote into a file of a checkpoint; its tensors stay on the disk until they are used.

    Raises:
        CheckpointError: as `weights_only`.
    """
    with weights_only(path):
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return loaded
