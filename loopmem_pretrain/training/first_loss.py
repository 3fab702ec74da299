"""The first micro-batch of a training step and its loss: that of the weights before the step, at no cost."""

from collections.abc import Callable, Iterator
from itertools import chain

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class FirstLoss:
    """Stands between an engine and its cross-entropy; on the ranks that compute it (the last pipeline stage)."""

    def __init__(self, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._cross_entropy = cross_entropy
        self._call: Callable[[Batch, Tensor], None] | None = None
        self._batch: Batch | None = None

    def on_next(self, call: Callable[[Batch, Tensor], None]) -> None:
        """Call `call` in the next training step, with its first micro-batch and the loss, detached, on the device."""
        self._call = call

    def step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of the training step that begins now; the first is read here where it is wanted."""
        if self._call is None:
            return batches
        self._batch = next(batches)
        return chain([self._batch], batches)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one micro-batch, of training or validation."""
        loss = self._cross_entropy(logits, labels)
        if self._call is not None and self._batch is not None:
            self._call(self._batch, loss.detach())
            self._call = self._batch = None
        return loss
