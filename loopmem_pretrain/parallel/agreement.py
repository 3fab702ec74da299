"""Work that can fail on one rank: where it does, every rank raises, and none waits for a rank that has gone.

Both functions are collectives of the default process group.
"""

import itertools
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from loopmem_pretrain.errors import EnvironmentFault, LoopMemError
from loopmem_pretrain.parallel.start import wait

T = TypeVar("T")

_turns = itertools.count()  # every rank calls from_rank_zero equally often


def from_rank_zero(action: Callable[[], T]) -> T:
    """What `action()` returns on rank 0, on every rank, however long it takes; what it raises is raised on all."""
    store, key = c10d._get_default_store(), f"rank-zero/{next(_turns)}"
    outcome = None
    if dist.get_rank() == 0:
        outcome = _tried(action, rank=0)
        store.set(key, "")
    else:
        # The broadcast alone would give up after `parallel.collective_timeout_seconds`, which is about hangs, not about
        # the time that merging a large checkpoint takes. A rank 0 that ends takes the store with it, or torchrun ends
        # all ranks.
        while not wait(store, key, 60.0):
            pass
    told = [outcome and (outcome.result, outcome.failure)]
    dist.broadcast_object_list(told, src=0)
    result, failure = cast(tuple[T, LoopMemError | None], told[0])
    if outcome is not None:
        return outcome.settled()
    if failure is not None:
        failure.is_told = True
        raise failure
    return result


def together(action: Callable[[], T]) -> T:
    """What `action()` returns, on every rank its own; no collectives inside. Where it fails on one, all raise."""
    rank = dist.get_rank()
    outcome = _tried(action, rank)
    failures: list[LoopMemError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, outcome.failure)
    if outcome.failure is not None:
        outcome.failure.is_told = any(str(error) == str(outcome.failure) for error in failures[:rank])
        return outcome.settled()
    first = next((error for error in failures if error is not None), None)
    if first is not None:
        first.is_told = True
        raise first
    return outcome.settled()


class _Outcome(NamedTuple, Generic[T]):
    result: T | None = None
    failure: LoopMemError | None = None
    """What the other ranks are told."""
    bug: Exception | None = None
    """What this rank raises in its place: an error that nobody foresaw keeps its traceback."""

    def settled(self) -> T:
        """The result, or the error raised."""
        if self.failure is not None:
            raise self.bug or self.failure
        return cast(T, self.result)


def _tried(action: Callable[[], T], rank: int) -> _Outcome[T]:
    try:
        return _Outcome(action())
    except LoopMemError as error:
        return _Outcome(failure=error)
    except OSError as error:
        fix = "see to that file or disk (permissions, free space), then start the same command again"
        return _Outcome(failure=EnvironmentFault(f"rank {rank}: {error}", fix))
    except Exception as error:  # noqa: BLE001 - raised again in settled(), after the other ranks know
        told = EnvironmentFault(f"rank {rank} failed: {type(error).__name__}: {error}", "see the traceback there")
        return _Outcome(failure=told, bug=error)
