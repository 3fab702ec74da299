"""The loss on a stored sample: what has been loaded must compute what was saved.

A wrong merge, a lost part or a weight of another layer shows here, before a single step is trained on it.

The sample is the first micro-batch of the step after the save, whose loss is that of the saved weights and costs
nothing; where training waits for the save, and perhaps ends with it, it is the first held-out sample.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import ValidationDataset
from loopmem_pretrain.errors import CheckpointError, TrainingGaveUp
from loopmem_pretrain.parallel.agreement import from_rank_zero

FILE = "probe.json"

# Relative. Other sizes sum in another order, in bf16 with three digits: tests/e2e/test_reshape.py holds losses after a
# change of sizes to 1e-5 in float32 and to 1e-2 in bf16.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Engine(Protocol):
    """What measuring needs of a training engine."""

    @property
    def has_loss(self) -> bool:
        """Whether this rank is the one that is told losses by `on_next_loss`, and writes the sample."""

    def on_next_loss(self, call: Callable[[tuple[Tensor, Tensor], Tensor], None]) -> None: ...

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]], micro_batches: int) -> Tensor: ...


class Run(Protocol):
    """What measuring needs of a run."""

    config: RunConfig
    validation_dataset: ValidationDataset
    position: Position

    @property
    def engine(self) -> Engine: ...


class Sample:
    """A sample that comes from the training thread, for the thread that saves and waits for it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._known = threading.Event()
        self._taken: tuple[list[list[int]], Tensor] | None = None

    def take(self, batch: tuple[Tensor, Tensor], loss: Tensor) -> None:
        """Inputs and labels, [B, T] each, and their mean cross-entropy, which may still be under way on the device."""
        inputs, labels = batch
        self._taken = torch.cat([inputs, labels[:, -1:]], dim=1).tolist(), loss
        self._known.set()

    def no_more(self) -> None:
        """No sample will come where none has come so far."""
        self._known.set()

    def content(self) -> bytes | None:
        """The content of probe.json, as soon as it is known; None where no sample has come.

        Raises:
            TrainingGaveUp: the loss is not finite.
        """
        self._known.wait()
        if self._taken is None:
            return None
        tokens, loss = self._taken[0], float(self._taken[1])
        _require_finite(loss, self.step)
        return (json.dumps({"loss": loss, "tokens": tokens}) + "\n").encode()


def take_sample(run: Run, sample: Sample) -> None:
    """Give `sample` the first held-out sample and its loss now. A collective, one forward pass.

    Raises:
        TrainingGaveUp: the loss is not finite.
    """
    tokens = [[int(token) for token in run.validation_dataset[0]]]
    loss = _loss(run, tokens)
    _require_finite(loss, sample.step)
    batch = torch.tensor(tokens)
    sample.take((batch[:, :-1], batch[:, 1:]), torch.tensor(loss, dtype=torch.float64))


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingGaveUp(
            f"the weights of step {step} give the loss {loss}: not saved",
            "the newest checkpoint is from before: lower optimizer.lr or optimizer.gradient_clipping, or lengthen "
            "schedule.warmup_steps, in a new run_dir",
        )


def check_probe(run: Run, checkpoint: Path) -> str:
    """Compare the loss on the stored sample with the stored loss; returns both in words. A collective.

    Raises:
        CheckpointError: they differ by more than TOLERANCE, or the stored sample cannot be read.
    """
    # Of rank 0: a rank that does not see the file yet would skip the forward pass.
    stored = from_rank_zero(lambda: _read(checkpoint / FILE, run.config.model.vocab_size))
    if stored is None:
        return "no stored sample to compare with"  # written by a version that stored none
    expected, tokens = stored
    loss = _loss(run, tokens)
    limit = TOLERANCE[run.config.training.precision]
    if not math.isclose(loss, expected, rel_tol=limit):
        raise CheckpointError(
            f"the model loaded from {checkpoint} has loss {loss:.6f} on the stored sample, {expected:.6f} when it was "
            f"saved (allowed: {limit:g} relative): what was loaded is not what was saved",
            "start with the sizes it was saved with (see `loopmem checkpoint show`), and report this as a bug",
        )
    return f"loss on the stored sample {loss:.6f}, when saved {expected:.6f}"


def _read(path: Path, vocab_size: int) -> tuple[float, list[list[int]]] | None:
    """The stored loss and sample; None where there is no such file."""
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        loss, tokens = float(stored["loss"]), [[int(token) for token in row] for row in stored["tokens"]]
        lengths, flat = {len(row) for row in tokens}, [token for row in tokens for token in row]
        if len(lengths) != 1 or min(lengths) < 2 or not math.isfinite(loss):
            raise ValueError("not samples of one length and their loss")
        if not 0 <= min(flat) <= max(flat) < vocab_size:
            raise ValueError("not samples of this vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no stored sample: {error}", "resume from another checkpoint") from None
    return loss, tokens


def _loss(run: Run, tokens: list[list[int]]) -> float:
    """Every rank evaluates the same micro-batches, each sample equally often: the mean does not depend on sizes."""
    size = run.config.training.micro_batch_size
    count = math.lcm(size, len(tokens))
    samples = torch.tensor(tokens).repeat(count // len(tokens), 1)
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in torch.split(samples, size)]
    return float(run.engine.evaluate(iter(batches), len(batches)))
