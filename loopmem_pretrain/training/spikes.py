"""Finding loss spikes: losses that stay far above those before them.

A loss is high when it lies more than `faults.spike_score` robust standard deviations above the median of the last
`faults.spike_window_steps` losses that were not high. Median and median absolute deviation hardly move for a few wild
values, so that a spike does not widen the scale it is measured with. `faults.spike_patience_steps` high losses in a row
are a spike; fewer are bad samples.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from loopmem_pretrain.config.training import FaultConfig

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.005
"""Share of the median that the deviation counts at least: no alarm over the last digits of a loss that is flat."""
LEAST_LOSSES = 16
"""Nor is one raised over a window of fewer losses than this, or than half its length."""


class Spike(NamedTuple):
    """High losses in a row, found at the last of them."""

    first_step: int
    last_step: int
    loss: float
    """Of the last step."""
    usual: float
    """Median of the window."""
    score: float
    """Robust standard deviations of the last loss above the median."""


class SpikeDetector:
    """Takes the losses of a run in order; all of its state is in `state` and can be saved."""

    def __init__(self, config: FaultConfig) -> None:
        self.config = config
        self.window: list[float] = []
        self.high: list[float] = []
        """The high losses in a row up to now."""
        self.first_high = 0
        """Step of the first of them."""

    def update(self, step: int, loss: float) -> Spike | None:
        """The spike that the loss of `step` completes; the same spike is reported once.

        A loss that is not finite says nothing here: it neither continues nor ends a spike.
        """
        if not math.isfinite(loss):
            return None
        size = self.config.spike_window_steps
        usual, score = self._score(loss)
        if score <= self.config.spike_score:
            self.window = [*self.window, loss][-size:]
            self.high = []
            return None
        if not self.high:
            self.first_high = step
        self.high.append(loss)
        patience, steps = self.config.spike_patience_steps, len(self.high)
        if steps >= max(patience, size):  # this does not pass: it is the level now
            self.window, self.high = self.high[-size:], []
        return Spike(self.first_high, step, loss, usual, score) if steps == patience else None

    def _score(self, loss: float) -> tuple[float, float]:
        """Median of the window, and how far above it `loss` lies; -inf while the window is too short to say."""
        if len(self.window) < max(LEAST_LOSSES, self.config.spike_window_steps // 2):
            return loss, -math.inf
        usual = median(self.window)
        deviation = MAD_TO_DEVIATION * median(abs(each - usual) for each in self.window)
        return usual, (loss - usual) / max(deviation, LEAST_DEVIATION * abs(usual), 1e-9)

    def state(self) -> dict[str, Any]:
        """For the manifest of a checkpoint; JSON keeps every bit of a number."""
        return {"window": list(self.window), "high": list(self.high), "first_high": self.first_high}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state()` was called; a window that has become shorter keeps its newest losses."""
        self.window = list(state["window"])[-self.config.spike_window_steps :]
        self.high, self.first_high = list(state["high"])[-self.config.spike_window_steps :], state["first_high"]
