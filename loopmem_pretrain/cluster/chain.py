"""The next job of a run that goes on by a chain of jobs, and the record of what this one was. Standard library only."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from loopmem_pretrain.cluster import slurm
from loopmem_pretrain.errors import EnvironmentFault

# Of the environment only what cannot be a secret is written down.
RECORDED = (
    "SLURM_",
    "SBATCH_",
    "SRUN_",
    "CUDA_",
    "NCCL_",
    "FI_",
    "OMP_",
    "TORCH_NCCL_",
    "UCX_",
    "GLOO_",
    "LOADEDMODULES",
)


def submit_successor(here: slurm.Allocation, run_dir: Path, arguments: Sequence[str]) -> str:
    """Submit this job's script again with its `arguments`, to begin when no job of this name runs; its id.

    The script is asked from SLURM, so it is the one that was submitted, not what has become of the file since. What
    sbatch was told on its command line is not part of it: the main options are repeated here.
    """
    script = run_dir / "slurm" / f"script-{here.job}.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    complaint = slurm.tell("scontrol", "write", "batch_script", here.job, str(script))
    if complaint:
        raise EnvironmentFault(f"SLURM does not give the script of job {here.job}: {complaint}", "use CONTINUE=requeue")
    job = slurm.show_job(here.job)
    options = [f"--job-name={here.name}", "--dependency=singleton", f"--nodes={len(here.nodes)}"]
    options += [f"--ntasks-per-node={here.tasks_per_node}", f"--time={job['TimeLimit']}"]
    options += [f"--chdir={os.getcwd()}", f"--partition={job['Partition']}"]
    options += [f"--account={job['Account']}"] if job.get("Account", "(null)") != "(null)" else []
    for name in ("cpus-per-task", "gpus-per-node", "gpus-per-task"):
        value = os.environ.get(f"SLURM_{name.upper().replace('-', '_')}")
        options += [f"--{name}={value}"] if value else []
    return slurm.sbatch(*options, str(script), *arguments)


def record_environment(here: slurm.Allocation, folder: Path) -> None:
    """RUN/logs/START/environment.json: what this start was given and ran with."""
    values = {
        "start": here.start,
        "nodes": here.nodes,
        "job": slurm.show_job(here.job),
        "slurm": slurm.ask("scontrol", "--version").strip(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "kernel": platform.release(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(RECORDED)},
    }
    (folder / "environment.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
