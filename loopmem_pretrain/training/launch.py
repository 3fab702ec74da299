"""Starting `loopmem train`: in this process, as one of several ranks, or as the parent of several ranks."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from loopmem_pretrain.errors import EXIT_DONE, EnvironmentFault, HangDetected, LoopMemError
from loopmem_pretrain.quiet import prepare_imports


def train_here(config_path: str, overrides: Sequence[str], stop_at_step: int | None, trust: bool) -> int:
    """Train as the rank that the environment (RANK, WORLD_SIZE, ...) says, or alone. Returns the exit code."""
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig, check_topology, run_problems
    from loopmem_pretrain.parallel.start import place_from_environment
    from loopmem_pretrain.training import run_folder

    config = load_config(RunConfig, config_path, overrides, run_problems)
    check_topology(config, place_from_environment().world_size)
    prepare_imports(config.training.device)
    import torch.distributed as dist

    from loopmem_pretrain.training.trainer import Trainer

    try:
        trainer = Trainer(config, stop_at_step, trust)
        trainer.train()
    except RuntimeError as error:
        fault = _lost_rank(error)
        if fault is None:
            raise
        run_folder.write_failure(Path(config.run_dir), fault, is_cause=False)
        raise fault from error
    except LoopMemError as error:
        run_folder.write_failure(Path(config.run_dir), error)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    return EXIT_DONE


# In what gloo (its source path) and NCCL say of a rank that is gone; torch's store raises errors of its own kind.
_LOST = ("gloo/transport", "Gloo connectFullMesh", "NCCL communicator was aborted", "ncclRemoteError")
# What gloo says of a rank that is there but does not come to a collective.
_HANGING = ("Timed out waiting", "Application timeout")


def _lost_rank(error: RuntimeError) -> LoopMemError | None:
    """The named error behind a collective that broke off because another rank is gone or hangs, else None."""
    import torch.distributed as dist

    said = str(error)
    if any(sign in said for sign in _HANGING):
        return HangDetected(
            "another rank did not come to a collective within parallel.collective_timeout_seconds",
            "see what that rank says or does (py-spy dump --pid PID); if it only was slow, raise "
            "parallel.collective_timeout_seconds; the same command resumes from the last checkpoint",
        )
    if isinstance(error, dist.DistError) or any(sign in said for sign in _LOST):
        return EnvironmentFault(
            "lost contact with another rank in the middle of a collective",
            "see that rank's own message; then start the same command to resume from the last checkpoint",
        )
    return None


def train_on_ranks(ranks: int, arguments: Sequence[str], run_dir: str) -> int:
    """Start `ranks` processes on this machine, each `loopmem train ARGUMENTS`, and wait for them.

    Returns 0, also where a signal stopped the run cleanly, or the exit code of the rank that failed first.

    Raises:
        EnvironmentFault: a rank was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from loopmem_pretrain.training import run_folder

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
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
        rank, failure = error.get_first_failure()
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
            run_folder.write_failure(Path(run_dir), fault)
            raise fault from None
        status = run_folder.read_status(Path(run_dir)) or {}
        if status.get("status") == "running" or "lost contact" in status.get("reason", ""):
            reason = f"rank {rank} ended with exit code {failure.exitcode}; its message is in the log"
            run_folder.write_status(Path(run_dir), "failed", reason, status.get("step"))
        return int(failure.exitcode)
    except SignalException as error:
        status = run_folder.read_status(Path(run_dir)) or {}
        if status.get("status") in ("interrupted", "done"):
            return EXIT_DONE  # the ranks were given the signal too; they saved and stopped
        raise EnvironmentFault(
            f"ended by {error.sigval.name} before the ranks had saved and stopped",
            "start the same command to resume from the last checkpoint; a smaller logging.interval_steps lets the "
            "ranks notice a signal sooner",
        ) from None
    return EXIT_DONE
