"""A task of the job's step: becomes a rank, or one of the launchers that start a node's ranks.

    python -m loopmem_pretrain.cluster.rank train --config FILE [key=value ...]

What it prints goes to a file of its own, RUN/logs/START/rank-00003.log, and where it ends with an error its exit code
to rank-00003.exit: the exit code of srun is that of the last rank that was killed.
"""

import base64
import faulthandler
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopmem_pretrain.errors import EXIT_BUG, EnvironmentFault

LOG_DIR, LAUNCHER = "LOOPMEM_LOG_DIR", "LOOPMEM_LAUNCHER"
"""Variables that the batch script sets for every task."""
RANKS_PER_NODE = "LOOPMEM_RANKS_PER_NODE"
MODULE = "loopmem_pretrain.cluster.rank"


def main(arguments: Sequence[str]) -> int:
    """Be what the environment says; returns the exit code of a rank."""
    try:
        if os.environ[LAUNCHER] != "srun" and "RANK" not in os.environ:
            command = node_command(os.environ, arguments)
            os.execv(command[0], command)
        os.environ.update(place(os.environ))
    except EnvironmentFault as fault:
        print(f"loopmem: error: {fault}", file=sys.stderr)
        return fault.exit_code
    rank = int(os.environ["RANK"])
    _log_to(log_file(Path(os.environ[LOG_DIR]), rank))
    faulthandler.register(signal.SIGQUIT)  # stacks of all threads, when the batch script asks for them
    code = EXIT_BUG
    try:
        sys.argv[0] = "loopmem"
        runpy.run_module("loopmem_pretrain", run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if code:
            record = {"rank": rank, "code": code, "time": time.time()}
            exit_file(Path(os.environ[LOG_DIR]), rank).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return code


def log_file(folder: Path, rank: int) -> Path:
    """What the rank prints, in the folder of its start."""
    return folder / f"rank-{rank:05d}.log"


def exit_file(folder: Path, rank: int) -> Path:
    """Rank, exit code and time (seconds since the epoch), as JSON; there where the rank has ended with an error."""
    return folder / f"rank-{rank:05d}.exit"


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK and WORLD_SIZE: what a launcher has set, or what srun says; LOCAL_RANK is the GPU to take.

    With --gpu-bind a task may see its own GPU alone, whose number is then 0; else it sees those of all tasks of the
    node.

    Raises:
        EnvironmentFault: several GPUs are visible, but fewer than there are ranks on this node; or ranks are dealt
            out to nodes in turn.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "RANK" in environment:
        values = {name: environment[name] for name in names}
    else:
        slurm = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        values = {name: environment[theirs] for name, theirs in zip(names, slurm, strict=True)}
        first = int(environment["SLURM_NODEID"]) * int(environment[RANKS_PER_NODE])
        if int(values["RANK"]) != first + int(values["LOCAL_RANK"]):
            raise EnvironmentFault(
                f"rank {values['RANK']} is task {values['LOCAL_RANK']} of node {environment['SLURM_NODEID']}: those of "
                "a node do not follow each other, so tensor-parallel groups would reach over nodes",
                "leave --distribution out of SRUN_OPTIONS, or make it block",
            )
    visible, ranks = _visible_devices(environment), int(environment[RANKS_PER_NODE])
    if len(visible) == 1:
        values["LOCAL_RANK"] = "0"
    elif visible and len(visible) < ranks:
        raise EnvironmentFault(
            f"rank {values['RANK']} sees GPUs {','.join(visible)} and there are {ranks} ranks on this node",
            "ask for --gpus-per-node=N and --ntasks-per-node=N",
        )
    return values


def _visible_devices(environment: Mapping[str, str]) -> list[str]:
    return [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]


def node_command(environment: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """What starts this node's ranks, each of which is this module again: torchrun or DeepSpeed's launcher.

    Raises:
        EnvironmentFault: fewer GPUs are visible than DeepSpeed's launcher is to start ranks.
    """
    node, nodes, ranks = environment["SLURM_NODEID"], int(environment["SLURM_NNODES"]), int(environment[RANKS_PER_NODE])
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if environment[LAUNCHER] == "torchrun":
        launcher = ["torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}", f"--node-rank={node}"]
        launcher += [f"--master-addr={host}", f"--master-port={port}", "-m"]
    else:
        # The launcher makes its own node's list the ranks' CUDA_VISIBLE_DEVICES: on a node that is shared it must be
        # what SLURM has granted. Of the other nodes' lists it takes the lengths alone.
        visible = _visible_devices(environment)
        if visible and len(visible) < ranks:
            raise EnvironmentFault(
                f"node {node} is to start {ranks} ranks and sees GPUs {','.join(visible)}",
                "ask for --gpus-per-node=N and --ntasks-per-node=N",
            )
        devices: dict[str, Sequence[int | str]] = {str(number): range(ranks) for number in range(nodes)}
        devices[node] = visible[:ranks] or devices[node]
        world = json.dumps({number: [*each] for number, each in devices.items()})
        launcher = ["deepspeed.launcher.launch", f"--node_rank={node}", f"--master_addr={host}"]
        launcher += [f"--master_port={port}", f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}"]
        launcher += ["--module"]
    return [sys.executable, "-m", *launcher, MODULE, *arguments]


def _log_to(path: Path) -> None:
    """Everything this process prints from now on, C++ libraries included."""
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(stream, number)
    os.close(stream)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
