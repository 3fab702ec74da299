"""Batches for each data-parallel rank, cut out of the one order of samples.

A step consumes the next `global_batch_size` samples of the run. Micro-batch m of rank r takes

    first + m * (micro_batch_size * dp_size) + r * micro_batch_size + (0 ... micro_batch_size - 1)

so a global batch holds the same samples at any data-parallel size, and a resumed run needs one number, the samples
consumed so far, also when the batch size or the number of ranks has changed in between.

Samples are read ahead by threads, not by the processes of torch's DataLoader: a read lets other Python threads run,
handing over a batch costs nothing, and there is no process to die with a lock in its hand (a DataLoader whose worker is
killed can wait for ever), to be forked beside a GPU, or to meet the signals of a job.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from loopmem_pretrain.data.dataset import BlendedDataset, ValidationDataset
from loopmem_pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]

READ_AHEAD = 4  # micro-batches each thread is ahead of the trainer


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
    input_ids[b, t], already shifted. `num_workers` threads read ahead (0: next() reads); they do not change the stream.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank (at once, not at next()).
        DataError: a shard has become shorter than it was (at next()).
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

    return _load(dataset, micro_batches(), num_workers, pin_memory)


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

    Raises:
        DataError: the validation splits do not hold enough samples (at once, not at next()).
    """
    samples = validation_samples(dataset, micro_batch_size=micro_batch_size, dp_size=dp_size)
    indices = batch_indices(
        0, global_batch_size=samples, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size
    )
    return _load(dataset, indices, 1, pin_memory)


def _samples_per_pass(micro_batch_size: int, dp_rank: int, dp_size: int) -> int:
    if micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"micro_batch_size {micro_batch_size}, data-parallel rank {dp_rank} of {dp_size}")
    return micro_batch_size * dp_size


def _load(dataset: Any, micro_batches: Iterable[list[int]], num_workers: int, pin_memory: bool) -> "Iterator[Batch]":
    import numpy as np
    import torch

    def read(micro_batch: list[int]) -> "torch.Tensor":
        return torch.from_numpy(np.stack([dataset[sample] for sample in micro_batch]))  # [B, T + 1]

    for tokens in _read_ahead(read, micro_batches, num_workers) if num_workers else map(read, micro_batches):
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        # Pinned by the caller's thread: another would open a CUDA context on GPU 0, whichever GPU is the rank's.
        yield (inputs.pin_memory(), labels.pin_memory()) if pin_memory else (inputs, labels)


def _read_ahead(
    read: "Callable[[list[int]], torch.Tensor]", micro_batches: Iterable[list[int]], threads: int
) -> "Iterator[torch.Tensor]":
    """map(read, micro_batches), in order, with reads under way for the next READ_AHEAD * threads of them."""
    todo = iter(micro_batches)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-samples")
    ahead: deque[Future[torch.Tensor]] = deque()
    try:
        ahead.extend(pool.submit(read, m) for m in islice(todo, READ_AHEAD * threads))
        while ahead:
            tokens = ahead.popleft().result()
            ahead.extend(pool.submit(read, m) for m in islice(todo, 1))
            yield tokens
    finally:
        for future in ahead:
            future.cancel()
        pool.shutdown(wait=False)
