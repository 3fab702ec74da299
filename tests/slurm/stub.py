"""Stands in for the training of the ranks, so that what happens around it is tried in seconds. A test file only.

It is the interpreter of the ranks: the task's own program (cluster/rank.py) runs as it is, but `loopmem train` in it
keeps the contract of a run's folder without torch. Ranks go step by step together, as collectives make them.
RUN/fault.json asks for a fault: {"kind": "kill" | "exit" | "hang", "code": 3, "rank": 1, "step": 15, "starts": 1}
or for one of a node in the burn-in, which is real: {"node": "node2", "burn_in": "slow" | "exit"}
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

SECONDS = 0.05
"""Of a step."""


def put(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


class Stub:
    """One rank."""

    def __init__(self, arguments: list[str]) -> None:
        from loopmem_pretrain.cluster.records import newest_checkpoint, read_json

        values = dict(word.split("=", 1) for word in arguments if "=" in word)
        self.read = read_json
        self.run, self.steps = Path(values["run_dir"]), int(values.get("steps", 40))
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.start = os.environ["LOOPMEM_START"]
        self.step = max(0, newest_checkpoint(self.run))
        self.fault = self.read(self.run / "fault.json")
        if len(list((self.run / "logs").iterdir())) > self.fault.get("starts", 1):
            self.fault = {}
        self.asked = ""
        signal.signal(signal.SIGTERM, self.remember)

    def remember(self, number, frame) -> None:
        self.asked = "stopped by SIGTERM"

    def train(self) -> int:
        device = os.environ["LOCAL_RANK"]
        print(f"rank {self.rank} at step {self.step} on {os.environ['SLURMD_NODENAME']} device {device}", flush=True)
        return self.lead() if self.rank == 0 else self.follow()

    def lead(self) -> int:
        from loopmem_pretrain import control

        self.status("running", "training")
        while self.step < self.steps:
            self.step += 1
            put(self.run / "heartbeat.json", {"step": self.step, "start": self.start})
            time.sleep(SECONDS)
            if self.suffers():
                return self.fault["code"]
            if not self.all_are_there():
                print("loopmem: error: lost contact with another rank", file=sys.stderr, flush=True)
                return 6
            with (self.run / "trained").open("a") as file:
                file.write(f"{self.step}\n")
            reason = control.stop_request(self.run) or self.asked
            if self.step % 10 == 0 or reason or self.step == self.steps:
                control.refuse_if_replaced(self.run)
                name = f"step_{self.step:08d}"
                (self.run / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
                (self.run / "checkpoints" / "latest").write_text(f"{name}\n")
            if reason:
                return self.status("interrupted", reason)
        return self.status("done", "all steps trained")

    def follow(self) -> int:
        while True:
            beat, status = self.read(self.run / "heartbeat.json"), self.read(self.run / "status.json")
            if status.get("start") == self.start and status["status"] != "running":
                return 0
            if beat.get("start") == self.start and beat["step"] > self.step:
                self.step = beat["step"]
                if self.suffers():
                    return self.fault["code"]
                put(self.run / f"at-{self.rank}", [self.start, self.step])
            time.sleep(0.01)

    def suffers(self) -> bool:
        """Whether this rank is to end with an error now; it is killed or hangs here, where that was wanted."""
        if self.fault.get("rank") != self.rank or self.fault["step"] != self.step:
            return False
        if self.fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault["kind"] == "hang":
            time.sleep(1000)
        print("loopmem: error: as the test wanted", file=sys.stderr, flush=True)
        return True

    def all_are_there(self) -> bool:
        """Wait for the others, like a collective; False when this rank is to end and they do not come.

        Looks at the fence meanwhile, as the trainer's watchdog does.
        """
        from loopmem_pretrain import control

        patience = 2.0
        while not all(self.came(rank) for rank in range(1, self.world_size)):
            control.refuse_if_replaced(self.run)
            time.sleep(0.01)
            patience -= 0.01 * bool(self.asked)
            if patience < 0:
                return False
        return True

    def came(self, rank: int) -> bool:
        path = self.run / f"at-{rank}"
        return path.exists() and json.loads(path.read_text()) == [self.start, self.step]

    def status(self, status: str, reason: str) -> int:
        put(self.run / "status.json", {"status": status, "reason": reason, "step": self.step, "start": self.start})
        return 0


def spoil_burn_in(fault: dict) -> None:
    """Make this node slow, or end here, where that was wanted."""
    import torch

    if fault.get("node") != os.environ["SLURMD_NODENAME"]:
        return
    if fault["burn_in"] == "exit":
        sys.exit("CUDA error: uncorrectable ECC error encountered")
    product = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda left, right: [product(left, right) for _ in range(4)].pop()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if sys.argv[1:3] == ["-m", "loopmem_pretrain.cluster.rank"]:
        import loopmem_pretrain.cli

        loopmem_pretrain.cli.main = lambda arguments=None: Stub(list(sys.argv[1:])).train()
    elif sys.argv[1:3] == ["-m", "loopmem_pretrain.cluster.burn_in"]:
        from loopmem_pretrain.cluster.records import read_json

        spoil_burn_in(read_json(Path(sys.argv[3]).parents[2] / "fault.json"))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
