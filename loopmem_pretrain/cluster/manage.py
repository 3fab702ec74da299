"""`loopmem slurm status|logs|cancel|stop`: what became of a run over all its starts, and how to end it."""

import os
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

from loopmem_pretrain import control
from loopmem_pretrain.cluster import accounting, rank, records, slurm
from loopmem_pretrain.cluster.chain import job_name
from loopmem_pretrain.cluster.other_jobs import FOLLOWERS
from loopmem_pretrain.data.files import require_folder
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.metrics_file import METRICS_NAME, read_lines
from loopmem_pretrain.tools.tables import table
from loopmem_pretrain.words import counted


def status(run_dir: str) -> str:
    """How the run stands, its jobs in the queue, a line a start, and what all have cost, by sacct where it knows."""
    folder = _run(run_dir)
    submitted, lines = records.starts_file(folder).exists(), records.read(folder)
    verdict = records.read_json(folder / "status.json")
    if not verdict:
        there = (folder / "status.json").exists()
        verdict = {"status": "unknown" if there else "not started"}
        verdict["reason"] = "status.json is damaged" if there else "no status.json yet"
    beat = records.read_json(folder / "heartbeat.json")
    said = [f"{folder}: {verdict['status']}, {verdict.get('reason')}"]
    if beat:
        said.append(f"phase {beat.get('phase', 'training')}, step {beat['step']}, heartbeat of {beat.get('time', '')}")
    asked = [name for name in (control.STOP, control.PAUSE, control.SAVE) if (folder / name).exists()]
    said += [f"asked for by file: {', '.join(asked)}"] if asked else []
    if not submitted:
        return "\n".join([*said, NOT_SUBMITTED])
    try:
        said += [f"job {job}: {row}" for job, row in _jobs(folder).items()] or ["no job in the queue"]
    except EnvironmentFault as fault:  # on a machine without SLURM the records are still worth reading
        said.append(f"jobs unknown: {fault.problem}")
    starts = [line for line in lines if line["event"] == "start"]
    if starts:
        said += ["starts:", *_starts(folder, starts, lines), "", *_accounted(starts), *_summary(folder, starts, lines)]
    return "\n".join(said)


def _accounted(starts: list[dict[str, Any]]) -> list[str]:
    """What SLURM's accounting says of the jobs, or why the run's own records must do."""
    jobs = [*dict.fromkeys(start["start"].partition(".")[0] for start in starts)]
    try:
        found = accounting.ask(jobs, starts[0]["time"])
    except EnvironmentFault as fault:
        reason = fault.problem.rpartition(" failed: ")[2].splitlines()[-1]
        return [f"hours by the run's own records, as there is no accounting: {reason}"]
    return ["by sacct:", *accounting.rows(found), "", f"hours by sacct: {accounting.hours(found)}"]


NOT_SUBMITTED = "not started by SLURM: no job of it is known"


def _run(run_dir: str) -> Path:
    folder = Path(run_dir).absolute()
    require_folder(folder, "give a run folder")
    if not records.starts_file(folder).exists() and not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is no run folder: it has neither config.yaml nor slurm/", "give a run folder")
    return folder


def _submitted(run_dir: str) -> Path:
    folder = _run(run_dir)
    if not records.starts_file(folder).exists():
        raise ConfigError(
            f"{folder} was {NOT_SUBMITTED}",
            f"see where it was started; `loopmem slurm stop {shlex.quote(str(folder))}` asks it to save and end",
        )
    return folder


def _jobs(folder: Path) -> dict[str, str]:
    """The run's jobs in the queue: those with its name, and those that the records of its last start name."""
    starts = [line for line in records.read(folder) if line["event"] == "start"]
    known = {starts[-1]["start"].partition(".")[0], starts[-1].get("successor")} if starts else set()
    rows = slurm.ask("squeue", "-h", "--me", "-o", "%i %j %T %M of %l on %D nodes %R", patience=0).splitlines()
    each = [row.split(maxsplit=2) for row in rows]
    own = job_name(folder)
    tasks = {own: "", **{f"{own}-{task}": f"{task} " for task in FOLLOWERS}}
    return {job: tasks.get(name, "") + said for job, name, said in each if name in tasks or job in known}


def _ends(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["start"]: line for line in lines if line["event"] == "end"}


def _seconds(folder: Path, start: dict[str, Any], ends: dict[str, dict[str, Any]]) -> float:
    """How long a start held its nodes; of one that was killed, until a rank last wrote into its log."""
    end = ends.get(start["start"])
    if end:
        return float(end["time"] - start["time"])
    logs = list((folder / "logs" / start["start"]).glob("rank-*.log"))
    return max(0.0, max((path.stat().st_mtime for path in logs), default=start["time"]) - start["time"])


def _starts(folder: Path, starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    ends = _ends(lines)
    rows = [["start", "began", "hours", "nodes", "from step", "to step", "verdict"]]
    for index, start in enumerate(starts):
        end = ends.get(start["start"], {})
        last = index == len(starts) - 1
        verdict = end.get("verdict", "running, or killed" if last else "killed from outside")
        after = end.get(
            "checkpoint", starts[index + 1]["checkpoint"] if not last else records.newest_checkpoint(folder)
        )
        began = time.strftime("%m-%d %H:%M", time.localtime(start["time"]))
        hours = f"{_seconds(folder, start, ends) / 3600:.2f}"
        steps = [str(max(0, start["checkpoint"])), str(max(0, after))]
        rows.append([start["start"], began, hours, str(len(start["nodes"])), *steps, verdict])
    return table(rows)


def _summary(folder: Path, starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """GPU hours, the share of them that trained steps which count, steps trained in vain, causes and nodes."""
    ends = _ends(lines)
    rank_hours = sum(_seconds(folder, start, ends) * start["ranks"] for start in starts) / 3600
    logged = read_lines(folder / METRICS_NAME)
    lost, before, saved = 0, 0, {0}
    for step in (line["step"] for line in logged):
        if step <= before:  # resumed from a checkpoint, and every checkpoint is of a step that was logged
            lost += before - max(each for each in saved if each < step)
        saved.add(step)
        before = step
    # of steps trained again the last time
    seconds = {line["step"]: line["seconds_per_step"] for line in logged if "seconds_per_step" in line}
    useful = 0.0
    for earlier, later in zip([0, *sorted(seconds)], sorted(seconds), strict=False):
        useful += (later - earlier) * seconds[later]
    held = sum(_seconds(folder, start, ends) for start in starts)
    causes = Counter(ends[start["start"]]["verdict"] if start["start"] in ends else "no end" for start in starts)
    nodes = Counter(node for start in starts for node in start["nodes"])
    bad = sorted({node for end in ends.values() for node in end.get("bad_nodes", [])})
    share = useful / held if held else 0
    return [
        f"{counted(len(starts), 'start')}, {rank_hours:,.2f} rank hours, {share:.0%} of them in steps that count; "
        f"{counted(lost, 'step')} trained again",
        "ends: " + ", ".join(f"{count} {name}" for name, count in causes.most_common()),
        f"{counted(len(nodes), 'node')} used" + (f"; left out: {', '.join(bad)}" if bad else ""),
    ]


def log_path(run_dir: str, number: int) -> Path:
    """The log of one rank in the newest start that has one.

    Raises:
        ConfigError: no start has got so far; names the log of the job.
    """
    folder = _submitted(run_dir)
    starts = [line["start"] for line in records.read(folder) if line["event"] == "start"]
    for start in reversed(starts):
        path = rank.log_file(folder / "logs" / start, number)
        if path.exists():
            return path
    jobs = sorted((folder / "logs").glob("job-*.out"), key=os.path.getmtime)
    where = f"see {jobs[-1]}" if jobs else "wait for the job to start: loopmem slurm status"
    raise ConfigError(f"rank {number} has no log yet in {folder / 'logs'}", where)


def show_log(run_dir: str, number: int, follow: bool) -> None:
    """Become `tail` on the log of a rank."""
    path = str(log_path(run_dir, number))
    os.execvp("tail", ["tail", "--lines=40", *(["--follow=name", "--retry"] if follow else []), path])


def cancel(run_dir: str) -> str:
    """End all jobs of the run now; ranks have what SLURM's KillWait grants them to save."""
    folder = _submitted(run_dir)
    jobs = _jobs(folder)
    if not jobs:
        return f"no job of {folder} is in the queue"
    in_turn = sorted(jobs, key=int, reverse=True)  # what waits for another one first
    complaint = slurm.complaint_after("scancel", *in_turn, patience=slurm.AT_THE_TERMINAL)
    if complaint:
        raise EnvironmentFault(f"scancel failed: {complaint}", "cancel by hand: scancel " + " ".join(jobs))
    return f"cancelled {', '.join(jobs)}"


def stop(run_dir: str) -> str:
    """Ask the run to save, end, and stay ended, whatever has started it."""
    folder = _run(run_dir)
    if records.read_json(folder / "status.json").get("status") == "done":
        return f"nothing to stop: {folder} is done"
    path = folder / control.STOP
    path.touch()
    return f"{path}: the run saves at its next line of metrics.jsonl and ends; remove the file to let it start again"
