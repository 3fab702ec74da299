"""Batches: the same at any data-parallel size, from any resume point, with any number of readers; and clean ends."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loopmem_pretrain.data.sampler import (
    READ_AHEAD,
    batch_indices,
    train_batches,
    validation_batches,
    validation_samples,
)
from loopmem_pretrain.errors import ConfigError, DataError

T = 3


class Counting:
    """Sample i is tokens i*T ... i*T + T; validation may read 10 of them."""

    seq_length, num_samples, available = T, 7, 10

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        return np.arange(i * T, i * T + T + 1)

    def require(self, samples: int) -> None:
        if samples > self.available:
            raise DataError(f"{samples} of {self.available}", "fewer")


SETTINGS: dict = {
    "micro_batch_size": 2,
    "global_batch_size": 12,
    "dp_rank": 0,
    "dp_size": 1,
    "consumed_samples": 0,
    "num_workers": 0,
    "pin_memory": False,
}


def _batches(**changes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return train_batches(Counting(), **(SETTINGS | changes))  # type: ignore[arg-type]


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
def test_readers_change_nothing(num_workers: int) -> None:
    alone, helped = _batches(consumed_samples=5), _batches(consumed_samples=5, num_workers=num_workers)
    for one, other in islice(zip(alone, helped, strict=True), 20):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    next(_batches())
    next(_validate())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same_pairs(num_workers: int) -> None:
    for plain, pinned in islice(zip(_batches(), _batches(pin_memory=True, num_workers=num_workers), strict=True), 3):
        assert pinned[0].is_pinned()
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


# ---- reading ahead ---------------------------------------------------------------------------------------------


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-samples")]


class Slow(Counting):
    """Reading takes a while, longer for even samples; sample 20 cannot be read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, i: int) -> NDArray[np.int64]:
        time.sleep(0.001 + 0.002 * (i % 2 == 0))
        if i == 20:
            raise DataError("sample 20", "none")
        self.read.append(i)
        return super().__getitem__(i)


def test_readers_are_a_bounded_way_ahead_and_end_with_the_stream() -> None:
    data = Slow()
    batches = train_batches(data, **SETTINGS | {"micro_batch_size": 1, "num_workers": 2})  # type: ignore[arg-type]
    assert _samples(next(batches)) == [0]
    deadline = time.monotonic() + 20
    while len(data.read) < 1 + 2 * READ_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(data.read) == list(range(1 + 2 * READ_AHEAD))
    assert len(_readers()) == 2
    batches.close()  # type: ignore[attr-defined]
    for reader in _readers():
        reader.join(timeout=20)
    assert _readers() == []


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_of_reading_comes_in_its_turn(num_workers: int) -> None:
    seen = []
    with pytest.raises(DataError, match="sample 20"):
        for batch in train_batches(Slow(), **SETTINGS | {"num_workers": num_workers}):  # type: ignore[arg-type]
            seen += _samples(batch)
    assert seen == list(range(20))


def test_a_stream_left_open_does_not_hold_up_the_end_of_the_program() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_sampler import _batches\n"
        "batches = _batches(num_workers=3); next(batches); sys.exit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")
