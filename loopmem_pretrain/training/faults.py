"""What a run does about steps that are not finite and about loss spikes.

DeepSpeed decides for each step, from the gradient norm that all ranks share, whether it is applied. Where the norm is
not finite, weights, moments and Adam's count of steps stay as they are, and `skipped_steps` counts. Here such steps are
reported, also those whose loss alone is not finite, and the run gives up where they do not end or a weight is hit.

Losses of single steps stay on the device until the next line of metrics.jsonl; all that is decided is decided there, on
every rank from the same numbers.
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain.checkpoint.choose import choose
from loopmem_pretrain.checkpoint.state import go_back
from loopmem_pretrain.errors import TrainingGaveUp
from loopmem_pretrain.metrics_file import FAULTS_NAME
from loopmem_pretrain.parallel.agreement import from_rank_zero
from loopmem_pretrain.training.loggers import JsonlLogger
from loopmem_pretrain.training.spikes import Spike, SpikeDetector

if TYPE_CHECKING:
    from loopmem_pretrain.config.training import FaultConfig
    from loopmem_pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)


class FaultWatch:
    """The steps of a run as they go; what it must remember over a restart is in `state`."""

    def __init__(self, config: "FaultConfig") -> None:
        self.config = config
        self.detector = SpikeDetector(config)
        self.bad_in_a_row = 0
        """Steps up to now whose loss or gradients were not finite."""
        self.spike: Spike | None = None
        """A spike that is to be rewound."""
        self.rewinds, self.rewound_to = 0, -1
        """Rewinds in a row to one checkpoint, or to older ones, and its step."""
        self._losses: list[Tensor] = []
        self._applied: list[bool] = []

    def record(self, loss: Tensor, applied: bool) -> None:
        """One step: the mean cross-entropy of all ranks, on the device, and whether the weights were changed."""
        self._losses.append(loss)
        self._applied.append(applied)

    def read(self) -> list[float]:
        """Losses of the steps since the last read. A collective, and the host waits for the device."""
        losses = torch.stack(self._losses)
        dist.broadcast(losses, src=0)  # decisions are made from them: no rank may hold another last bit
        self._losses = []
        return cast(list[float], losses.tolist())

    def check(self, trainer: "Trainer", losses: list[float]) -> None:
        """Judge the steps since the last check, whose `losses` were read.

        Raises:
            TrainingGaveUp: a weight is not finite, or `faults.max_skipped_steps` steps in a row were not.
        """
        first = trainer.position.step - len(losses) + 1
        bad, applied = [], self._applied
        self._applied, self.spike = [], None
        longest = 0
        for step, loss, is_applied in zip(range(first, first + len(losses)), losses, applied, strict=True):
            is_bad = not (is_applied and math.isfinite(loss))
            self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
            longest = max(longest, self.bad_in_a_row)
            if is_bad:
                bad.append(step)
            found = self.detector.update(step, loss)
            if found:
                self._report_spike(trainer, found)
        if bad:
            self._report(
                trainer,
                f"loss or gradients were not finite in {len(bad)} of the last {len(losses)} steps, first at step "
                f"{bad[0]}; {trainer.engine.skipped_steps} steps not applied so far",
                {"kind": "not_finite", "steps": bad, "skipped_steps": trainer.engine.skipped_steps},
            )
        if (self.bad_in_a_row or trainer.save_is_due) and not trainer.engine.weights_are_finite():
            self._give_up(trainer, "a weight is not finite")
        if longest >= self.config.max_skipped_steps:
            self._give_up(trainer, f"loss or gradients were not finite in {longest} steps in a row")

    def _give_up(self, trainer: "Trainer", problem: str) -> None:
        problem = f"{problem}, at step {trainer.position.step}"
        _write(trainer, {"kind": "gave_up", "reason": problem})
        saved = "the newest checkpoint is from before" if trainer.store.steps() else "no checkpoint was written yet"
        raise TrainingGaveUp(
            problem,
            f"{saved}: lower optimizer.lr or optimizer.gradient_clipping, lengthen schedule.warmup_steps, or look at "
            "the data of these steps, in a new run_dir",
        )

    def _report_spike(self, trainer: "Trainer", spike: Spike) -> None:
        if self.config.spike_action == "off":
            return
        batch, position = trainer.config.training.global_batch_size, trainer.position
        samples = [
            position.samples - batch * (position.step - step) for step in (spike.first_step - 1, spike.last_step)
        ]
        self._report(
            trainer,
            f"loss spike in steps {spike.first_step} to {spike.last_step}: {spike.loss:.4f} after {spike.usual:.4f}, "
            f"{spike.score:.1f} deviations above; samples {samples[0]} to {samples[1] - 1}",
            {"kind": "spike", **spike._asdict(), "samples": samples},
        )
        if self.config.spike_action == "rewind":
            self.spike = spike

    def rewind(self, trainer: "Trainer", spike: Spike) -> bool:
        """Go back to the last checkpoint before `spike` and leave out the samples since; False where there is none.

        That is one whose weights a usual loss was measured with: the loss of a step is that of the weights before it.

        Raises:
            TrainingGaveUp: `faults.max_rewinds` rewinds have not led past this spike.
            CheckpointError: all of them are damaged.
            EnvironmentFault: a save that was under way has failed again.
        """
        self.spike = None
        trainer.saver.finish()
        step = trainer.position.step
        choice = choose(trainer.store, trainer.rank, trainer.world_size, before=spike.first_step - 1)
        if choice is None:
            self._report(trainer, "no checkpoint from before the spike: training goes on", {"kind": "no_checkpoint"})
            return False
        target = choice.manifest["step"]
        self.rewinds = self.rewinds + 1 if target <= self.rewound_to else 1
        if self.rewinds > self.config.max_rewinds:
            from_rank_zero(lambda: trainer.store.go_back_to(target))
            self._give_up(trainer, f"a loss spike after {self.config.max_rewinds} rewinds to step {target}")
        self.rewound_to = target
        go_back(trainer, choice)
        skipped = trainer.position.skipped_ranges[-1]
        self._report(
            trainer,
            f"rewound from step {step} to {target}; samples {skipped[0]} to {skipped[1] - 1} are left out",
            {"kind": "rewind", "from_step": step, "samples": skipped},
        )
        return True

    def _report(self, trainer: "Trainer", message: str, record: dict[str, Any]) -> None:
        if trainer.rank == 0:
            log.warning("%s", message)
        _write(trainer, record)

    def state(self) -> dict[str, Any]:
        """For the manifest of a checkpoint."""
        return {"bad_in_a_row": self.bad_in_a_row, "losses": self.detector.state()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on where `state()` was called; with None, from a checkpoint that has none, anew."""
        self.bad_in_a_row = state["bad_in_a_row"] if state else 0
        self.detector = SpikeDetector(self.config)
        if state:
            self.detector.restore(state["losses"])


def _write(trainer: "Trainer", record: dict[str, Any]) -> None:
    """One line of faults.jsonl, on rank 0. What it says was also logged, so a full disk is only remarked on."""
    if trainer.rank != 0:
        return
    try:
        file = JsonlLogger(trainer.run_dir / FAULTS_NAME)
        file.log({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": trainer.position.step, **record})
        file.close()
    except OSError as error:
        log.error("cannot write %s: %s", trainer.run_dir / FAULTS_NAME, error.strerror)
