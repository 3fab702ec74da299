"""Runs a function on several gloo ranks, cheaply.

One helper process imports torch, DeepSpeed and megatron once (about 6 s a test session); every call forks ranks from
it, which starts in a fraction of a second where a fresh interpreter takes ten. The helper never joins a process group
itself. A rank that fails or outlives the limit fails the call with that rank's traceback.
"""

import atexit
import importlib
import os
import pickle
import socket
import tempfile
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

_helper: tuple[Any, Connection] | None = None


def run_ranks(function: str, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function` ("package.module:name") with (rank, world_size, *args) on every rank; results by rank."""
    global _helper
    if _helper is None or not _helper[0].is_alive():
        here, there = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=_serve, args=(there,), daemon=False)
        process.start()
        there.close()  # or a helper that dies would leave recv() below waiting for ever
        _helper = (process, here)
        atexit.register(_stop)
    _, pipe = _helper
    pipe.send((function, world_size, args, timeout))
    results = [pickle.loads(result) for result in pipe.recv()]
    failures = [result for result in results if isinstance(result, RankFailure)]
    if failures:
        raise AssertionError("\n".join(f"rank {failure.rank}: {failure.text}" for failure in failures))
    return results


class RankFailure:
    """A rank's traceback, or what became of it."""

    def __init__(self, rank: int, text: str) -> None:
        self.rank, self.text = rank, text


def _stop() -> None:
    if _helper is not None:
        _helper[1].close()  # the helper's recv ends
        _helper[0].join(5)
        _helper[0].kill()


def _serve(pipe: Connection) -> None:
    """The helper: preload, then fork ranks on request."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    # What ranks need, so that none of them imports it; nothing here joins a group or opens a device.
    import loopmem_pretrain.parallel.megatron
    import loopmem_pretrain.training.trainer  # noqa: F401

    while True:
        try:
            request = pipe.recv()
        except EOFError:  # the test session is over
            return
        pipe.send(_run(*request))


def _run(function: str, world_size: int, args: tuple[Any, ...], timeout: float) -> list[bytes]:
    fork = get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank, args=(there, function, rank, world_size, port, args))
        process.start()
        there.close()
        ranks.append((process, here))
    results: list[bytes] = []  # pickled by value: a tensor sent as it is would be a handle into a rank that ends
    failed = False
    for rank, (process, here) in enumerate(ranks):
        try:
            limit = 2 if failed else timeout
            if not here.poll(limit):
                raise TimeoutError(f"no result within {limit} s")
            results.append(here.recv_bytes())
        except (EOFError, TimeoutError) as error:
            failed = True
            process.join(1)
            results.append(pickle.dumps(RankFailure(rank, f"{error or 'died'}; exit code {process.exitcode}")))
    for process, _ in ranks:
        process.join(5)
        if process.is_alive():
            process.kill()
    return results


def _rank(pipe: Connection, function: str, rank: int, world_size: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    module, _, name = function.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            result = getattr(importlib.import_module(module), name)(rank, world_size, *args)
        except BaseException:  # noqa: BLE001 - handed to the test as the rank's result
            result = RankFailure(rank, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    os._exit(0)
