"""Stands in for the training of the ranks, so that what happens around it is tried in seconds. A test file only.

It is the interpreter of the ranks (`PYTHON=.../stub.py`): the task's own program runs as it is, but `loopmem train` in
it keeps the contract of a run's folder without torch. RUN/fault.json asks for a fault:
{"kind": "kill" | "hang" | "freeze" | "exit", "code": 3, "rank": 1, "step": 10, "starts": 1}
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 0.05
"""Of a step."""


def put(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(value if isinstance(value, str) else json.dumps(value))
    os.replace(temporary, path)


def save(run: Path, step: int) -> None:
    from loopmem_pretrain import control

    control.refuse_if_replaced(run)
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    put(run / "checkpoints" / "latest", f"step_{step:08d}\n")


def end(run: Path, status: str, reason: str, step: int) -> int:
    put(run / "status.json", {"status": status, "reason": reason, "step": step, "time": time.time()})
    return 0


def train(arguments: list[str]) -> int:
    from loopmem_pretrain import control
    from loopmem_pretrain.cluster.records import newest_checkpoint

    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    run, steps, rank = Path(values["run_dir"]), int(values.get("steps", 40)), int(os.environ["RANK"])
    fault = json.loads((run / "fault.json").read_text()) if (run / "fault.json").exists() else {}
    starts = len(list((run / "logs").iterdir()))
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append("SIGTERM"))
    step = max(0, newest_checkpoint(run))
    print(f"start at {step}: {os.environ['SLURMD_NODENAME']} {os.environ['LOCAL_RANK']}", flush=True)
    if rank == 0:
        end(run, "running", "training", step)
    while step < steps:
        step += 1
        time.sleep(SECONDS)
        if fault and fault["rank"] == rank and step == fault["step"] and starts <= fault.get("starts", 1):
            if fault["kind"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault["kind"] == "exit":
                print("loopmem: error: as the test wanted", file=sys.stderr, flush=True)
                return int(fault["code"])
            time.sleep(1000)
        if rank:  # the others go along with rank 0
            status = json.loads((run / "status.json").read_text())
            if status["status"] != "running":
                return 0
            continue
        with (run / "trained").open("a") as file:
            file.write(f"{step}\n")
        put(run / "heartbeat.json", {"step": step})
        reason = control.stop_request(run) or (f"stopped by {asked[0]}" if asked else "")
        if step % 10 == 0 or reason or step == steps:
            save(run, step)
        if reason:
            return end(run, "interrupted", reason, step)
    while rank and json.loads((run / "status.json").read_text())["status"] == "running":
        time.sleep(SECONDS)
    return end(run, "done", "all steps trained", step) if rank == 0 else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:3] == ["-m", "loopmem_pretrain.cluster.rank"]:
        import loopmem_pretrain.cli

        loopmem_pretrain.cli.main = lambda arguments=None: train(list(arguments or []))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
