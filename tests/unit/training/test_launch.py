"""What the libraries say when a rank is gone or hangs becomes a named error; what may be mended is started again."""

import time
from types import SimpleNamespace

import pytest

from loopmem_pretrain.errors import EnvironmentFault, HangDetected, OutOfMemory
from loopmem_pretrain.training.failures import lost_rank, named
from loopmem_pretrain.training.launch import Ended, _first_failure, _may_restart, start_again
from tests.distributed import run_ranks

ON_RANK = "tests.unit.training.test_launch:wait_for_rank"


def wait_for_rank(rank, world_size, victim, how, hangs):
    """`victim` ends, or does nothing for longer than the limit; returns the others' named error and the seconds."""
    import torch
    import torch.distributed as dist

    from loopmem_pretrain.config.parallel import ParallelConfig
    from loopmem_pretrain.parallel.start import join_process_group

    join_process_group("gloo", ParallelConfig(collective_timeout_seconds=3))
    dist.barrier()
    if rank == victim:
        time.sleep(6 if hangs else 0)
        return None
    collective = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(8)),
        "recv": lambda: dist.recv(torch.ones(8), victim),
        "broadcast_object": lambda: dist.broadcast_object_list([None], src=victim),
        "new_group": lambda: dist.new_group(list(range(world_size))),
    }[how]
    start = time.monotonic()
    try:
        collective()
    except RuntimeError as error:
        return lost_rank(error) or error, time.monotonic() - start
    raise AssertionError("the collective came back without the other rank")


@pytest.mark.parametrize(
    ("how", "victim"),  # rank 0 holds the store
    [("all_reduce", 2), ("recv", 0), ("broadcast_object", 0), ("new_group", 0), ("new_group", 2)],
)
def test_a_rank_that_is_gone(how, victim):
    results = run_ranks(ON_RANK, 3, victim, how, False)
    for error, seconds in (result for rank, result in enumerate(results) if rank != victim):
        assert type(error) is EnvironmentFault, error
        assert "lost contact" in error.problem and seconds < 8


def test_a_rank_that_hangs():
    error, seconds = run_ranks(ON_RANK, 2, 1, "all_reduce", True)[0]
    assert type(error) is HangDetected, error
    assert "collective_timeout_seconds" in error.problem and 1 < seconds < 6


def test_what_nccl_complains_of_is_passed_on():
    """Not "lost contact": all ranks would say that of each other, and none the reason."""
    from torch.distributed import DistBackendError

    said = (
        "NCCL error in: NCCLUtils.cpp:77, invalid usage\nncclInvalidUsage: ...\nDuplicate GPU detected : rank 1 and 0"
    )
    assert lost_rank(DistBackendError(said)) is None
    error = named(DistBackendError(said))
    assert type(error) is EnvironmentFault and "Duplicate GPU detected : rank 1 and 0" in error.problem
    gone = lost_rank(DistBackendError("NCCL error\nncclRemoteError: A call failed possibly due to a network error"))
    assert "lost contact with another rank" in gone.problem and "ncclRemoteError" in gone.problem


def test_other_errors_stay_bugs():
    assert lost_rank(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None


def test_too_little_memory_is_a_named_error():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")):
        fault = named(error)
        assert type(fault) is OutOfMemory and fault.exit_code == 2
        assert "out of memory: " in fault.problem and "micro_batch_size" in fault.fix and "\n" not in fault.problem


def endings(*codes):
    """A start for each code, in this order; a negative one is a signal."""
    left = list(codes)
    return left, lambda: Ended(code := left.pop(0), may_restart=_may_restart(code, [code]))


def test_no_restart_unless_asked_for():
    left, start = endings(6, 0)
    assert start_again(start, list, 0).code == 6
    assert left == [0]


@pytest.mark.parametrize("code", [6, 8, -9, -6, -11])
def test_lost_and_hanging_ranks_are_started_again(code, caplog):
    _, start = endings(code, 0)
    assert start_again(start, list, 1, pause=0).code == 0
    assert "restart 1 of 1" in caplog.text


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 7, 130, -15, -2])
def test_what_a_restart_cannot_mend_is_left(code):
    left, start = endings(code, 0)
    assert start_again(start, list, 3, pause=0).code == code
    assert left == [0]


def test_restarts_in_vain_are_counted(caplog):
    left, start = endings(6, -9, 8, 6)
    assert start_again(start, lambda: [10], 2, pause=0).code == 8
    assert left == [6]
    assert "giving up after 2 restarts without a new checkpoint" in caplog.text


def test_a_new_checkpoint_renews_the_restarts():
    left, start = endings(6, 6, 6, 6, 6, 0)
    newest = iter([10, 10, 10, 20, 20, 30, 30, 40, 40, 50, 50])  # before and after each start
    assert start_again(start, lambda: next(newest), 1, pause=0).code == 0
    assert left == []


@pytest.mark.parametrize(
    ("codes", "may_restart"),
    [([-9, -15], True), ([-9, 6, -9], True), ([8, 8, -9], True), ([6, 1], False), ([6, -15, 7], False)],
)
def test_the_other_ranks_of_a_start(codes, may_restart):
    assert _may_restart(codes[0], codes) is may_restart


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ({0: (6, 100), 1: (-9, 100)}, 1),  # rank 0 lost contact with rank 1
        ({0: (6, 100), 1: (-9, 131)}, 0),  # rank 1 did not end by itself: the launcher killed it
        ({0: (8, 100), 1: (-15, 100)}, 0),
        ({0: (3, 100), 1: (-6, 100)}, 0),  # NCCL aborts where another rank has gone
        ({1: (3, 100), 0: (6, 101)}, 1),
    ],
)
def test_the_rank_that_failed_first(ends, first):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=when) for rank, (code, when) in ends.items()}
    assert _first_failure(failures)[0] == first
