"""`loopmem slurm submit` and `render`: everything that can be refused is refused before a job waits in the queue."""

import contextlib
import getpass
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import loopmem_pretrain
from loopmem_pretrain.cluster import records, slurm
from loopmem_pretrain.cluster.chain import job_name
from loopmem_pretrain.cluster.job import Launcher, Mode
from loopmem_pretrain.cluster.other_jobs import Follower, after_training, submit_in_turn
from loopmem_pretrain.cluster.render import (
    container_settings,
    gpu_options,
    log_in,
    render,
    site_options,
    site_setup,
    template_of,
)
from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.config.site import TIME, SiteConfig
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import ConfigError, EnvironmentFault, LoopMemError
from loopmem_pretrain.metrics_file import METRICS_NAME, read_lines
from loopmem_pretrain.tools.memory_plan import Layout, worst_stage
from loopmem_pretrain.tools.plans import USABLE
from loopmem_pretrain.tools.step_time import step_time
from loopmem_pretrain.tools.tables import human_bytes, human_seconds

PACKAGE = Path(loopmem_pretrain.__file__).parent
CONFIG = "config.yaml"
"""Beside the package of a submission."""
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")
"""Kinds of filesystems that one node alone sees."""
ENDED_BADLY = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""States of a job whose followers never begin."""
SAVE_FACTOR, SLURM_SLACK = 2.0, 60.0
"""A job is warned so many times its longest save before its end, and SLURM's own delay (seconds) earlier."""


class Request(NamedTuple):
    """What a user asks for."""

    config: str
    overrides: Sequence[str]
    site: SiteConfig
    nodes: int
    spare_nodes: int = 0
    launcher: Launcher = "srun"
    mode: Mode = "requeue"
    time: str | None = None
    health: str = "node"
    max_crashes: int = 3
    after: str | None = None
    """A job that must have ended well before."""
    then: Sequence[Follower] = ()
    """What follows when the run is done."""


class Plan(NamedTuple):
    """A checked request."""

    after: str | None
    run_dir: Path
    config: RunConfig
    code: Path
    """Where the package is copied to and CONFIG lies, and jobs run: a folder of this submission, which no later one
    touches."""
    scripts: dict[str, str]
    """By template: that of the training, then those that wait for it, each for the one before."""
    notes: list[str]
    """What the checks found, for people."""


@contextlib.contextmanager
def noted(faults: list[LoopMemError] | None) -> Iterator[None]:
    """Keeps what a check refuses in the list and goes on behind the block; without a list the refusal stands."""
    try:
        yield
    except LoopMemError as error:
        if faults is None:
            raise
        faults.append(error)


def plan(request: Request, faults: list[LoopMemError] | None = None) -> Plan:
    """Check the request and render its scripts; changes nothing.

    Args:
        request: what is asked for.
        faults: takes what the checks refuse, for scripts that are only looked at; None raises the first.

    Raises:
        ConfigError: configuration, sizes, memory or the site do not fit each other.
        EnvironmentFault: the run folder is another run's, or only this machine sees it.
    """
    site, ranks = request.site, request.nodes * request.site.tasks_per_node
    if request.time is not None and not re.fullmatch(TIME, request.time):
        raise ConfigError(f"--time {request.time} is not a time", "write minutes, H:MM:SS or D-HH:MM:SS")
    config = load_config(RunConfig, request.config, request.overrides, run_problems)
    run_dir, notes = Path(config.run_dir).absolute(), list[str]()
    config = _absolute(config, run_dir)
    with noted(faults):
        _check_request(request)
    with noted(faults):
        notes += _estimate(config, site, ranks)
    with noted(faults):
        check_folder(run_dir, site)
    with noted(faults):
        _check_earlier(request, config, run_dir)
    warning = warning_seconds(run_dir, site)
    notes.append(f"the warning comes {warning} s before the time of a job is over")
    with noted(faults):
        _check_time(request.time or site.time, warning)
    code = code_folder(run_dir / "slurm")
    scripts = {
        "pretrain": _script(request, run_dir, code, warning),
        **after_training(request.then, run_dir, job_name(run_dir), code, config.training.device, site),
    }
    overriding = sorted({name for script in scripts.values() for name in slurm.overriding(script)})
    if overriding:
        notes.append(f"not passed on to sbatch, as the scripts say something else: {', '.join(overriding)}")
    return Plan(request.after, run_dir, config, code, scripts, notes)


def _check_request(request: Request) -> None:
    """
    Raises:
        ConfigError: what is asked for does not go together, or the site does not give it.
    """
    site = request.site
    if site.max_nodes and request.nodes + request.spare_nodes > site.max_nodes:
        raise ConfigError(
            f"{request.nodes + request.spare_nodes} nodes, and {site.name} gives {site.max_nodes} at most",
            "ask for fewer --nodes or --spare-nodes",
        )
    if request.then and request.mode != "requeue":
        raise ConfigError(
            f"--then waits for one job, and with --continue {request.mode} its end need not be the end of the run",
            "use --continue requeue, or submit slurm/convert.sbatch and slurm/evaluate.sbatch when the run is done",
        )


def _check_time(time: str, warning: int) -> None:
    """
    Raises:
        ConfigError: the job would be told to stop before it has trained.
    """
    limit = seconds_of(time)
    if limit and warning > limit / 2:
        raise ConfigError(
            f"a job of {time} ({limit} s) would be asked to save and stop {warning} s before its end",
            f"ask for --time {2 * warning // 60 + 1} (minutes) or more, or set warning_seconds in the cluster's file "
            "(a run that has saved is warned by what its saves took)",
        )


def seconds_of(time: str) -> int:
    """Of a time as sbatch takes it: minutes, minutes:seconds, H:MM:SS, D-H, D-H:MM or D-H:MM:SS."""
    days, has_days, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if has_days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_earlier(request: Request, config: RunConfig, run_dir: Path) -> None:
    """
    Raises:
        ConfigError: the folder has another configuration, or an export where one is to be written.
    """
    from loopmem_pretrain.training.run_folder import refuse_other_configuration

    refuse_other_configuration(config, run_dir)
    if "convert" in request.then and (run_dir / "hf").exists():
        raise ConfigError(
            f"--then convert would write {run_dir / 'hf'}, which is there", "move it away, or leave --then convert out"
        )


def _estimate(config: RunConfig, site: SiteConfig, ranks: int) -> list[str]:
    """Sizes, memory and, where the site's numbers are known, time."""
    layout = Layout.of(config, ranks)
    passes = layout.micro_batches
    notes = [f"{layout.describe()}; {passes} micro-batch{'es' * (passes > 1)} a step"]
    if site.gpus_per_node:
        usable = USABLE * site.gpu_memory_gb * 1e9
        worst = worst_stage(layout)[1].total
        said = f"{human_bytes(worst)} of {human_bytes(usable)} usable memory a GPU"
        if worst > usable:
            raise ConfigError(
                f"the model does not fit: a rank needs {said}",
                f"see the plans that fit: loopmem estimate --ranks {ranks} --gpu-memory {site.gpu_memory_gb:g}",
            )
        notes.append(said)
    if site.hardware:
        seconds = step_time(layout, load_config(ClusterConfig, site.hardware)).total
        hours = seconds * config.training.train_steps / 3600
        notes.append(f"a step is expected to take {human_seconds(seconds)}, the run {hours:,.1f} h")
    return notes


def check_folder(run_dir: Path, site: SiteConfig) -> None:
    """
    Raises:
        ConfigError: a folder of texts, of prepared data, or the like.
        EnvironmentFault: another user's, no run's although there is something in it, or on a disk of this node alone.
    """
    if run_dir.exists() and run_dir.stat().st_uid != os.getuid():
        raise EnvironmentFault(f"the run folder {run_dir} belongs to another user", "choose another run_dir")
    from loopmem_pretrain.training.run_folder import refuse_foreign_folder

    refuse_foreign_folder(run_dir)
    names = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    present = [name for name in names if name != "slurm" and not name.startswith(".")]
    if present and not {"config.yaml", "logs"} & {*present}:
        raise EnvironmentFault(
            f"{run_dir} is no run's folder: it has {', '.join(present[:3])} in it", "choose another run_dir"
        )
    check_shared(run_dir, site, "run_dir")


def check_shared(path: Path, site: SiteConfig, key: str) -> None:
    """
    Raises:
        EnvironmentFault: the folder, which `key` names, is on a disk of this node alone.
    """
    if site.shared_folders:
        if not any(path.is_relative_to(folder) for folder in site.shared_folders):
            raise EnvironmentFault(
                f"{key}, {path}, is not below {' or '.join(site.shared_folders)}, which all nodes share",
                f"set {key} to a folder there",
            )
        return
    parent = next(folder for folder in [path, *path.parents] if folder.exists())
    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(parent)], capture_output=True, text=True, check=True
    ).stdout.strip()
    if kind.split("/")[0] in LOCAL:
        raise EnvironmentFault(
            f"{key}, {path}, lies on {kind}, which other nodes do not see",
            f"set {key} to a shared folder, or name it in shared_folders of the cluster's file",
        )


def _absolute(config: RunConfig, run_dir: Path) -> RunConfig:
    """Paths that do not depend on where the job starts."""
    datasets = tuple(each.model_copy(update={"path": str(Path(each.path).absolute())}) for each in config.data.datasets)
    data = config.data.model_copy(update={"datasets": datasets})
    return config.model_copy(update={"run_dir": str(run_dir), "data": data})


def warning_seconds(run_dir: Path, site: SiteConfig) -> int:
    """How long before its end a job is warned: by what saves and lines of metrics took, or what the site says."""
    saves = []
    for manifest in run_dir.glob("checkpoints/step_*/manifest.json"):
        saves.append(sum(records.read_json(manifest).get("seconds", {}).values()))
    if not saves:
        return site.warning_seconds
    lines = [line for line in read_lines(run_dir / METRICS_NAME, last=20) if "seconds_per_step" in line]
    pairs = itertools.pairwise(lines)
    interval = max((b["seconds_per_step"] * (b["step"] - a["step"]) for a, b in pairs), default=0.0)
    return max(60, round(SAVE_FACTOR * (max(saves) + interval) + SLURM_SLACK))


def _script(request: Request, run_dir: Path, code: Path, warning: int) -> str:
    site, tasks = request.site, request.site.tasks_per_node
    options: dict[str, str | None] = {
        "job-name": job_name(run_dir),
        "nodes": str(request.nodes + request.spare_nodes),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(max(1, site.cpus_per_node // tasks)),
        "mem": site.memory,
        "time": request.time or site.time,
        "signal": f"B:USR1@{warning}",
        "output": log_in(run_dir / "logs", "job-%j.out"),
        "chdir": str(code),
        **gpu_options(site),
        **site_options(site),
    }
    if request.mode != "requeue":
        options |= {"requeue": None, "no-requeue": ""}
    if request.after:
        options |= {"dependency": f"afterok:{request.after}", "kill-on-invalid-dep": "yes"}
    settings = {
        "CONFIG": str(code / CONFIG),
        "RUN_DIR": str(run_dir),
        "PYTHON": site.python or sys.executable,
        "LAUNCHER": request.launcher,
        "CONTINUE": request.mode,
        "MAX_CRASHES": str(request.max_crashes),
        "HEALTH": request.health,
        "SPARE_NODES": str(request.spare_nodes),
        # Also what is not asked for: variables that happen to be set where somebody submits must not decide.
        "HANG_SECONDS": "600",
        "RANK_PYTHON": site.python or sys.executable,
        "WRAP": "",
        "SRUN_OPTIONS": "",
        **container_settings(site, [str(run_dir)], code),
    }
    return render(template_of("pretrain"), options, settings, site_setup(site))


def submit(ready: Plan) -> dict[str, str]:
    """Let SLURM check the scripts, freeze what will run below RUN/slurm, and submit; the jobs' ids by template.

    Raises:
        EnvironmentFault: SLURM refuses a script; nothing has been written then. Or it takes one and not the next:
            what was submitted has been cancelled.
    """
    if ready.after:
        check_after(ready.after)
    for task, script in ready.scripts.items():
        check_script(task, script)
    folder = ready.run_dir / "slurm"
    freeze(ready.code, CONFIG, dump_config(ready.config))
    (ready.run_dir / "logs").mkdir(exist_ok=True)
    jobs = submit_scripts(folder, ready.scripts)
    from loopmem_pretrain.training.run_folder import git_commit

    said = {"event": "submit", "jobs": jobs, "user": getpass.getuser(), "command": shlex.join(sys.argv)}
    records.append(ready.run_dir, {**said, "git_commit": git_commit()})
    return jobs


def submit_scripts(folder: Path, scripts: Mapping[str, str]) -> dict[str, str]:
    """Write scripts into a folder and submit each to follow the one before; the jobs' ids by name."""
    paths = {name: folder / f"{name}.sbatch" for name in scripts}
    for name, script in scripts.items():
        write_file(paths[name], script.encode())
    return dict(zip(paths, submit_in_turn([*paths.values()]), strict=True))


def code_folder(folder: Path) -> Path:
    """Of a submission now, which no later one touches."""
    return folder / f"code-{time.strftime('%Y%m%dT%H%M%S')}"


def freeze(folder: Path, name: str, configuration: str) -> None:
    """Copy the package, and write the configuration and the package's commit beside it.

    Later changes of them, and later submissions, do not reach the jobs that start in this folder: a job that is put
    back into the queue reads all of it again.
    """
    from loopmem_pretrain.training.run_folder import COMMIT, git_commit

    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    write_file(folder / name, configuration.encode())
    commit = git_commit()
    if commit:
        write_file(folder / COMMIT, f"{commit}\n".encode())


def check_script(task: str, script: str) -> None:
    """
    Raises:
        EnvironmentFault: SLURM would refuse it, with its reason.
    """
    refusal = slurm.test_only(script)
    if refusal:
        raise EnvironmentFault(
            f"SLURM refuses the job ({task}.sbatch): {refusal}",
            "compare partition, time, nodes, GPUs and cores with what the cluster gives: sinfo -o '%P %l %D %c %G'",
        )


def check_after(job: str) -> None:
    """
    Raises:
        EnvironmentFault: SLURM would start at once what waits for a job that it does not know, and cancel what waits
            for one that has failed.
    """
    try:
        state = slurm.job_fields(slurm.ask("scontrol", "show", "job", job, patience=0)).get("JobState", "")
    except EnvironmentFault as fault:
        if slurm.UNKNOWN_JOB not in fault.problem:
            raise
        fix = "if it has ended well (sacct -j), leave --after out; SLURM forgets jobs some minutes after their end"
        raise EnvironmentFault(f"--after {job}: SLURM does not know that job", fix) from None
    if state.startswith(ENDED_BADLY):
        raise EnvironmentFault(f"--after {job}: that job has ended as {state}", "see its log, and let it end well")
