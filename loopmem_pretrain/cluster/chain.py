"""The next job of a run that goes on by a chain of jobs, and the record of what this one was. Standard library only."""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopmem_pretrain.cluster import slurm
from loopmem_pretrain.errors import EnvironmentFault

# Of the environment only this is written down, and of it nothing that may be a secret.
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
SECRET = re.compile("JWT|TOKEN|_KEY|APIKEY|SECRET|PASS", re.IGNORECASE)

FIELDS = {
    "time": "TimeLimit",
    "partition": "Partition",
    "account": "Account",
    "qos": "QOS",
    "reservation": "Reservation",
    "constraint": "Features",
    "nodelist": "ReqNodeList",
    "exclude": "ExcNodeList",
    "mem": "MinMemoryNode",
    "mem-per-cpu": "MinMemoryCPU",
    "tmp": "MinTmpDiskNode",
    "gres": "TresPerNode",
    "licenses": "Licenses",
    "switches": "Switches",
    "nice": "Nice",
    "comment": "Comment",
    "mail-type": "MailType",
    "mail-user": "MailUser",
    "output": "StdOut",
    "error": "StdErr",
}
"""Options of sbatch, and what `scontrol show job` calls their values."""
VARIABLES = {
    name: f"SLURM_{name.upper().replace('-', '_')}"
    for name in (
        "cpus-per-task",
        "gpus-per-node",
        "gpus-per-task",
        "cpus-per-gpu",
        "mem-per-gpu",
        "gpu-bind",
        "gpu-freq",
        "threads-per-core",
        "hint",
        "distribution",
    )
}
"""Options of sbatch that the batch script finds in its variables, where they were given."""
SHARING = {"NO": "--exclusive", "USER": "--exclusive=user", "MCS": "--exclusive=mcs", "YES": "--oversubscribe"}
"""By what `scontrol show job` says of OverSubscribe."""


def submit_successor(here: slurm.Allocation, run_dir: Path, arguments: Sequence[str]) -> str:
    """Submit this job's script again with its `arguments`, to begin when this job is over; its id.

    A job that SLURM itself puts back into the queue has submitted one before: `singleton` lets them follow each other.

    The script is asked from SLURM, so it is the one that was submitted, not what has become of the file since. What
    sbatch was told on its command line is not part of it, so it is repeated as far as SLURM says what it was.
    """
    script = run_dir / "slurm" / f"script-{here.job}.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    complaint = slurm.complaint_after("scontrol", "write", "batch_script", here.job, str(script))
    if complaint:
        raise EnvironmentFault(f"SLURM does not give the script of job {here.job}: {complaint}", "use CONTINUE=requeue")
    options = [f"--job-name={job_name(run_dir)}", f"--dependency=afterany:{here.job},singleton"]
    options += [f"--nodes={len(here.nodes)}"]
    options += [f"--ntasks-per-node={here.tasks_per_node}", f"--chdir={os.getcwd()}"]
    options += options_of(here.job, slurm.show_job(here.job), os.environ)
    return slurm.sbatch(*options, str(script), *arguments)


def job_name(run_dir: Path) -> str:
    """Of all jobs that train a run, and of no other run: what waits for another job of the run goes by it."""
    return f"loopmem-{run_dir.name.replace(' ', '_')}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]}"


def options_of(number: str, job: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Options of sbatch that give another job what job `number` was given, by what SLURM says of it."""
    values = {option: job[field] for option, field in FIELDS.items() if field in job}
    values |= {option: environment[name] for option, name in VARIABLES.items() if name in environment}
    for given, follow in {"mem-per-gpu": ("mem", "mem-per-cpu"), "hint": ("threads-per-core",)}.items():
        if given in values:  # sbatch refuses it together with what SLURM has made of it
            values = {option: value for option, value in values.items() if option not in follow}
    if "gres" in values:
        each = [re.sub("^gres[:/]", "", item) for item in values["gres"].split(",")]
        values["gres"] = ",".join(item for item in each if "gpus-per-node" not in values or not item.startswith("gpu"))
    for option in ("output", "error"):
        if option in values:
            path = Path(values[option].replace("%", "%%"))
            values[option] = str(path.with_name(re.sub(rf"(?<!\d){number}(?!\d)", "%j", path.name)))
    if values.get("error") == values.get("output"):
        values.pop("error", None)
    flags = ["--open-mode=append", "--requeue" if job.get("Requeue") == "1" else "--no-requeue"]
    flags += ["--contiguous"] if job.get("Contiguous") == "1" else []
    flags += [SHARING[job["OverSubscribe"]]] if job.get("OverSubscribe") in SHARING else []
    return [*(f"--{option}={value}" for option, value in values.items() if value), *flags]


def is_recorded(name: str) -> bool:
    """Whether a variable of this name is written down."""
    return name.startswith(RECORDED) and not SECRET.search(name)


def record_environment(here: slurm.Allocation, folder: Path) -> None:
    """RUN/logs/START/environment.json: what this start was given and ran with."""
    values = {
        "start": here.start,
        "nodes": here.nodes,
        "job": slurm.show_job(here.job),
        "slurm": slurm.ask("scontrol", "--version").strip(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "kernel": platform.release(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if is_recorded(name)},
    }
    (folder / "environment.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
