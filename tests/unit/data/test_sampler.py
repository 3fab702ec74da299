"""Batches: the same at any data-parallel size, from any resume point, with any number of workers; and clean ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loopmem_pretrain.data.sampler import batch_indices, train_batches, validation_batches, validation_samples
from loopmem_pretrain.errors import ConfigError, DataError, EnvironmentFault

T = 3


class Counting:
    """Sample i is tokens i*T ... i*T + T; validation may read 10 of them."""

    seq_length, num_samples, available = T, 7, 10

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        return np.arange(i * T, i * T + T + 1)

    def require(self, samples: int) -> None:
        if samples > self.available:
            raise DataError(f"{samples} of {self.available}", "fewer")


def _batches(**changes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    settings: dict = {
        "micro_batch_size": 2,
        "global_batch_size": 12,
        "dp_rank": 0,
        "dp_size": 1,
        "consumed_samples": 0,
        "num_workers": 0,
        "pin_memory": False,
    }
    return train_batches(Counting(), **(settings | changes))  # type: ignore[arg-type]


def _samples(batch: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    return [int(row[0]) // T for row in batch[0]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
@pytest.mark.parametrize("first", [0, 12, 5])
def test_every_size_gives_the_same_global_batch(first: int, dp_size: int) -> None:
    ranks = [
        batch_indices(first, global_batch_size=12, micro_batch_size=2, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert {len(rank) for rank in ranks} == {6 // dp_size}
    in_turn = [index for micro_batches in zip(*ranks, strict=True) for micro in micro_batches for index in micro]
    assert in_turn == list(range(first, first + 12))


def test_four_ranks() -> None:
    ranks = [batch_indices(100, global_batch_size=16, micro_batch_size=2, dp_rank=rank, dp_size=4) for rank in range(4)]
    assert ranks[0] == [[100, 101], [108, 109]]
    assert ranks[3] == [[106, 107], [114, 115]]


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"12 is not a multiple of micro_batch_size 2 x 4 data-parallel ranks = 8"):
        batch_indices(0, global_batch_size=12, micro_batch_size=2, dp_rank=0, dp_size=4)


def test_the_stream_complains_before_its_first_batch() -> None:
    with pytest.raises(ConfigError, match="is not a multiple"):
        _batches(dp_size=4)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_no_such_rank(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="data-parallel rank"):
        batch_indices(0, global_batch_size=12, micro_batch_size=2, dp_rank=rank, dp_size=size)


def test_labels_are_the_next_tokens() -> None:
    input_ids, labels = next(_batches())
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert labels.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert input_ids.is_contiguous()
    assert labels.is_contiguous()


@pytest.mark.parametrize("consumed", [12, 24, 7, 1])
def test_resume_is_the_uninterrupted_stream(consumed: int) -> None:
    whole = [s for batch in islice(_batches(micro_batch_size=1), 48) for s in _samples(batch)]
    resumed = [s for batch in islice(_batches(consumed_samples=consumed), 6) for s in _samples(batch)]
    assert resumed == whole[consumed : consumed + 12]


def test_resume_with_other_batches_and_ranks_skips_and_repeats_nothing() -> None:
    before = [s for batch in islice(_batches(), 12) for s in _samples(batch)]  # two steps of 12
    ranks = [
        _batches(consumed_samples=24, global_batch_size=6, micro_batch_size=1, dp_rank=r, dp_size=3) for r in (0, 1, 2)
    ]
    after = [s for _ in range(4) for rank in ranks for s in _samples(next(rank))]
    assert before + after == list(range(36))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(num_workers: int) -> None:
    alone, helped = _batches(consumed_samples=5), _batches(consumed_samples=5, num_workers=num_workers)
    for one, other in islice(zip(alone, helped, strict=True), 20):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    helped.close()  # type: ignore[attr-defined]


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(_batches())
    next(_validate())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # there may be no device to pin for
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same_pairs(num_workers: int) -> None:
    for plain, pinned in islice(zip(_batches(), _batches(pin_memory=True, num_workers=num_workers), strict=True), 3):
        assert isinstance(pinned, tuple)
        assert torch.equal(plain[0], pinned[0])
        assert torch.equal(plain[1], pinned[1])


# ---- validation ------------------------------------------------------------------------------------------------


def _validate(
    micro_batch_size: int = 2, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return validation_batches(
        Counting(),  # type: ignore[arg-type]
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pin_memory=False,
    )


@pytest.mark.parametrize(("micro", "dp_size", "samples"), [(1, 1, 7), (2, 1, 8), (1, 4, 8), (3, 3, 9), (2, 5, 10)])
def test_validation_is_rounded_up_to_whole_batches(micro: int, dp_size: int, samples: int) -> None:
    assert validation_samples(Counting(), micro_batch_size=micro, dp_size=dp_size) == samples  # type: ignore[arg-type]
    ranks = [[_samples(b) for b in _validate(micro, rank, dp_size)] for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(s for rank in ranks for batch in rank for s in batch) == list(range(samples))


def test_too_few_validation_samples_for_all_ranks() -> None:
    with pytest.raises(DataError, match="12 of 10"):
        _validate(micro_batch_size=2, dp_size=6)


# ---- workers: signals, deaths, exits ---------------------------------------------------------------------------


def test_workers_survive_the_signals_of_a_job() -> None:
    batches = _batches(num_workers=2)
    seen = _samples(next(batches))
    for worker in multiprocessing.active_children():
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(worker.pid or 0, number)
    for batch in islice(batches, 30):
        seen += _samples(batch)
    assert seen == list(range(62))
    batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_of_next_and_of_nothing_else() -> None:
    batches = _batches(num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # a SIGCHLD handler of torch's would raise here
    with pytest.raises(EnvironmentFault, match="a process that reads training data died") as caught:
        for _ in islice(batches, 100):
            pass
    assert "num_workers" in caught.value.fix


SCRIPT = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {folder!r})
from test_sampler import _batches
batches = _batches(num_workers=2)
next(batches), next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
{ending}
"""
ENDINGS = {
    "falls off the end": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise ValueError", 1),
    "closes": ("batches.close(); assert not multiprocessing.active_children()", 0),
    "is terminated": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -15),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", -9),
}


def _runs(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and bool(command.read_bytes())  # empty: ended, only not yet waited for


@pytest.fixture(scope="module")
def abandoned() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Programs that stop half way through a stream, each in its way, all started at once."""
    folder = str(Path(__file__).parent)
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(folder=folder, ending=ending)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (ending, _) in ENDINGS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ENDINGS)
def test_no_end_hangs_or_leaves_workers(name: str, abandoned: dict[str, subprocess.Popen[str]]) -> None:
    # The pipes close when the last worker is gone, so this also waits for (and bounds) the workers' end.
    out, err = abandoned[name].communicate(timeout=40)
    assert abandoned[name].returncode == ENDINGS[name][1], err
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if _runs(pid)]
    if ENDINGS[name][1] == 0:
        assert err == ""
