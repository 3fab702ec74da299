"""The loss on one stored sample: what has been loaded must compute what was saved.

A wrong merge, a lost part or a weight of another layer shows here, before a single step is trained on it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import ValidationDataset
from loopmem_pretrain.errors import CheckpointError

FILE = "probe.json"

# Relative. Other sizes sum in another order: in float32 that was seen to change a loss by less than 1e-6, in bf16 by
# less than 3e-3. What the probe is there to find changes it by far more.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Engine(Protocol):
    """What measuring needs of a training engine."""

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: int) -> Tensor: ...


class Run(Protocol):
    """What measuring needs of a run."""

    config: RunConfig
    validation_dataset: ValidationDataset

    @property
    def engine(self) -> Engine: ...


def take_probe(run: Run) -> bytes:
    """The content of probe.json: the first held-out sample and its loss now. A collective, one forward pass."""
    tokens = [int(token) for token in run.validation_dataset[0]]
    return (json.dumps({"loss": _loss(run, tokens), "tokens": tokens}) + "\n").encode()


def check_probe(run: Run, checkpoint: Path) -> str:
    """Compare the loss on the stored sample with the stored loss; returns both in words. A collective.

    Raises:
        CheckpointError: they differ by more than TOLERANCE, or the stored sample cannot be read.
    """
    path = checkpoint / FILE
    if not path.exists():
        return "no stored sample to compare with"  # written by a version that stored none
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        expected, tokens = float(stored["loss"]), [int(token) for token in stored["tokens"]]
        if len(tokens) < 2 or not 0 <= min(tokens) <= max(tokens) < run.config.model.vocab_size:
            raise ValueError("not a sample of this vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no stored sample: {error}", "resume from another checkpoint") from None
    loss = _loss(run, tokens)
    limit = TOLERANCE[run.config.training.precision]
    if not math.isclose(loss, expected, rel_tol=limit):
        raise CheckpointError(
            f"the model loaded from {checkpoint} has loss {loss:.6f} on the stored sample, {expected:.6f} when it was "
            f"saved (allowed: {limit:g} relative): what was loaded is not what was saved",
            "start with the sizes it was saved with (see `loopmem checkpoint show`), and report this as a bug",
        )
    return f"loss on the stored sample {loss:.6f}, when saved {expected:.6f}"


def _loss(run: Run, tokens: list[int]) -> float:
    """Every rank evaluates the same micro-batch, filled with the one sample: the mean does not depend on sizes."""
    batch = torch.tensor(tokens).expand(run.config.training.micro_batch_size, -1)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    return float(run.engine.evaluate(iter([(inputs, labels)]), 1))
