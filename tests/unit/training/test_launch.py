"""What the libraries really say when a rank is gone or hangs becomes a named error."""

import time

import pytest

from loopmem_pretrain.errors import EnvironmentFault, HangDetected
from loopmem_pretrain.training.launch import _lost_rank
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
        return _lost_rank(error) or error, time.monotonic() - start
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


def test_other_errors_stay_bugs():
    assert _lost_rank(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")) is None
