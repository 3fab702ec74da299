"""Where work fails on one rank, every rank raises: a named error is told once, a bug keeps its traceback."""

import time

import pytest

from loopmem_pretrain.errors import DataError, EnvironmentFault
from tests.distributed import run_ranks

HERE = "tests.unit.parallel.test_agreement"


def missing_file():
    raise OSError("no space left")


def bad_data():
    raise DataError("shard 3 is damaged", "prepare it again")


def bug():
    raise ValueError("unforeseen")


ACTIONS = {"missing_file": missing_file, "bad_data": bad_data, "bug": bug}


def outcome(call):
    """What a rank gets: a result, or the error's type, text and whether another rank tells it."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - what is raised is what is tested
        return type(error), str(error), getattr(error, "is_told", None)


def outcomes(rank, world_size, failing, action):
    """Of `together`, then of `from_rank_zero`, with `action` on the ranks `failing`, and of one more that works."""
    import torch.distributed as dist

    from loopmem_pretrain.parallel.agreement import from_rank_zero, together

    dist.init_process_group("gloo")
    own = ACTIONS[action] if rank in failing else lambda: f"rank {rank}"
    return outcome(lambda: together(own)), outcome(lambda: from_rank_zero(own)), from_rank_zero(lambda: "after")


def test_results():
    zero, one = run_ranks(f"{HERE}:outcomes", 2, [], "bug")
    assert zero == ("rank 0", "rank 0", "after")
    assert one == ("rank 1", "rank 0", "after")


@pytest.mark.parametrize("action, kind", [("bad_data", DataError), ("missing_file", EnvironmentFault)])
def test_a_named_error_on_rank_zero(action, kind):
    zero, one = run_ranks(f"{HERE}:outcomes", 2, [0], action)
    for of_zero, of_one in zip(zero[:2], one[:2], strict=True):
        assert of_zero[0] is of_one[0] is kind
        assert of_zero[1] == of_one[1]
        assert (of_zero[2], of_one[2]) == (False, True)
    assert zero[2] == one[2] == "after"


def test_an_error_of_two_ranks_is_told_once():
    _, one, two = run_ranks(f"{HERE}:outcomes", 3, [1, 2], "bad_data")
    assert (one[0][0], one[0][2]) == (DataError, False)
    assert (two[0][0], two[0][2]) == (DataError, True)


def test_a_bug():
    zero, one = run_ranks(f"{HERE}:outcomes", 2, [0], "bug")
    for of_zero, of_one in zip(zero[:2], one[:2], strict=True):
        assert of_zero[:2] == (ValueError, "unforeseen")
        assert of_one[0] is EnvironmentFault
        assert of_one[1].startswith("rank 0 failed: ValueError: unforeseen")
    assert zero[2] == one[2] == "after"


def slow_rank_zero(rank, world_size):
    """Rank 0 takes longer than a collective may."""
    from datetime import timedelta

    import torch.distributed as dist

    from loopmem_pretrain.parallel.agreement import from_rank_zero

    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    return from_rank_zero(lambda: time.sleep(2.5) or "merged")


def test_rank_zero_may_take_longer_than_a_collective():
    assert run_ranks(f"{HERE}:slow_rank_zero", 2) == ["merged", "merged"]
