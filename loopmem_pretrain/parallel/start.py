"""Joining the other ranks, with a bounded wait that ends by naming who is missing.

torch's own rendezvous waits for all ranks and, when one does not come, says on each rank only that time is up. Here the
ranks first meet at a key-value store: rank 0 looks who is there, tells all of them, and only a complete company goes on
to build the process group, on the same store.

The store is at MASTER_ADDR:MASTER_PORT. Rank 0 opens it, except under torchrun, whose agent has opened it already.
"""

import logging
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.errors import EnvironmentFault

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

# Of an attempt to connect to the store (seconds).
ATTEMPT = 2.0
# Between attempts to reach a store that is not there yet, and between looks at one (seconds).
PAUSE = 0.2
# How much longer a rank waits for rank 0's answer than rank 0 waits for the others; and rank 0, at most, for the others
# to read an answer that ends the start (seconds).
GRACE = 10.0


class Place(NamedTuple):
    """Which rank of how many this process is."""

    rank: int
    local_rank: int
    """Number within the machine: of the GPU to take."""
    world_size: int


def place_from_environment() -> Place:
    """What the launcher says in RANK, LOCAL_RANK and WORLD_SIZE; rank 0 of 1 where RANK is not set.

    Raises:
        EnvironmentFault: a variable is missing or no fitting number, or this is one of several tasks of srun, each of
            which would be rank 0 of 1.
    """
    if "RANK" not in os.environ:
        # Of a step of SLURM; batch scripts and shells of salloc have the number of the job's tasks alone.
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
        if tasks.isdecimal() and int(tasks) > 1 and "SLURM_PROCID" in os.environ:
            raise EnvironmentFault(
                f"this is task {os.environ['SLURM_PROCID']} of {tasks} that srun has started, and RANK is not set: "
                "each of them would train alone",
                "submit slurm/pretrain.sbatch, or start torchrun in one task a node; where each task is to be a run of "
                "its own, unset SLURM_STEP_NUM_TASKS",
            )
        return Place(0, 0, 1)
    local = os.environ.get("SLURM_LOCALID", "0")  # srun alone sets no LOCAL_RANK
    values = {name: os.environ.get(name, local if name == "LOCAL_RANK" else "") for name in _PLACE}
    said = ", ".join(f"{name}={value}" for name, value in values.items())
    fix = "a launcher sets all three: use --ranks, torchrun, deepspeed or slurm/pretrain.sbatch, or unset RANK"
    if not all(value.isdecimal() for value in values.values()):
        raise EnvironmentFault(f"the place of this process among the ranks is not a set of numbers: {said}", fix)
    place = Place(*(int(value) for value in values.values()))
    if place.rank >= place.world_size:
        raise EnvironmentFault(f"RANK counts from 0, so it must be below WORLD_SIZE: {said}", fix)
    return place


_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def join_process_group(backend: str, parallel: ParallelConfig) -> None:
    """Join the default process group over `backend` (nccl or gloo); a process started alone becomes a group of one.

    Collectives of this and of all groups made later give up after `parallel.collective_timeout_seconds`.

    Raises:
        EnvironmentFault: ranks are missing after `parallel.join_timeout_seconds` (it names them), or the store cannot
            be opened or reached.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if dist.is_initialized():
        return
    place = place_from_environment()
    store: Store
    if "RANK" in os.environ:
        store = _open_store(place, parallel.join_timeout_seconds)
        _meet(store, place, parallel.join_timeout_seconds, backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
    os.environ.update({name: str(value) for name, value in zip(_PLACE, place, strict=True)})  # DeepSpeed reads them
    limit = timedelta(seconds=parallel.collective_timeout_seconds)
    # DeepSpeed makes groups without a limit of their own; torch gives them these, not that of the default group.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("process-group", store),  # type: ignore[attr-defined]
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
    )


def wait(store: "Store", key: str, seconds: float) -> bool:
    """Whether `key` is set within `seconds`. Asks again and again: when store.wait gives up, torch writes a warning."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not store.check([key]):  # DistNetworkError where the store is gone
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, PAUSE)
    return True


def ranks_in_words(ranks: list[int]) -> str:
    """[3] -> rank 3; [0, 4, 5, 6, 7] -> ranks 0, 4-7. The list is sorted."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)


def _open_store(place: Place, seconds: int) -> "Store":
    """The store at MASTER_ADDR:MASTER_PORT, opened here or, as soon as it is there, reached."""
    import torch.distributed as dist

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise EnvironmentFault(
            f"MASTER_ADDR={host} and MASTER_PORT={port} do not say where the ranks meet",
            "a launcher sets them to the host of rank 0 and a free port there (1 to 65535), the same for all ranks",
        )
    under_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = place.rank == 0 and not under_torchrun
    reason = "" if opens else _why_nothing_answers(host, int(port), seconds)
    if reason:
        missing = "the torchrun agent" if under_torchrun else f"rank 0 of {place.world_size}"
        raise EnvironmentFault(
            f"{missing} did not join within {seconds} s: rank {place.rank} cannot reach {host}:{port} ({reason})",
            f"see the messages of {missing} and of its machine; MASTER_ADDR and MASTER_PORT must be the same for all "
            "ranks and not be blocked by a firewall; parallel.join_timeout_seconds sets the wait",
        )
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            int(port),
            place.world_size,
            is_master=opens,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise EnvironmentFault(
            f"rank {place.rank} cannot {'open' if opens else 'use'} the store where the ranks meet at {host}:{port}: "
            + _first_line(error),
            "if the address is in use, another program holds it: choose another MASTER_PORT; MASTER_ADDR must be the "
            "machine of rank 0",
        ) from None
    # torchrun's agent keeps its store over restarts of the ranks.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start-{restart}", store)  # type: ignore[attr-defined]


def _why_nothing_answers(host: str, port: int, seconds: float) -> str:
    """Empty as soon as a connection to host:port opens, else, after `seconds`, why the last attempt failed.

    torch's store would try too, but fills the log with C++ frames when it gives up, and signals would have to wait.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=ATTEMPT).close()
            return ""
        except OSError as error:
            if time.monotonic() + PAUSE > deadline:
                return error.strerror or str(error)
        time.sleep(PAUSE)


def _meet(store: "Store", place: Place, seconds: int, backend: str) -> None:
    """Return when all ranks are at the store, with one backend; else raise on every rank that is, naming the others."""
    import torch.distributed as dist

    try:
        store.set(_joined(place.rank), backend)
        if place.rank == 0:
            missing = _wait_for_all(store, place, seconds)
            store.set("backends", "" if missing else _different_backends(store, place.world_size))
            store.set("missing", ",".join(map(str, missing)))
        elif not wait(store, _joined(0), seconds):
            missing = [rank for rank in range(place.world_size) if not store.check([_joined(rank)])]
        elif wait(store, "missing", seconds + GRACE):
            missing = [int(rank) for rank in store.get("missing").decode().split(",") if rank]
        else:
            missing = [0]  # it was there and fell silent
        different = "" if missing else store.get("backends").decode()
        if missing or different:
            _see_off(store, place, missing)
    except dist.DistError as error:
        raise EnvironmentFault(
            f"rank {place.rank} lost contact with the store where the ranks meet: {_first_line(error)}",
            "rank 0 (under torchrun: its agent) has ended: see its message, then start the same command again",
        ) from None
    if missing:
        raise EnvironmentFault(
            f"{ranks_in_words(missing)} of {place.world_size} did not join within {seconds} s",
            "see the messages of those ranks and of their machines: they may not have started, have failed before they "
            "joined, or have another MASTER_ADDR or MASTER_PORT; parallel.join_timeout_seconds sets the wait",
        )
    if different:
        raise EnvironmentFault(
            f"ranks compute on different devices: {different}",
            "on the machines of those without GPUs (gloo) see nvidia-smi, the driver and torch; training.device=cuda "
            "makes each say what it misses",
        )


def _different_backends(store: "Store", world_size: int) -> str:
    """Which ranks came with which backend, in words; empty where it is one."""
    ranks: dict[str, list[int]] = {}
    for rank in range(world_size):
        ranks.setdefault(store.get(_joined(rank)).decode(), []).append(rank)
    if len(ranks) == 1:
        return ""
    return ", ".join(f"{ranks_in_words(own)} with {backend}" for backend, own in ranks.items())


def _wait_for_all(store: "Store", place: Place, seconds: int) -> list[int]:
    """Rank 0: the ranks that are not at the store after `seconds`; says now and then whom it waits for."""
    deadline = time.monotonic() + seconds
    waiting = list(range(1, place.world_size))
    while waiting and time.monotonic() < deadline:
        if wait(store, _joined(waiting[0]), min(30.0, deadline - time.monotonic())):
            waiting.pop(0)
        else:
            waiting = [rank for rank in waiting if not store.check([_joined(rank)])]
            if waiting:
                log.info("waiting for %s of %d to join", ranks_in_words(waiting), place.world_size)
    return [rank for rank in waiting if not store.check([_joined(rank)])]


def _see_off(store: "Store", place: Place, missing: list[int]) -> None:
    """The store ends with rank 0, so rank 0 stays until the ranks that came have read why they must go."""
    store.set(f"read/{place.rank}", "")
    if place.rank == 0:
        deadline = time.monotonic() + GRACE
        for rank in range(1, place.world_size):
            if rank not in missing and not wait(store, f"read/{rank}", deadline - time.monotonic()):
                return


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
