"""Starting `loopmem train`: in this process, as one of several ranks, or as the parent of several ranks."""

import atexit
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loopmem_pretrain.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EnvironmentFault,
    HangDetected,
)
from loopmem_pretrain.quiet import prepare_imports

if TYPE_CHECKING:
    from loopmem_pretrain.config.run import RunConfig

log = logging.getLogger(__name__)

# Exit codes of a rank after which the same command may well succeed.
RESTART_AFTER = (EnvironmentFault.exit_code, HangDetected.exit_code)
# Between the end of the ranks and their restart (seconds): what made them end, such as a full disk, may pass.
PAUSE = 5.0


def train_here(config_path: str, overrides: Sequence[str], stop_at_step: int | None, trust: bool) -> int:
    """Train as the rank that the environment (RANK, WORLD_SIZE, ...) says, or alone. Returns the exit code."""
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig, check_topology, run_problems
    from loopmem_pretrain.parallel.start import place_from_environment
    from loopmem_pretrain.training import run_folder

    config = load_config(RunConfig, config_path, overrides, run_problems)
    check_topology(config, place_from_environment().world_size)
    faulthandler.enable(2)  # SIGSEGV, and SIGABRT by NCCL or the guard, write the stacks of all threads to stderr
    failed_with: list[int] = []
    atexit.register(_end_at_once, failed_with)  # before torch registers its own, hence after them
    prepare_imports(config.training.device)
    import torch.distributed as dist

    from loopmem_pretrain.training.failures import named
    from loopmem_pretrain.training.trainer import Trainer

    try:
        trainer = Trainer(config, stop_at_step, trust)
        trainer.train()
    except Exception as error:
        run_folder.write_failure(Path(config.run_dir), error)
        fault = named(error)
        if dist.is_initialized():
            failed_with.append(fault.exit_code if fault is not None else EXIT_BUG)
        if fault is None or fault is error:
            raise
        raise fault from error
    except KeyboardInterrupt:
        # The second one; a thread may be writing a checkpoint, and torch aborts when the interpreter ends under it.
        print("loopmem: interrupted at once; the same command continues from the newest checkpoint", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)
    if dist.is_initialized():
        dist.destroy_process_group()
    return EXIT_DONE


def _end_at_once(failed_with: list[int]) -> None:
    """End a process that failed, with its exit code.

    torch may have threads that wait for other ranks: it aborts, and the exit code is lost, when the interpreter takes
    itself apart under them.
    """
    if failed_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed_with[0])


class Failure(Protocol):
    """What torch's launcher knows of a rank that ended badly."""

    exitcode: int
    timestamp: int
    """Seconds since the epoch."""


class Ended(NamedTuple):
    """How the ranks of one start ended."""

    code: int
    """0, or the exit code of the rank that failed first; -N where signal N ended it."""
    fault: EnvironmentFault | None = None
    """What to raise instead of returning the code."""
    may_restart: bool = False
    """Whether the same command may succeed: a rank was killed, or ended with one of RESTART_AFTER."""


def train_on_ranks(ranks: int, arguments: Sequence[str], config: "RunConfig", max_restarts: int = 0) -> int:
    """Start `ranks` processes on this machine, each `loopmem train ARGUMENTS`, and wait for them.

    After a rank was lost or hung all are started again, at most `max_restarts` times without a new checkpoint between.
    Returns 0, also where a signal stopped the run cleanly, or the exit code of the rank that failed first.

    Raises:
        EnvironmentFault: a rank was killed, or there are too few GPUs.
    """
    from loopmem_pretrain.checkpoint.store import CheckpointStore
    from loopmem_pretrain.training.hardware import refuse_missing_gpus

    refuse_missing_gpus(config, ranks)  # once, not on every rank
    begin, limit = time.monotonic(), config.faults.time_limit_seconds
    store = CheckpointStore(config.run_dir)

    def start() -> Ended:
        used = int(time.monotonic() - begin)  # by starts before: the limit is that of this command
        left = [f"faults.time_limit_seconds={max(1, limit - used)}"] if limit is not None and used else []
        return _start_ranks(ranks, [*arguments, *left], Path(config.run_dir))

    ended = start_again(start, lambda: store.steps()[-1:], max_restarts)
    if ended.fault is not None:
        raise ended.fault
    return ended.code


def start_again(
    start: Callable[[], Ended], newest: Callable[[], object], max_restarts: int, pause: float = PAUSE
) -> Ended:
    """`start()` until it ends in a way that a restart cannot mend, or has been repeated in vain `max_restarts` times.

    `newest` names the newest checkpoint: a repetition that has moved it was not in vain.
    """
    in_vain = 0
    while True:
        before = newest()
        ended = start()
        if not ended.may_restart or max_restarts == 0:
            return ended
        if newest() != before:
            in_vain = 0
        if in_vain == max_restarts:
            log.error("giving up after %d restarts without a new checkpoint (--max-restarts)", in_vain)
            return ended
        in_vain += 1
        cause = f"a rank was ended by signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
        log.warning("%s; restart %d of %d in %.0f s", cause, in_vain, max_restarts, pause)
        time.sleep(pause)


def _start_ranks(ranks: int, arguments: Sequence[str], run_dir: Path) -> Ended:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from loopmem_pretrain.training import run_folder

    for name in list(logging.root.manager.loggerDict):  # the ranks speak for themselves
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="loopmem",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "loopmem_pretrain", "train", *arguments)
    except ChildFailedError as error:
        rank, failure = _first_failure(error.failures)
        may_restart = _may_restart(failure.exitcode, [each.exitcode for each in error.failures.values()])
        if failure.exitcode < 0:
            cause = (
                "it aborted itself: see its last message; on GPUs NCCL does so when a rank is gone, or does not come "
                "to a collective within parallel.collective_timeout_seconds"
                if failure.exitcode == -signal.SIGABRT
                else "if it was killed for memory, lower training.micro_batch_size"
            )
            fault = EnvironmentFault(
                f"rank {rank} was ended by signal {-failure.exitcode}; the other ranks were ended too",
                f"{cause}; start the same command to resume from the last checkpoint",
            )
            # Of a rank that the guard ended, the guard has told why.
            run_folder.write_failure(run_dir, fault, is_cause=failure.exitcode != -signal.SIGABRT)
            return Ended(failure.exitcode, fault, may_restart)
        fault = EnvironmentFault(f"rank {rank} ended with exit code {failure.exitcode}; its message is in the log")
        status = run_folder.read_status(run_dir) or {}
        if status.get("status") == "running" or not status.get("is_cause", True):  # else the rank itself has told
            run_folder.write_failure(run_dir, fault, is_cause=False)
        return Ended(failure.exitcode, None, may_restart)
    except SignalException as error:
        status = run_folder.read_status(run_dir) or {}
        if not run_folder.is_of_this_start(status):
            log.warning("ended by %s before the first step: nothing was trained in this start", error.sigval.name)
            return Ended(EXIT_TERMINATED if error.sigval == signal.SIGTERM else EXIT_INTERRUPTED)
        if status.get("status") in ("interrupted", "done"):
            return Ended(EXIT_DONE)  # the ranks were given the signal too; they saved and stopped
        fault = EnvironmentFault(
            f"ended by {error.sigval.name} before the ranks had saved and stopped",
            "start the same command to resume from the last checkpoint; a smaller logging.interval_steps lets the "
            "ranks notice a signal sooner",
        )
        return Ended(fault.exit_code, fault)
    return Ended(EXIT_DONE)


def _first_failure(failures: Mapping[int, Failure]) -> tuple[int, Failure]:
    """The rank that failed first, and how: within a second, one that a signal ended before those that lost contact.

    Others that were ended by a signal, later or by SIGTERM, got it from the launcher.
    """
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode in RESTART_AFTER:
        for other, failure in failures.items():
            by_signal = failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT)
            if by_signal and failure.timestamp <= first.timestamp + 1:
                return other, failure
    return rank, first


def _may_restart(first: int, codes: Sequence[int]) -> bool:
    """Whether a restart may help ranks of which one ended with `first` before the others; `codes` are those of all.

    Not where SIGTERM or SIGINT was meant to end a rank, nor where a rank was only lost because it ended with an error
    that will come again. Others that were ended by a signal got it from the launcher.
    """
    if first < 0:
        return -first not in (signal.SIGTERM, signal.SIGINT)
    return first in RESTART_AFTER and all(code < 0 or code in RESTART_AFTER for code in codes)
