"""The folder of a run: whose it is, what it was started with, and how it stands.

RUN/config.yaml        the resolved configuration; another one is refused
RUN/run_id             random, made with the folder; every checkpoint carries it
RUN/environment.json   versions, git commit, command of the latest start
RUN/starts.jsonl       the same of every start that began to train, and how it ended
RUN/status.json        the verdict: running | done | interrupted | failed, with reason
RUN/metrics.jsonl, RUN/checkpoints/, RUN/tensorboard/, RUN/wandb/
"""

import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from loopmem_pretrain import __version__, control
from loopmem_pretrain.checkpoint.store import LOCK, RUN_ID, CheckpointStore, checkpointed_step
from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.restart import changes
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import ConfigError, EnvironmentFault, LoopMemError
from loopmem_pretrain.lock import is_locked, take_lock
from loopmem_pretrain.metrics_file import METRICS_NAME
from loopmem_pretrain.training.failures import lost_rank, named

log = logging.getLogger(__name__)

Status = Literal["running", "done", "interrupted", "failed"]

TAKING_OVER = 60.0
"""Seconds in which a start that was cut off sees that another has taken the folder over: it looks every 5."""
ENVIRONMENT = "environment.json"
COMMIT = "git_commit"
"""Beside a copy of the package that has left its source tree, as those of jobs: the commit that it is of."""
TIME = "%Y-%m-%dT%H:%M:%S%z"
"""Of what is written in a run folder."""
_STARTED = datetime.now().astimezone().replace(microsecond=0)
VERSIONS_OF = ("torch", "deepspeed", "megatron-core", "transformers", "numpy", "sentencepiece")


def prepare(config: RunConfig, run_dir: Path) -> BinaryIO:
    """Create the folder, or check that it belongs to this configuration, and lock it. Rank 0 only.

    Returns the lock: keep it for as long as the process writes here.

    Raises:
        ConfigError: the folder belongs to another configuration (differences shown), or is something else's.
        EnvironmentFault: the folder cannot be written, or another process trains in it.
    """
    refuse_foreign_folder(run_dir)
    checkpoints = CheckpointStore(run_dir).folder  # perhaps on another disk
    for folder in [run_dir, checkpoints] if checkpoints.is_dir() else [run_dir]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".write-test"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write to {'the run folder ' if folder == run_dir else ''}{folder}: {error.strerror}",
                "give write permission, free some space, or choose another run_dir",
            ) from None
    lock = _lock(run_dir)
    refuse_other_configuration(config, run_dir)
    identity = run_dir / RUN_ID
    if not identity.exists():
        write_file(identity, f"{secrets.token_hex(8)}\n".encode())
    write_file(run_dir / "config.yaml", dump_config(config).encode())
    write_file(run_dir / ENVIRONMENT, (json.dumps(environment(), indent=1) + "\n").encode())
    return lock


def _lock(run_dir: Path) -> BinaryIO:
    """The folder's lock; a job that has taken the folder over waits until the start before it has noticed (RUN/fence).

    Raises:
        EnvironmentFault: another process trains in the folder.
    """
    start = os.environ.get(control.START)
    deadline = time.monotonic() + (TAKING_OVER if start and control.owner(run_dir) == start else 0.0)
    busy = f"another process is training in the run folder {run_dir}"
    while True:
        try:
            return take_lock(run_dir / LOCK, busy, "wait for it, stop it, or choose another run_dir")
        except EnvironmentFault:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def refuse_foreign_folder(run_dir: Path) -> None:
    """
    Raises:
        ConfigError: a file, or a folder of texts, of prepared data, of an exported model or of a repository.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir {run_dir} is a file", "name a folder: a new one, or that of a run to go on with")
    if not run_dir.is_dir() or (run_dir / RUN_ID).exists() or (run_dir / METRICS_NAME).exists():
        return
    present = {path.name for path in run_dir.iterdir()}
    texts = {name for name in present if name.endswith((".jsonl", ".jsonl.zst", ".parquet"))}
    found = sorted(texts | present & {"manifest.json", "config.json", ".git", "setup.py"})
    if found:
        raise ConfigError(
            f"{run_dir} is no run's folder: it has {', '.join(found[:3])} in it",
            "choose another run_dir, a new or empty folder",
        )


def has_begun(run_dir: Path) -> bool:
    """Whether there is anything that another configuration would not continue: a line of the log, or a checkpoint."""
    lines, checkpoints = run_dir / METRICS_NAME, run_dir / "checkpoints"
    return (lines.exists() and lines.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def refuse_other_configuration(config: RunConfig, run_dir: Path) -> None:
    """
    Raises:
        ConfigError: the run that is in the folder was started with another configuration (differences shown).
    """
    recorded = run_dir / "config.yaml"
    if not recorded.exists() or not has_begun(run_dir):
        return
    changed = changes(load_config(RunConfig, recorded), config)
    if changed:
        raise ConfigError(
            f"the run folder {run_dir} belongs to another configuration:\n    " + "\n    ".join(changed),
            "choose another run_dir for this configuration, or take the changes back to continue that run; what may "
            "change, and how a new run begins with the weights of this one, is in docs/operations.md",
        )


def environment() -> dict[str, Any]:
    """What a number may depend on: versions, commit, command. No environment variables, nor credentials in URLs."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    return {
        "loopmem_pretrain": __version__,
        "git_commit": git_commit(),
        "command": [re.sub(r"(?<=://)[^/@\s]*@", "", argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "started": time.strftime(TIME),
        "versions": versions,
    }


def git_commit() -> str | None:
    """Commit of the source tree this package comes from, `-dirty` with uncommitted changes; None for a wheel."""
    root = Path(__file__).resolve().parents[2]
    if (root / COMMIT).exists():
        return (root / COMMIT).read_text(encoding="utf-8").strip()
    if not (root / "setup.py").exists() or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def write_status(
    run_dir: Path,
    status: Status,
    reason: str,
    step: int | None = None,
    is_cause: bool = True,
    checkpoint: int = 0,
) -> None:
    """Record how the run stands. Rank 0 only, but for failures.

    `checkpoint`: with `failed`, the last step at which there is known to have been a checkpoint (`checkpointed_step`).
    """
    record = {"status": status, "reason": reason, "step": step, "time": time.strftime(TIME)}
    if checkpoint:
        record["checkpoint"] = checkpoint
    if not is_cause:
        record["is_cause"] = False
    write_file(run_dir / "status.json", (json.dumps(record) + "\n").encode())


def write_failure(
    run_dir: Path,
    error: BaseException,
    step: int | None = None,
    is_cause: bool | None = None,
    complain: Callable[[str], object] = log.error,
) -> None:
    """Record that this start failed, on any rank; `complain` is told what keeps it from being written.

    Not for wrong usage, nor in a folder that is no run's, whose run is done or in which another start trains. With
    `step`, that of a training under way, wrong usage is recorded too.

    `is_cause`: false where the failure only follows from another, which stays recorded. None: false for a rank that
    noticed that another is gone.
    """
    fault = named(error)
    if (step is None and isinstance(fault, ConfigError)) or not (run_dir / "config.yaml").exists():
        return
    if is_cause is None:
        is_cause = isinstance(error, LoopMemError) or lost_rank(error) is None
    try:
        status = read_status(run_dir)
        if status is None and step is None and (run_dir / "status.json").exists():
            return  # damaged: what it knew is asked for again by the next start (`_refuse_lost_checkpoints`)
        before = status or {}
        told = before.get("status") == "failed" and is_of_this_start(before) and before.get("is_cause", True)
        if before.get("status") == "done" or (told and not is_cause) or _another_start_trains_in(run_dir):
            return
        reason = fault.problem if fault is not None else f"{type(error).__name__}: {error}"
        known = checkpointed_step(before) if "status" in before else 0
        write_status(run_dir, "failed", reason, before.get("step") if step is None else step, is_cause, known)
    except (LoopMemError, OSError) as obstacle:
        complain(f"cannot record the failure in {run_dir / 'status.json'}: {obstacle}")


def is_of_this_start(status: Mapping[str, Any]) -> bool:
    """Whether what status.json says was written since this process began."""
    try:
        return datetime.fromisoformat(status["time"]) >= _STARTED
    except (KeyError, TypeError, ValueError):
        return False


_held: set[Path] = set()
"""Folders that a rank of this start has locked."""


def hold(run_dir: Path) -> None:
    """Tell this process that rank 0 of its start has locked the folder."""
    _held.add(run_dir.absolute())


def _another_start_trains_in(run_dir: Path) -> bool:
    return run_dir.absolute() not in _held and is_locked(run_dir / LOCK)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The last recorded status; None where there is none, or a damaged one."""
    try:
        status = json.loads((run_dir / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return status if isinstance(status, dict) else None
