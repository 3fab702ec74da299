"""Runs that tests submit: with a stub for the training, or real."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"


class Run:
    """A run folder and the jobs that train in it. Unless told otherwise: 2 nodes of 2 ranks, and the stub."""

    def __init__(self, cluster: Cluster, folder: Path, script: Path = SCRIPT) -> None:
        self.cluster, self.script, self.folder = cluster, script, folder / "run"
        self.folder.mkdir(parents=True)
        self.stub = folder / "python"
        self.stub.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/stub.py "$@"\n')
        self.stub.chmod(0o755)
        self.job = ""

    def submit(self, *arguments: Any, options: tuple[str, ...] = (), **variables: Any) -> str:
        """The job's id; `options` are sbatch's, `variables` those of the script."""
        shape = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
        values = {
            "PYTHONPATH": ROOT,
            "CONFIG": "stub.yaml",
            "RUN_DIR": self.folder,
            "PYTHON": sys.executable,
            "RANK_PYTHON": self.stub,
        }
        output = f"--output={self.folder.parent}/job-%j.out"
        self.job = self.cluster.sbatch(
            output,
            f"--chdir={self.folder.parent}",
            *shape,
            *options,
            self.script,
            *arguments,
            **{**values, **variables},
        )
        return self.job

    def fault(self, **fault: Any) -> None:
        (self.folder / "fault.json").write_text(json.dumps({"rank": 1, "step": 15, **fault}))

    def trained(self) -> list[int]:
        """Every step that rank 0 trained, over all starts."""
        path = self.folder / "trained"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "slurm" / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verdicts(self) -> list[str]:
        return [record["verdict"] for record in self.starts() if record["event"] == "end"]

    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.parent.glob("*.out")))
