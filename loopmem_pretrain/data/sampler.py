"""Batches for each data-parallel rank, cut out of the one order of samples.

A step consumes the next `global_batch_size` samples of the run. Micro-batch m of rank r takes

    first + m * (micro_batch_size * dp_size) + r * micro_batch_size + (0 ... micro_batch_size - 1)

so a global batch holds the same samples at any data-parallel size, and a resumed run needs one number, the samples
consumed so far, also when the batch size or the number of ranks has changed in between.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from loopmem_pretrain.data.dataset import BlendedDataset, ValidationDataset
from loopmem_pretrain.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Batch = tuple[torch.Tensor, torch.Tensor]

PREFETCH = 4  # micro-batches each worker reads ahead

# Signals that a scheduler or a terminal sends to every process of a job, meant for the trainer alone.
_JOB_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def batch_indices(
    first_sample: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """The micro-batches of one rank in the step whose first sample is `first_sample` (samples consumed before it).

    Returns:
        global_batch_size / (micro_batch_size * dp_size) lists of `micro_batch_size` sample indices.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    per_pass = _samples_per_pass(micro_batch_size, dp_rank, dp_size)
    if global_batch_size <= 0 or global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x {dp_size} data-parallel ranks = {per_pass}",
            f"set training.global_batch_size to a multiple of {per_pass}, or change micro_batch_size or the ranks",
        )
    starts = range(first_sample + dp_rank * micro_batch_size, first_sample + global_batch_size, per_pass)
    return [list(range(start, start + micro_batch_size)) for start in starts]


def train_batches(
    dataset: BlendedDataset,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    num_workers: int,
    pin_memory: bool,
) -> "Iterator[Batch]":
    """Endless micro-batches of one rank, from sample `consumed_samples` of the run on.

    Each item is (input_ids [B, T], labels [B, T]), int64, B = micro_batch_size; labels[b, t] is the token after
    input_ids[b, t], already shifted. The stream does not depend on `num_workers`. Workers live as long as the
    iterator; close() it, drop it or leave the program to end them.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank (at once, not at next()).
        EnvironmentFault: a worker process died (at next()).
    """
    shape = {
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
        "dp_rank": dp_rank,
        "dp_size": dp_size,
    }
    batch_indices(consumed_samples, **shape)  # complains now, in the caller's frame

    def micro_batches() -> Iterator[list[int]]:
        first = consumed_samples
        while True:
            yield from batch_indices(first, **shape)
            first += global_batch_size

    return _load(dataset, micro_batches, num_workers, pin_memory)


def validation_samples(dataset: ValidationDataset, *, micro_batch_size: int, dp_size: int) -> int:
    """Samples a validation reads: `num_samples` rounded up to whole micro-batches on every rank.

    Raises:
        DataError: the validation splits do not hold that many.
    """
    per_pass = _samples_per_pass(micro_batch_size, 0, dp_size)
    samples = -(-dataset.num_samples // per_pass) * per_pass
    dataset.require(samples)
    return samples


def validation_batches(
    dataset: ValidationDataset, *, micro_batch_size: int, dp_rank: int, dp_size: int, pin_memory: bool
) -> "Iterator[Batch]":
    """One pass over the validation samples of this rank; items as `train_batches` gives them, equally many a rank.

    Read in the calling process: a validation is short, and starting workers in the midst of training is not.

    Raises:
        DataError: the validation splits do not hold enough samples (at once, not at next()).
    """
    samples = validation_samples(dataset, micro_batch_size=micro_batch_size, dp_size=dp_size)
    indices = batch_indices(
        0, global_batch_size=samples, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size
    )
    return _load(dataset, lambda: iter(indices), 0, pin_memory)


def _samples_per_pass(micro_batch_size: int, dp_rank: int, dp_size: int) -> int:
    if micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"micro_batch_size {micro_batch_size}, data-parallel rank {dp_rank} of {dp_size}")
    return micro_batch_size * dp_size


class _BatchSampler:
    """A DataLoader's batch sampler; `start` begins the stream of index lists."""

    def __init__(self, start: Callable[[], Iterator[list[int]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        return self.start()


def _load(
    dataset: Any, micro_batches: Callable[[], Iterator[list[int]]], num_workers: int, pin_memory: bool
) -> "Iterator[Batch]":
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=_BatchSampler(micro_batches),  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_WorkerSignals() if num_workers else None,
        prefetch_factor=PREFETCH if num_workers else None,
        generator=torch.Generator().manual_seed(0),  # or it would draw from, and so change, the global one
    )
    return _checked(_iterate(loader))


def _iterate(loader: Any) -> Iterator[Any]:
    """iter(loader), whose workers take no signal before they are ready for it, and without torch's SIGCHLD handler.

    That handler raises wherever the trainer happens to be when a worker dies, perhaps within a collective or half
    of a checkpoint. Without it the death is raised by next(), at most five seconds later.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()  # torch sets no handler elsewhere
    on_child_ends = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)  # workers inherit it
    try:
        batches: Iterator[Any] = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if on_main_thread:
            signal.signal(signal.SIGCHLD, on_child_ends)
    return batches


def _checked(batches: Iterator[Any]) -> "Iterator[Batch]":
    try:
        for batch in batches:
            yield batch[0], batch[1]  # pinning has made the pair a list
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise EnvironmentFault(
            f"a process that reads training data died: {error}",
            "look for an out-of-memory kill (dmesg) and for shards changed or removed under the run, then start the "
            "run again; data.num_workers: 0 reads without extra processes",
        ) from error


def _collate(samples: "list[NDArray[np.int64]]") -> "Batch":
    import numpy as np
    import torch

    tokens = torch.from_numpy(np.stack(samples))  # [B, T + 1]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class _WorkerSignals:
    """Keeps a worker alive through the signals that ask the trainer to save and stop.

    SLURM and a terminal's Ctrl-C signal every process of a job. A worker that died of it would break the very
    steps and the checkpoint the signal asks for, so workers ignore all of them but one: SIGTERM is also how
    Python ends its children when the trainer exits, and a worker that ignored that would hang the exit. A byte
    shared with the trainer, set at its exit, tells the two apart; a trainer that is killed is noticed by the
    DataLoader's own watchdog within seconds.
    """

    def __init__(self) -> None:
        self.exiting = multiprocessing.RawValue(ctypes.c_bool, False)
        # Registered after multiprocessing's own exit handler, therefore run before it.
        atexit.register(self._mark_exit, os.getpid())

    def _mark_exit(self, pid: int) -> None:
        if os.getpid() == pid:
            self.exiting.value = True

    def __call__(self, worker_id: int) -> None:
        for number in _JOB_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self.exiting.value:
            os._exit(0)
