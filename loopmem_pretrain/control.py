"""What the job of a scheduler, a user and the ranks of a run tell each other, by files and environment variables.

    RUN/STOP     save, end, and do not start again while the file is there
    RUN/PAUSE    the same; a job goes back to the queue and is held there
    RUN/SAVE     save once; rank 0 removes the file when it begins to
    RUN/fence    name of the start that may write into the folder: a job's number and count of restarts, "1234.2"

Signals reach ranks on some systems and not on others (torchrun under cgroups keeps them to itself), files always do.
Standard library only: the job's side runs where the package's dependencies may be missing, outside the container.
"""

import os
from pathlib import Path

from loopmem_pretrain.errors import EnvironmentFault

AT_STEP = "stopped at step"
"""How status.json begins to say that a start has reached its --stop-at-step."""

STOP, PAUSE, SAVE, FENCE = "STOP", "PAUSE", "SAVE", "fence"

START = "LOOPMEM_START"
"""Variable: the name of this start, as in RUN/fence. Unset outside of jobs: then nothing is fenced."""
STOP_FILE = "LOOPMEM_STOP_FILE"
"""Variable: a file whose appearance asks this start, and no later one, to save and end; it says why."""
END_TIME = "LOOPMEM_END_TIME"
"""Variable: when the job's time is over, in seconds since the epoch."""


def stop_request(run_dir: Path) -> str:
    """Why the run is to save and end, or an empty string."""
    for name in (STOP, PAUSE):
        if (run_dir / name).exists():
            return f"stopped by {run_dir / name}"
    path = os.environ.get(STOP_FILE)
    if path and os.path.exists(path):
        return f"stopped: {Path(path).read_text(encoding='utf-8').strip()}"
    return ""


def save_request(run_dir: Path) -> bool:
    """Whether a checkpoint was asked for."""
    return (run_dir / SAVE).exists()


def save_begins(run_dir: Path) -> None:
    """The request has been heard."""
    (run_dir / SAVE).unlink(missing_ok=True)


def job_end() -> float | None:
    """Seconds since the epoch at which the scheduler ends this process; None where it has not said."""
    said = os.environ.get(END_TIME)
    return float(said) if said else None


def owner(run_dir: Path) -> str:
    """Name of the start that may write into the folder; empty where none has said so."""
    path = run_dir / FENCE
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def take_over(run_dir: Path, start: str) -> None:
    """From now on only `start` may write into the folder."""
    temporary = run_dir / f".{FENCE}.tmp"
    temporary.write_text(f"{start}\n", encoding="utf-8")
    os.replace(temporary, run_dir / FENCE)


def replaced_by(run_dir: Path) -> str:
    """Name of the start that has taken the folder over from this one; empty where none has."""
    own = os.environ.get(START)
    other = owner(run_dir) if own else ""
    return other if other != own else ""


def refuse_if_replaced(run_dir: Path) -> None:
    """Call before anything in the folder is replaced, renamed or removed.

    Raises:
        EnvironmentFault: the scheduler has started the run again elsewhere, as it does when a node's network is cut.
    """
    other = replaced_by(run_dir)
    if other:
        raise EnvironmentFault(
            f"start {other} has taken over the run folder {run_dir} from this one ({os.environ[START]})",
            "nothing: this start was cut off and has ended without writing; the other one goes on",
        )
