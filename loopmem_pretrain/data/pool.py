"""A pool of processes in which the death of one is an error at once, whatever it was doing.

`concurrent.futures` hangs for ever when a process is killed, as for want of memory, while it hands over a result that
is larger than a pipe holds: half a message and a lock are left in the queue that all share. Here each process has a
pipe of its own, whose other end nobody else holds, and a thread that waits for it: a death is the end of that pipe.
"""

import multiprocessing
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_Call = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class WorkerDied(Exception):
    """A process of the pool has ended before its time."""


class WorkerPool(Executor):
    """Fresh interpreters that run calls, each after `initializer(*initargs)`; they end when this process does."""

    def __init__(self, processes: int, initializer: Callable[..., None], initargs: tuple[Any, ...] = ()) -> None:
        # A fresh interpreter each, not a fork: this process may hold threads (torch, pyarrow) and the lock of a folder.
        context = multiprocessing.get_context("spawn")
        self._todo: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._processes: list[BaseProcess] = []
        self._threads: list[threading.Thread] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, initializer, initargs), daemon=True)
            process.start()
            theirs.close()
            thread = threading.Thread(target=self._serve, args=(ours,), daemon=True)
            thread.start()
            self._processes.append(process)
            self._threads.append(thread)

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """As of any executor; without keyword arguments. The future raises WorkerDied where its process has died."""
        if kwargs:
            raise TypeError("calls of this pool take no keyword arguments")
        future: Future[Any] = Future()
        self._todo.put((future, call, args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes now; calls that are still running or waiting are given up."""
        while True:
            try:
                call = self._todo.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
        for process in self._processes:
            process.kill()
            self._todo.put(None)
        if wait:
            for thread in self._threads:
                thread.join()
            for process in self._processes:
                process.join()

    def _serve(self, pipe: Connection) -> None:
        with pipe:
            while (call := self._todo.get()) is not None:
                future, function, arguments = call
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    pipe.send((function, arguments))
                    result, error = pipe.recv()
                except (EOFError, OSError):
                    future.set_exception(WorkerDied())
                    return
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)


def _work(pipe: Connection, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    failure: Exception | None = None
    try:
        initializer(*initargs)
    except Exception as error:  # noqa: BLE001 - told to whoever asks for a result
        failure = error
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None] = (None, failure)
        if failure is None:
            try:
                answer = (function(*arguments), None)
            except Exception as error:  # noqa: BLE001 - raised again by the future
                answer = (None, error)
        pipe.send(answer)
