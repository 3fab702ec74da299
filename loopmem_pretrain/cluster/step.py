"""A step of the job: its srun command and environment, whether its ranks still move, its end, what its ranks said.

Standard library only.
"""

import itertools
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from loopmem_pretrain.cluster import rank, slurm

PATIENCE = 30.0
"""Seconds in which SLURM ends a step."""
TICK = 1.0
"""Seconds between looks at the ranks."""
SHOWN = 8
"""Different errors of ranks that the job's output repeats."""


def srun(name: str, nodes: Sequence[str], tasks: int, cpus: int | None) -> list[str]:
    """The head of a command: `tasks` on each node, ranks node by node, `cpus` for each (None: as srun decides)."""
    command = ["srun", f"--job-name={name}", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
    command += [f"--ntasks={len(nodes) * tasks}", f"--ntasks-per-node={tasks}", "--distribution=block"]
    if cpus:  # since 22.05 srun does not take it over from the job: one core a task would be left
        command.append(f"--cpus-per-task={cpus}")
    if "SLURM_GPUS_PER_TASK" in os.environ:
        command.append(f"--gpus-per-node={os.environ['SLURM_GPUS_ON_NODE']}")
    return command


def environment(here: slurm.Allocation, nodes: Sequence[str]) -> dict[str, str]:
    """This process's, and where the ranks on `nodes` meet.

    Every task sees all GPUs of its node, also in a job of --gpus-per-task: NCCL finds NVLink only between GPUs that
    one process sees, and a check of the node must see all of them.
    """
    hidden = {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"} if "SLURM_GPUS_PER_TASK" in os.environ else set()
    values = {name: value for name, value in os.environ.items() if name not in hidden}
    values |= {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(here.port)}
    return {**values, rank.RANKS_PER_NODE: str(here.tasks_per_node)}


def end(step: "subprocess.Popen[bytes]", job: str, name: str) -> None:
    """Through SLURM: the end of srun alone would leave the tasks on their GPUs."""
    for running in slurm.steps(job, name):
        complaint = slurm.complaint_after("scancel", "--signal=KILL", running)
        if complaint:
            print(f"SLURM refused to end step {running}: {complaint}", flush=True)
    try:
        step.wait(PATIENCE)
    except subprocess.TimeoutExpired:  # a node does not answer
        step.kill()
        step.wait()


class Heartbeat:
    """Whether rank 0 still writes heartbeat.json; by this machine's clock alone."""

    def __init__(self, path: Path, start_seconds: float, hang_seconds: float) -> None:
        self.path, self.limits = path, (start_seconds, hang_seconds)
        self.content = b""
        self.content = self._read()
        self.looked = self.changed = time.monotonic()
        self.beats = False

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:
            return self.content  # not there yet, or the disk does not answer

    def stands_still(self) -> bool:
        """Asked every TICK."""
        content, now = self._read(), time.monotonic()
        if now - self.looked > 10 * TICK:
            # This process was stopped (a job that is suspended), or the disk: it says nothing of the ranks.
            self.changed += now - self.looked
        self.looked = now
        if content != self.content:
            self.content, self.changed, self.beats = content, now, True
        return now - self.changed > self.limits[self.beats]

    def __str__(self) -> str:
        return f"{self.path} has stood still for {self.limits[self.beats]:.0f} s"


def what_ranks_said(folder: Path) -> list[str]:
    """The errors at the ends of the ranks' logs, each once with the ranks that said it, at most SHOWN of them.

    Lines after one that are indented go along: what to do.
    """
    said: dict[str, list[str]] = {}
    for path in sorted(folder.glob("rank-*.log")):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
        for index, line in enumerate(lines):
            if "rror: " in line and not line.startswith((" ", "\t")):
                more = itertools.takewhile(lambda text: text.startswith("  "), lines[index + 1 : index + 10])
                text = "\n".join([line.split("rror: ", 1)[1].strip(), *more])
                said.setdefault(text, []).append(path.stem)
    others = {text: f" and {len(ranks) - 1} more" if ranks[1:] else "" for text, ranks in said.items()}
    return [f"{ranks[0]}{others[text]}: {text}" for text, ranks in said.items()][:SHOWN]
