"""Whether the nodes of a job are fit: asked before training, and after the ranks have ended without a reason.

    python -m loopmem_pretrain.cluster.health FOLDER      what every node runs; writes FOLDER/NODE.json

Standard library only. cluster/burn_in.py measures what needs torch.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopmem_pretrain.cluster import records, slurm
from loopmem_pretrain.cluster.step import environment, srun
from loopmem_pretrain.errors import EnvironmentFault

LEVELS = ("none", "node", "full")
"""none: nothing; node: what this file checks; full: also a matrix product on each GPU and an all-reduce over all."""
LIMIT, SIGN_OF_LIFE = 180.0, 60.0
"""Seconds a node has for the checks before training, and for an answer after a crash."""
SILENT = "gave no sign of life"
"""What is wrong with a node that has not answered."""
SMI_SECONDS = 60
"""nvidia-smi that takes longer hangs, as it does when a GPU has fallen off the bus."""
FREE_BYTES, FREE_FILES = 1 << 30, 1000
"""In the run folder, which all nodes share, and in the temporary folder of each."""
CLOCK_SECONDS = 60.0
"""A clock may differ so much from that of the other nodes: secure connections and time stamps still work."""
PROBE_BYTES, PROBE_SECONDS = 1 << 22, 30.0
"""Written to the shared folder and read back, in so many seconds."""
_FIELDS = ("index", "memory.total", "ecc.errors.uncorrected.volatile.total")
_REASONS = ("hw_thermal_slowdown", "hw_power_brake_slowdown")
_SECTIONS = ("clocks_event_reasons", "clocks_throttle_reasons")
"""Where nvidia-smi has these reasons: since driver 535, and before."""


def check_nodes(options: argparse.Namespace, here: slurm.Allocation, folder: Path) -> dict[str, list[str]]:
    """Nodes of the job that are not fit, each with what is wrong."""
    if options.health == "none":
        return {}
    reports = _ask(here.nodes, folder / "health", LIMIT, here)
    bad = judge(here.nodes, reports)
    if options.health == "full" and len(bad) < len(here.nodes):
        from loopmem_pretrain.cluster import burn_in

        healthy = [node for node in here.nodes if node not in bad]
        bad |= burn_in.check_nodes(options, here, healthy, folder)
    return bad


def unfit_nodes(nodes: Sequence[str], folder: Path, here: slurm.Allocation) -> dict[str, list[str]]:
    """Nodes that do not answer or are not fit after the ranks have ended, each with what is wrong."""
    return judge(nodes, _ask(nodes, folder / "health-after", SIGN_OF_LIFE, here))


def blames_nodes(unfit: Mapping[str, Sequence[str]], nodes: Sequence[str]) -> bool:
    """Whether a job is to go on without the nodes that are not fit.

    Not where it is all of them: what they share, such as the disk, is at fault. A job's only node is where this runs,
    so it is silent because of the disk, and bad by its own word alone.
    """
    if len(nodes) == 1:
        return any(SILENT not in problems for problems in unfit.values())
    return 0 < len(unfit) < len(nodes)


def judge(nodes: Sequence[str], reports: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is wrong with each node that is not fit, by what all of them report."""
    clock = statistics.median(report["clock"] for report in reports.values()) if reports else 0.0
    bad: dict[str, list[str]] = {}
    for node in nodes:
        if node not in reports:
            bad[node] = [SILENT]
            continue
        problems = list(reports[node]["problems"])
        off = reports[node]["clock"] - clock
        if abs(off) > CLOCK_SECONDS:
            problems.append(f"its clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the others")
        if problems:
            bad[node] = problems
    return bad


def _ask(nodes: Sequence[str], folder: Path, limit: float, here: slurm.Allocation) -> dict[str, dict[str, Any]]:
    """Reports by node. One step asks all; where a node is dead SLURM may end it, so the rest is asked one by one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _wait([_start(nodes, folder, here)], limit)
    silent = [node for node in nodes if not (folder / f"{node}.json").exists()]
    if silent and len(nodes) > 1:
        _wait([_start([node], folder, here) for node in silent], limit)
    found = {node: records.read_json(folder / f"{node}.json") for node in nodes}
    return {node: report for node, report in found.items() if report}


def _start(nodes: Sequence[str], folder: Path, here: slurm.Allocation) -> "subprocess.Popen[bytes]":
    command = [*srun("health", nodes, tasks=1, cpus=1), "--overlap", "--unbuffered"]
    command += [sys.executable, "-m", "loopmem_pretrain.cluster.health", str(folder)]
    return subprocess.Popen(command, env=environment(here, nodes), stdin=subprocess.DEVNULL)


def _wait(steps: "Sequence[subprocess.Popen[bytes]]", limit: float) -> None:
    deadline = time.monotonic() + limit
    for step in steps:
        try:
            step.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            step.kill()
            step.wait()


# ---------------------------------------------------------------------------------------------------- on the node


def report_on_this_node(folder: Path) -> None:
    """Write NODE.json: `problems`, and `clock`, this clock's lead over that of the shared file system (seconds)."""
    problems = [*_gpu_problems(), *disk_problems(Path(os.environ.get("TMPDIR", "/tmp")))]
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    probe = folder / f".{node}.probe"
    content, started = os.urandom(PROBE_BYTES), time.monotonic()
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        clock = time.time() - probe.stat().st_mtime
        if probe.read_bytes() != content:
            problems.append(f"what it writes to {folder} is not what it reads back")
        probe.unlink()
        taken = time.monotonic() - started
        if taken > PROBE_SECONDS:
            problems.append(f"writing {PROBE_BYTES >> 20} MB to {folder} took {taken:.0f} s")
        value = {"problems": problems, "clock": clock, "write_seconds": round(taken, 3), "gpus": _topology()}
        temporary = folder / f".{node}.json"
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
        os.replace(temporary, folder / f"{node}.json")
    except OSError as error:
        print(f"{node} cannot write to {folder}: {error}", file=sys.stderr)
        sys.exit(EnvironmentFault.exit_code)


def _gpu_problems() -> list[str]:
    """By nvidia-smi, where it is there: GPUs missing, memory errors, forced slow clocks."""
    wanted = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if not wanted or not shutil.which("nvidia-smi"):
        return []
    for section in _SECTIONS:
        query = ",".join([*_FIELDS, *(f"{section}.{reason}" for reason in _REASONS)])
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return [f"nvidia-smi has not answered within {SMI_SECONDS} s"]
        if said.returncode == 0:
            break
    else:
        return [f"nvidia-smi fails: {(said.stderr or said.stdout).strip()}"]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    problems = []
    if len(rows) < wanted:
        problems.append(f"{len(rows)} GPUs of {wanted}")
    sizes = [int(row[1]) for row in rows if row[1].isdecimal()]
    if sizes and min(sizes) < 0.98 * max(sizes):
        problems.append(f"GPUs of different memory: {min(sizes)} to {max(sizes)} MiB")
    for index, _, ecc, *throttled in rows:
        if ecc.isdecimal() and int(ecc):
            problems.append(f"GPU {index}: {ecc} uncorrected memory errors")
        if "Active" in throttled:
            problems.append(f"GPU {index}: slowed down by heat or power")
    return problems


def _topology() -> str:
    """How the GPUs of this node are connected, for the record."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "topo", "-m"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False).stdout
    except subprocess.TimeoutExpired:  # told by _gpu_problems
        return ""


def disk_problems(folder: Path) -> list[str]:
    """What would soon be in the way of writing there."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return [f"cannot look at {folder}: {error.strerror}"]
    problems = []
    if disk.f_bavail * disk.f_frsize < FREE_BYTES:
        problems.append(f"{disk.f_bavail * disk.f_frsize / 1e9:.1f} GB are free in {folder}")
    if disk.f_files and disk.f_favail < FREE_FILES:
        problems.append(f"{disk.f_favail} more files fit into {folder}")
    return problems


if __name__ == "__main__":
    report_on_this_node(Path(sys.argv[1]))
