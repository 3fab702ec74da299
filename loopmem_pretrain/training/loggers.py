"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import json
import logging
import math
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

from loopmem_pretrain.checkpoint.state import WANDB_ID
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.metrics_file import METRICS_NAME, Record

log = logging.getLogger(__name__)

MOST_UNWRITTEN = 1 << 20
"""Bytes of lines that may wait for room on the disk."""


class Logger(Protocol):
    """Takes one dictionary a log interval, on rank 0."""

    def log(self, metrics: Record) -> None: ...

    def close(self) -> None: ...


class JsonlLogger:
    """One JSON object a line, appended: a torn last line is all a crash can leave.

    A disk that is full for a while, as during a save that fails, does not end a run: lines wait in memory and are
    written with a later one. When they get too many, and at the end, the OSError is raised.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.unwritten = b""
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.unwritten = b"\n"  # a crash tore the last line: the next one begins on its own

    def log(self, metrics: Record) -> None:
        waiting = len(self.unwritten) > 1
        self.unwritten += json.dumps(_finite(metrics), allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if len(self.unwritten) > MOST_UNWRITTEN:
                raise
            if not waiting:
                log.warning("cannot write %s: %s; its lines wait in memory", self.file.name, error.strerror)

    def close(self) -> None:
        try:
            self._write()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def _write(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


class TensorBoardLogger:
    """Scalars, per-layer ones as `expected_loops/layer_03`; steps trained again after a resume replace the old."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]

    def log(self, metrics: Record) -> None:
        for name, value in flatten(metrics).items():
            self.writer.add_scalar(name, value, metrics["step"])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class WandbLogger:
    """Weights & Biases; the run id is kept in the run folder, so that a resumed run continues the same curves."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb
        import yaml

        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        try:
            self.run = wandb.init(
                project=config.logging.wandb_project,
                name=run_dir.name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode=config.logging.wandb,  # type: ignore[arg-type]
                dir=str(run_dir),
                config=yaml.safe_load(dump_config(config)),
                # The address of a git remote may hold credentials; the commit is in environment.json.
                settings=wandb.Settings(silent=True, disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            raise EnvironmentFault(
                f"Weights & Biases does not start with logging.wandb={config.logging.wandb}: {error}",
                "run `wandb login` (or set WANDB_API_KEY), or use logging.wandb=offline or off",
            ) from error

    def log(self, metrics: Record) -> None:
        self.run.log(flatten(metrics), step=metrics["step"])

    def close(self) -> None:
        self.run.finish()


def make_loggers(config: RunConfig, run_dir: Path, first_step: int) -> list[Logger]:
    """The loggers the config asks for; `first_step` is the first that will be logged."""
    loggers: list[Logger] = [JsonlLogger(run_dir / METRICS_NAME)]
    if config.logging.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", first_step))
    if config.logging.wandb != "off":
        loggers.append(WandbLogger(config, run_dir))
    return loggers


def _finite(value: Any) -> Any:
    """JSON has no infinities: a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def flatten(metrics: Record) -> dict[str, float]:
    """Lists by layer and loop, and dictionaries, as scalars: {"lambdas": [[.5]]} -> {"lambdas/layer_00/loop_1": .5}."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, dict):
            flat.update({f"{name}/{key}": number for key, number in value.items()})
        elif isinstance(value, list):
            for layer, entry in enumerate(value):
                if isinstance(entry, list):
                    flat.update({f"{name}/layer_{layer:02d}/loop_{n}": x for n, x in enumerate(entry, start=1)})
                else:
                    flat[f"{name}/layer_{layer:02d}"] = entry
    return flat
