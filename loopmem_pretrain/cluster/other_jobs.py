"""Jobs of one task beside the training, from the other templates of slurm/, and jobs that wait for each other."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from loopmem_pretrain.cluster import slurm
from loopmem_pretrain.cluster.render import (
    container_words,
    gpu_options,
    log_in,
    render,
    site_options,
    site_setup,
    template_of,
)
from loopmem_pretrain.config.site import SiteConfig
from loopmem_pretrain.errors import EnvironmentFault

Follower = Literal["convert", "evaluate"]
FOLLOWERS: tuple[Follower, ...] = ("convert", "evaluate")
"""What may come after the training, in this order."""
CPUS = 8
"""Cores of a job without GPU, or all of a smaller node."""


class TaskJob(NamedTuple):
    """What a job of one task needs beside the site's values."""

    task: str
    """Its template."""
    name: str
    output: str
    """Its log, as sbatch takes it: `render.log_in`."""
    code: Path
    """Folder that has the package; where it starts."""
    settings: Mapping[str, str]
    """Of the template."""
    folders: Sequence[str]
    """What a container must see beside the site's mounts."""
    gpu: bool = False
    options: Mapping[str, str] = {}
    """More options of sbatch."""
    arguments: Sequence[str] = ()
    """For the command of loopmem."""


def one_task(job: TaskJob, site: SiteConfig) -> str:
    """Its script."""
    other = site.other_jobs
    shared = site_options(site)
    shared.pop("exclusive", None)  # of nodes full of ranks; one task would keep a whole node from others
    if other.partition and not job.gpu:  # what else the site says is about the nodes of its own partition
        shared = {"account": site.account, "partition": other.partition}
    gpus = 1 if job.gpu else 0
    cpus = max(1, site.cpus_per_node // site.gpus_per_node) if gpus else min(CPUS, site.cpus_per_node)
    options: dict[str, str | None] = {
        "job-name": job.name,
        "cpus-per-task": str(cpus),
        "mem": other.memory,
        "time": other.time or site.time,
        "output": job.output,
        "chdir": str(job.code),
        **gpu_options(site, gpus),
        **shared,
        **job.options,
    }
    container = container_words(site, job.folders, job.code, job.gpu)
    if site.container and site.container.kind == "pyxis":
        container = ["srun", "--export=ALL", f"--cpus-per-task={cpus}", *container]
    python = site.container.python if site.container else site.python or sys.executable
    settings = {"PYTHON": python, "WRAP": shlex.join(container), **job.settings}
    return render(template_of(job.task), options, settings, site_setup(site), job.arguments)


def after_training(
    then: Sequence[Follower], run_dir: Path, name: str, code: Path, device: str, site: SiteConfig
) -> dict[str, str]:
    """Scripts of the jobs that wait for the training of a run, which makes RUN/hf and RUN/evaluation.json."""
    run, gpu = str(run_dir), device != "cpu" and site.gpus_per_node > 0
    settings = {
        "convert": {"RUN_DIR": run, "OUT": str(run_dir / "hf"), "UNFINISHED": "no"},
        "evaluate": {
            "MODEL": run,
            "OUT": str(run_dir / "evaluation.json"),
            "UNFINISHED": "no",
            "DEVICE": "cuda" if gpu else "cpu",
        },
    }
    return {
        task: one_task(
            TaskJob(
                task=task,
                name=f"{name}-{task}",
                output=log_in(run_dir / "logs", f"{task}-%j.out"),
                code=code,
                settings=settings[task],
                folders=[run],
                gpu=gpu and task == "evaluate",
            ),
            site,
        )
        for task in FOLLOWERS
        if task in then
    }


def submit_in_turn(scripts: Sequence[Path]) -> list[str]:
    """Submit jobs that each begin when the one before has ended well, and leave the queue when it has not; their ids.

    Raises:
        EnvironmentFault: SLURM refuses one; those before it are cancelled.
    """
    jobs: list[str] = []
    for script in scripts:
        waits = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            environment = slurm.sbatch_environment(script.read_text(encoding="utf-8"))
            jobs.append(slurm.sbatch(*waits, str(script), environment=environment))
        except (EnvironmentFault, OSError, KeyboardInterrupt) as error:
            if not jobs:
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            problem = "interrupted from the keyboard" if interrupted else getattr(error, "problem", str(error))
            raise EnvironmentFault(f"{script}: {problem}; {take_back(jobs)}", "mend it and submit again") from error
    return jobs


def take_back(jobs: Sequence[str]) -> str:
    """Cancel jobs, the last one first; what to tell the user."""
    complaint = slurm.complaint_after("scancel", *reversed(jobs), patience=slurm.AT_THE_TERMINAL)
    if complaint:
        return f"still in the queue, to be cancelled by hand: scancel {' '.join(reversed(jobs))} ({complaint})"
    return f"submitted before it, now cancelled: {', '.join(jobs)}"
