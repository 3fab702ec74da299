"""Runs a function on several gloo ranks, or a command of `loopmem`, cheaply.

One helper process imports torch, DeepSpeed, megatron and transformers once (about 10 s a test session); every call
forks from it, which starts in a fraction of a second where a fresh interpreter takes ten. The helper never joins a
process group itself. A rank that fails or outlives the limit fails the call with that rank's traceback.
"""

import atexit
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_helper: tuple[Any, Connection] | None = None


# What ranks and commands need, so that none of them imports it; nothing here joins a group or opens a device. Of
# DeepSpeed what it imports when it makes an engine.
PRELOADED = (
    "loopmem_pretrain.parallel.megatron",
    "loopmem_pretrain.training.trainer",
    "loopmem_pretrain.hf.export",
    "loopmem_pretrain.inference.opening",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


def run_ranks(function: str, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function` ("package.module:name") with (rank, world_size, *args) on every rank; results by rank."""
    results = [pickle.loads(result) for result in _ask(_run, function, world_size, args, timeout)]
    failures = [result for result in results if isinstance(result, RankFailure)]
    if failures:
        raise AssertionError("\n".join(f"rank {failure.rank}: {failure.text}" for failure in failures))
    return results


class Command:
    """`loopmem ARGUMENTS` as subprocess.Popen would start it, except that its process is forked.

    Ranks that the command starts are fresh processes.
    """

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        self.words = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._code: int | None = None
        environment = dict(os.environ if env is None else env)
        self.pid: int = _ask(_start_command, self.words, environment, self._folder.name)

    def wait(self, timeout: float) -> int | None:
        """The exit code, -N where signal N ended it; None where it has not ended after `timeout` seconds."""
        if self._code is None:
            self._code = _ask(_wait_for_command, self.pid, timeout)
        return self._code

    def kill(self) -> None:
        """End it where it has not ended."""
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)

    @property
    def stdout(self) -> str:
        return Path(self._folder.name, "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return Path(self._folder.name, "stderr").read_text(encoding="utf-8")


def run_command(
    *arguments: object, timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A `Command` and what came of it; a traceback, or no end within `timeout` seconds, fails the test."""
    command = Command(*arguments, env=env)
    code = command.wait(timeout)
    if code is None:
        command.kill()
        raise AssertionError(f"{command.words} has not ended after {timeout} s: {command.stderr}")
    assert "Traceback" not in command.stderr, command.stderr
    return subprocess.CompletedProcess(command.words, code, command.stdout, command.stderr)


class HeldPort:
    """A free port where ranks meet. Until the end of the block only who asks for it by number gets it.

    A port that is merely found free may be anyone's by the time rank 0 listens there. This one stays bound, without
    listening and with SO_REUSEADDR as torch's stores have it: the store may listen, while the kernel gives the port
    neither to connections nor to those who bind to port 0.
    """

    def __enter__(self) -> int:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        return int(self._socket.getsockname()[1])

    def __exit__(self, *exception: object) -> None:
        self._socket.close()


def _ask(action: Any, *args: Any) -> Any:
    """What `action(*args)` returns in the helper, which is started where there is none."""
    global _helper
    if _helper is None or not _helper[0].is_alive():
        here, there = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=_serve, args=(there,), daemon=False)
        process.start()
        there.close()  # or a helper that dies would leave recv() below waiting for ever
        _helper = (process, here)
        atexit.register(_stop)
    _, pipe = _helper
    pipe.send((action, args))
    return pipe.recv()


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
    """The helper: preload, then fork on request."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from loopmem_pretrain.quiet import prepare_imports

    torch.set_num_threads(1)
    prepare_imports("cpu")
    for name in PRELOADED:
        importlib.import_module(name)

    while True:
        try:
            action, args = pipe.recv()
        except EOFError:  # the test session is over
            return
        pipe.send(action(*args))


def _run(function: str, world_size: int, args: tuple[Any, ...], timeout: float) -> list[bytes]:
    importlib.import_module(function.partition(":")[0])  # once here, not in every rank
    with HeldPort() as port:
        return _fork_ranks(function, world_size, args, timeout, port)


def _fork_ranks(function: str, world_size: int, args: tuple[Any, ...], timeout: float, port: int) -> list[bytes]:
    fork = get_context("fork")
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
    # Ranks that wait for each other all the time wake each other faster on one core: where as many test processes run
    # as there are cores, each has its own.
    number, processes = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:], os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    cores = sorted(os.sched_getaffinity(0))
    if processes and int(processes) >= len(cores):
        os.sched_setaffinity(0, {cores[int(number) % len(cores)]})
    module, _, name = function.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            result = getattr(importlib.import_module(module), name)(rank, world_size, *args)
        except BaseException:  # noqa: BLE001 - handed to the test as the rank's result
            result = RankFailure(rank, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    os._exit(0)


_commands: dict[int, Any] = {}
"""In the helper: processes of commands that have not been seen to end, by id."""


def _start_command(words: list[str], environment: dict[str, str], folder: str) -> int:
    for name in ("stdout", "stderr"):
        Path(folder, name).touch()
    process = get_context("fork").Process(target=_command, args=(words, environment, folder))
    process.start()
    assert process.pid is not None
    _commands[process.pid] = process
    return process.pid


def _wait_for_command(pid: int, timeout: float) -> int | None:
    process = _commands[pid]
    process.join(timeout)
    if process.exitcode is not None:
        del _commands[pid]
    return process.exitcode


def _command(words: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        file = os.open(Path(folder, stream.name.strip("<>")), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
    from loopmem_pretrain.cli import main

    sys.exit(main(words))
