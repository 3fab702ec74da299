"""A pool of processes: results, errors, and deaths that are errors at once."""

import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from loopmem_pretrain.data.pool import WorkerDied, WorkerPool


def begin(word: str) -> None:
    os.environ["POOL_WORD"] = word
    if word == "bad":
        raise ValueError("no tokenizer")


def word_and(number: int) -> tuple[str, int]:
    if number == 13:
        raise LookupError("unlucky")
    return os.environ["POOL_WORD"], number


def half_a_message() -> bytes:
    """The process is killed while it hands over its result."""

    def part(self: Connection, content: bytes, write: object = None) -> None:
        os.write(self.fileno(), bytes(content)[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = part  # type: ignore[method-assign]
    return bytes(100_000)


def sleep() -> None:
    time.sleep(1000)


def test_results_come_in_order_and_errors_are_raised() -> None:
    with WorkerPool(2, begin, ("word",)) as pool:
        assert list(pool.map(word_and, range(10))) == [("word", number) for number in range(10)]
        with pytest.raises(LookupError, match="unlucky"):
            pool.submit(word_and, 13).result(30)
        assert pool.submit(word_and, 14).result(30) == ("word", 14)


def test_an_initializer_that_fails_is_told() -> None:
    with WorkerPool(1, begin, ("bad",)) as pool, pytest.raises(ValueError, match="no tokenizer"):
        pool.submit(word_and, 1).result(30)


def test_a_death_in_the_middle_of_a_result_is_an_error() -> None:
    with WorkerPool(2, begin, ("word",)) as pool:
        with pytest.raises(WorkerDied):
            pool.submit(half_a_message).result(30)
        assert pool.submit(word_and, 1).result(30) == ("word", 1), "the others go on"


def test_shutting_down_waits_for_no_call() -> None:
    pool = WorkerPool(1, begin, ("word",))
    running, waiting = pool.submit(sleep), pool.submit(word_and, 1)
    while not running.running():
        time.sleep(0.01)
    began = time.monotonic()
    pool.shutdown()
    assert time.monotonic() - began < 20
    assert waiting.cancelled()
    with pytest.raises(WorkerDied):
        running.result(0)
