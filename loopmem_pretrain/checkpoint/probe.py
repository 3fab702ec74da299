"""The loss on one stored sample: what has been loaded must compute what was saved.

A wrong merge, a lost part or a weight of another layer shows here, before a single step is trained on it.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import ValidationDataset
from loopmem_pretrain.errors import CheckpointError, TrainingGaveUp

FILE = "probe.json"

# Relative. Other sizes sum in another order, in bf16 with three digits: tests/e2e/test_reshape.py holds losses after a
# change of sizes to 1e-5 in float32 and to 1e-2 in bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Engine(Protocol):
    """What measuring needs of a training engine."""

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: int) -> Tensor: ...


class Run(Protocol):
    """What measuring needs of a run."""

    config: RunConfig
    validation_dataset: ValidationDataset
    position: Position

    @property
    def engine(self) -> Engine: ...

    def on_rank_zero(self, action: Callable[[], object]) -> None: ...


def take_probe(run: Run) -> bytes:
    """The content of probe.json: the first held-out sample and its loss now. A collective, one forward pass.

    Raises:
        TrainingGaveUp: the loss is not finite.
    """
    tokens = [int(token) for token in run.validation_dataset[0]]
    loss = _loss(run, tokens)
    if not math.isfinite(loss):
        raise TrainingGaveUp(
            f"the weights of step {run.position.step} give the loss {loss} on the first validation sample: not saved",
            "the newest checkpoint is from before: lower optimizer.lr or optimizer.gradient_clipping, or lengthen "
            "schedule.warmup_steps, in a new run_dir",
        )
    return (json.dumps({"loss": loss, "tokens": tokens}) + "\n").encode()


def check_probe(run: Run, checkpoint: Path) -> str:
    """Compare the loss on the stored sample with the stored loss; returns both in words. A collective.

    Raises:
        CheckpointError: they differ by more than TOLERANCE, or the stored sample cannot be read.
    """
    found: list[Any] = [None]
    run.on_rank_zero(lambda: found.__setitem__(0, _read(checkpoint / FILE, run.config.model.vocab_size)))
    dist.broadcast_object_list(found, src=0)  # or a rank that does not see the file would skip the forward pass
    if found[0] is None:
        return "no stored sample to compare with"  # written by a version that stored none
    expected, tokens = found[0]
    loss = _loss(run, tokens)
    limit = TOLERANCE[run.config.training.precision]
    if not math.isclose(loss, expected, rel_tol=limit):
        raise CheckpointError(
            f"the model loaded from {checkpoint} has loss {loss:.6f} on the stored sample, {expected:.6f} when it was "
            f"saved (allowed: {limit:g} relative): what was loaded is not what was saved",
            "start with the sizes it was saved with (see `loopmem checkpoint show`), and report this as a bug",
        )
    return f"loss on the stored sample {loss:.6f}, when saved {expected:.6f}"


def _read(path: Path, vocab_size: int) -> tuple[float, list[int]] | None:
    """The stored loss and sample; None where there is no such file."""
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        loss, tokens = float(stored["loss"]), [int(token) for token in stored["tokens"]]
        if len(tokens) < 2 or not 0 <= min(tokens) <= max(tokens) < vocab_size or not math.isfinite(loss):
            raise ValueError("not a sample of this vocabulary and its loss")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no stored sample: {error}", "resume from another checkpoint") from None
    return loss, tokens


def _loss(run: Run, tokens: list[int]) -> float:
    """Every rank evaluates the same micro-batch, filled with the one sample: the mean does not depend on sizes."""
    batch = torch.tensor(tokens).expand(run.config.training.micro_batch_size, -1)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    return float(run.engine.evaluate(iter([(inputs, labels)]), 1))
