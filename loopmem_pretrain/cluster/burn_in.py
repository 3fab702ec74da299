"""How fast every rank multiplies matrices, and all of them add up a vector: slow GPUs are found before they train.

    python -m loopmem_pretrain.cluster.burn_in FOLDER CONFIG [key=value ...]      what every rank runs

It writes FOLDER/rank-00003.json; the rest is what the run is started with.

A collective is as slow as its slowest member, so one GPU that is hot or broken slows the whole run down.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopmem_pretrain.cluster import rank, records, slurm, step
from loopmem_pretrain.errors import EnvironmentFault, LoopMemError

LIMIT = 600.0
"""Seconds for all of it: imports, the first kernels, joining."""
REST = 60
"""Seconds that the other ranks have when one has ended: they wait for it in vain where it has failed."""
STEP = "burn-in"
"""Name of the job step."""
SLOW = 0.8
"""A rank is slow below this share of the median."""
SECONDS = 5.0
"""Of matrix products: a GPU gets warm and may throttle."""
BYTES = 1 << 28
"""Of the vector that is added up, on GPUs."""


def check_nodes(
    options: argparse.Namespace, here: slurm.Allocation, nodes: Sequence[str], folder: Path
) -> dict[str, list[str]]:
    """Nodes with a rank that is slow or does not come to an end, each with what is wrong.

    Raises:
        EnvironmentFault: every rank has multiplied matrices, and not every one has added up the vector.
    """
    reports = folder / "burn-in"
    reports.mkdir(exist_ok=True)
    command = [*step.srun(STEP, nodes, here.tasks_per_node, here.cpus_per_task), f"--wait={REST}"]
    command += [*shlex.split(options.srun), *shlex.split(options.wrap), options.python]
    ranks = subprocess.Popen(
        [*command, "-m", "loopmem_pretrain.cluster.burn_in", str(reports), options.config, *options.arguments],
        env=step.environment(here, nodes),
        stdin=subprocess.DEVNULL,
    )
    try:
        ranks.wait(LIMIT)
    except subprocess.TimeoutExpired:
        step.end(ranks, here.job, STEP)
    found = [records.read_json(path) for path in sorted(reports.glob("rank-*.json"))]
    bandwidths = [report["gb_per_second"] for report in found if report.get("gb_per_second")]
    if bandwidths:
        print(f"all-reduce over {len(bandwidths)} ranks: {min(bandwidths):.1f} GB/s", flush=True)
    else:
        print("the all-reduce has not come to an end on any rank", flush=True)
    bad = judge(nodes, here.tasks_per_node, found)
    if not bad and len(bandwidths) < len(found):
        raise EnvironmentFault(
            f"every rank multiplies matrices, but only {len(bandwidths)} of {len(found)} have added up a vector: the "
            "network between them does not work",
            "see what the ranks say above, and NCCL with NCCL_DEBUG=INFO: NCCL_SOCKET_IFNAME and NCCL_IB_HCA must name "
            "interfaces that all nodes have, and no firewall may stand between them",
        )
    return bad


def judge(nodes: Sequence[str], ranks: int, reports: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is wrong with each node that is not fit, by the reports of all ranks."""
    speeds = [report["tflops"] for report in reports if "tflops" in report]
    usual = statistics.median(speeds) if speeds else 0.0
    bad: dict[str, list[str]] = {}
    for node in nodes:
        here = [report for report in reports if report["node"] == node]
        own = [report["tflops"] for report in here if "tflops" in report]
        slow = [speed for speed in own if speed < SLOW * usual]
        problems = [*dict.fromkeys(report["problem"] for report in here if "problem" in report)]
        if problems:
            bad[node] = problems
        elif len(own) < ranks:
            bad[node] = [f"{ranks - len(own)} of {ranks} ranks did not finish a matrix product"]
        elif slow:
            bad[node] = [f"a matrix product runs at {min(slow):.3g} TFLOP/s, {usual:.3g} is usual here"]
    return bad


def missing_gpus(config: str, arguments: Sequence[str]) -> str:
    """Why this rank cannot use the GPUs that its job was granted; empty where it can, or is not to."""
    import torch

    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig
    from loopmem_pretrain.training.hardware import gpus_given

    given = gpus_given(os.environ)
    if torch.cuda.is_available() or not given:
        return ""
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    try:
        device = load_config(RunConfig, config, overrides).training.device
    except LoopMemError as error:
        print(f"whether the run is to use GPUs is not known: {error}", file=sys.stderr)
        return ""  # not the node's fault, and the ranks will end with it
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
    else:
        reason = "no device"
    return "" if device == "cpu" else f"GPUs were granted ({given}), and torch finds none: {reason}"


def measure(folder: Path, config: str, arguments: Sequence[str]) -> None:
    """One rank: the matrix product first, which needs nobody else, and its result written before the all-reduce."""
    import torch
    import torch.distributed as dist

    problem = ""
    try:
        os.environ.update(rank.place(os.environ))
    except EnvironmentFault as fault:
        problem = fault.problem
    path = folder / f"rank-{int(os.environ['SLURM_PROCID']):05d}.json"
    problem = problem or missing_gpus(config, arguments)
    if problem:
        report: records.Record = {"node": os.environ["SLURMD_NODENAME"], "problem": problem}
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")
        sys.exit(problem)
    local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    size, dtype, limit = (8192, torch.bfloat16, SECONDS) if cuda else (512, torch.float32, 0.5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    clock = time.perf_counter if cuda else time.process_time  # a CPU may be shared with other work
    products, started = 0, clock()
    while clock() - started < limit:
        left @ right
        products += 1
        if cuda:
            torch.cuda.synchronize(device)
    report = {
        "node": os.environ["SLURMD_NODENAME"],
        "tflops": products * 2 * size**3 / (clock() - started) / 1e12,
    }
    path.write_text(json.dumps(report) + "\n", encoding="utf-8")
    dist.init_process_group("nccl" if cuda else "gloo")
    vector = torch.ones(BYTES // 4 if cuda else 1 << 18, device=device)
    dist.all_reduce(vector)
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    dist.all_reduce(vector)
    if cuda:
        torch.cuda.synchronize(device)
    report["gb_per_second"] = vector.nbytes / (time.perf_counter() - started) / 1e9
    path.write_text(json.dumps(report) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
