"""Joining the process group: who is missing is named within the limit, on every rank that came."""

import contextlib
import os
import socket
import time

import pytest

from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.parallel.start import place_from_environment, ranks_in_words
from tests.distributed import HeldPort, run_ranks

HERE = "tests.unit.parallel.test_start"


def join_on_rank(rank, world_size, absent=(), seconds=2, late=(), environment=None):
    """Join (ranks in `absent` do not; ranks in `late` a second later); returns (sum over ranks | error, seconds)."""
    import torch
    import torch.distributed as dist

    from loopmem_pretrain.config.parallel import ParallelConfig
    from loopmem_pretrain.parallel.start import join_process_group

    os.environ.update(environment or {})
    if rank in absent:
        return None
    if rank in late:
        time.sleep(1)
    start = time.monotonic()
    parallel = ParallelConfig(join_timeout_seconds=seconds, collective_timeout_seconds=5)
    try:
        join_process_group("gloo", parallel)
        later = dist.new_group(list(range(world_size)))
        assert later._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 5
        value = torch.tensor(float(rank))
        dist.all_reduce(value)
        dist.barrier()
    except EnvironmentFault as error:
        return error, time.monotonic() - start
    return float(value), time.monotonic() - start


@pytest.mark.parametrize("late", [[0], [2]])
def test_all_ranks_meet(late):
    assert [result[0] for result in run_ranks(f"{HERE}:join_on_rank", 3, [], 30, late)] == [3.0] * 3


def test_missing_ranks_are_named_on_every_rank_that_came():
    results = run_ranks(f"{HERE}:join_on_rank", 5, [2, 4])
    assert results[2] is results[4] is None
    for rank in (0, 1, 3):
        error, seconds = results[rank]
        assert error.problem == "ranks 2, 4 of 5 did not join within 2 s"
        assert "join_timeout_seconds" in error.fix and error.exit_code == 6
        assert seconds < 8
    assert max(results[rank][1] for rank in (0, 1, 3)) > 1  # one that itself comes late waits less


def join_with_another_backend(rank, world_size):
    from loopmem_pretrain.config.parallel import ParallelConfig
    from loopmem_pretrain.parallel.start import join_process_group

    try:
        join_process_group("gloo" if rank == 2 else "nccl", ParallelConfig(join_timeout_seconds=30))
    except EnvironmentFault as error:
        return error.problem
    return None


def test_ranks_on_different_devices_are_named_before_they_wait_for_each_other():
    problems = run_ranks(f"{HERE}:join_with_another_backend", 4)
    assert problems == ["ranks compute on different devices: ranks 0, 1, 3 with nccl, rank 2 with gloo"] * 4


def test_rank_0_that_is_missing_is_named():
    results = run_ranks(f"{HERE}:join_on_rank", 3, [0])
    for rank in (1, 2):
        error, seconds = results[rank]
        assert error.problem.startswith(f"rank 0 of 3 did not join within 2 s: rank {rank} cannot reach 127.0.0.1:")
        assert error.problem.endswith("(Connection refused)")
        assert 1 < seconds < 8


@pytest.mark.parametrize("absent", [0, 1])
def test_under_torchrun_the_agent_holds_the_store(absent):
    """The agent is this process: every rank is a client, and a missing rank 0 is found by the others."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(agent.port)}
    results = run_ranks(f"{HERE}:join_on_rank", 2, [absent], 2, [], environment)
    error, seconds = results[1 - absent]
    assert error.problem == f"rank {absent} of 2 did not join within 2 s"
    assert 1 < seconds < 8
    environment["TORCHELASTIC_RESTART_COUNT"] = "1"  # old keys must not count
    assert [r[0] for r in run_ranks(f"{HERE}:join_on_rank", 2, [], 30, [], environment)] == [1.0, 1.0]


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {"MASTER_PORT": str(taken.getsockname()[1])}
        error, _ = run_ranks(f"{HERE}:join_on_rank", 1, [], 3, [], environment)[0]
    assert error.problem.startswith("rank 0 cannot open the store where the ranks meet at 127.0.0.1:")
    assert "MASTER_PORT" in error.fix


def test_a_port_held_for_ranks_is_nobody_elses():
    """A hundred others who ask for any port do not get it, the ranks do."""
    with HeldPort() as port, contextlib.ExitStack() as others:
        for _ in range(100):
            other = others.enter_context(socket.create_server(("127.0.0.1", 0)))
            assert other.getsockname()[1] != port
            caller = others.enter_context(socket.create_connection(other.getsockname()))
            assert caller.getsockname()[1] != port
        assert run_ranks(f"{HERE}:join_on_rank", 2, [], 30, [], {"MASTER_PORT": str(port)})[0][0] == 1.0


@pytest.mark.parametrize("environment", [{"MASTER_ADDR": ""}, {"MASTER_PORT": "http"}, {"MASTER_PORT": "70000"}])
def test_no_place_to_meet(environment):
    error, _ = run_ranks(f"{HERE}:join_on_rank", 1, [], 3, [], environment)[0]
    assert "do not say where the ranks meet" in error.problem


def test_place_of_a_process_started_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert place_from_environment() == (0, 0, 1)


@pytest.mark.parametrize(("tasks", "alone"), [(None, True), ("1", True), ("8", False)])
def test_place_of_a_task_of_srun(monkeypatch, tasks, alone):
    """A batch script has SLURM_PROCID and SLURM_NTASKS too."""
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_STEP_NUM_TASKS", tasks)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if alone:
        assert place_from_environment() == (0, 0, 1)
    else:
        with pytest.raises(EnvironmentFault, match="this is task 3 of 8 that srun has started"):
            place_from_environment()


def test_place_of_a_rank(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert place_from_environment() == (3, 0, 8)


@pytest.mark.parametrize(("rank", "world_size"), [("0", ""), ("x", "2"), ("2", "2"), ("-1", "2")])
def test_place_that_cannot_be(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(EnvironmentFault) as caught:
        place_from_environment()
    assert f"RANK={rank}" in caught.value.problem and f"WORLD_SIZE={world_size}" in caught.value.problem


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 4, 5, 6, 7, 9], "ranks 0, 4-7, 9")]
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words
