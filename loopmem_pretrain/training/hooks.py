"""What happens beside the training step: validation, logs, alarms, checkpoints, stopping.

The order in `make_hooks` is the order after each step: validate, score tasks, log (with the results of both), compare
replicas, save. So what the alarms or the comparison refuse is never saved.
"""

import json
import logging
import math
import time
from typing import TYPE_CHECKING, Protocol

from loopmem_pretrain.alarms import alarms
from loopmem_pretrain.data.sampler import validation_batches, validation_samples
from loopmem_pretrain.metrics_file import STARTS_NAME, Record
from loopmem_pretrain.model.flops import training_flops_per_token
from loopmem_pretrain.parallel.agreement import from_rank_zero
from loopmem_pretrain.parallel.checks import replicas_differ
from loopmem_pretrain.progress import ProgressBar
from loopmem_pretrain.training import run_folder
from loopmem_pretrain.training.hardware import peak_flops
from loopmem_pretrain.training.loggers import JsonlLogger, Logger, make_loggers
from loopmem_pretrain.training.optim import beta1, learning_rate, ponder_weight

if TYPE_CHECKING:
    from loopmem_pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)

MUCH = 0.02
"""Share of the time that saving may take before it is remarked on."""
LONG_ENOUGH = 300.0
"""Seconds before such a share means something."""


class Hook(Protocol):
    """Something that happens now and then."""

    def after_step(self, trainer: "Trainer") -> None:
        """Called on every rank after each optimizer step, in the order of the list of hooks."""

    def close(self, trainer: "Trainer") -> None:
        """Called once at the end, also after an error."""


def make_hooks(trainer: "Trainer") -> list[Hook]:
    """Those of this run, in the order in which they are called."""
    tasks: list[Hook] = []
    if trainer.config.evaluation.tasks:
        from loopmem_pretrain.training.task_hook import TaskHook

        tasks.append(TaskHook(trainer))
    others: list[Hook] = [ValidateHook(trainer), *tasks, LogHook(trainer), ReplicaHook(), CheckpointHook()]
    return [StartsHook(trainer), *others]  # made last: what the others refuse is no start; closed last: it has the end


class StartsHook:
    """Two lines of starts.jsonl: with what a start trains from where, and when, where and how it ended.

    The first stands alone where a start is killed, or is ended by the watchdog.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.file: JsonlLogger | None = None
        from_rank_zero(lambda: self._begin(trainer))

    def _begin(self, trainer: "Trainer") -> None:
        environment = json.loads((trainer.run_dir / run_folder.ENVIRONMENT).read_text(encoding="utf-8"))
        self.file = JsonlLogger(trainer.run_dir / STARTS_NAME)
        self.file.log({"event": "begin", "step": trainer.position.step, **environment})

    def after_step(self, trainer: "Trainer") -> None: ...

    def close(self, trainer: "Trainer") -> None:
        if self.file is not None:
            status = run_folder.read_status(trainer.run_dir) or {}
            told = {"time": time.strftime(run_folder.TIME), "status": status.get("status")}
            self.file.log({"event": "end", "step": trainer.position.step, **told})
            self.file.close()


class ValidateHook:
    """Every `validation.interval_steps` and at the end: the loss on the same held-out samples."""

    def __init__(self, trainer: "Trainer") -> None:
        training = trainer.config.training
        sizes = {"micro_batch_size": training.micro_batch_size, "dp_size": trainer.topology.data_size}
        self.samples = validation_samples(trainer.validation_dataset, **sizes)
        self.sizes = sizes
        asked = trainer.config.validation.num_samples
        if self.samples != asked and trainer.rank == 0:
            log.info("validation reads %d samples, not %d: whole micro-batches on every rank", self.samples, asked)

    def after_step(self, trainer: "Trainer") -> None:
        if trainer.position.step % trainer.config.validation.interval_steps and not trainer.ending:
            return
        with trainer.pause("validation"):
            batches = validation_batches(
                trainer.validation_dataset,
                dp_rank=trainer.topology.data_rank,
                pin_memory=trainer.device.type == "cuda",
                **self.sizes,
            )
            count = self.samples // (self.sizes["micro_batch_size"] * self.sizes["dp_size"])
            loss = float(trainer.engine.evaluate(iter(batches), count))
        trainer.pending["validation_loss"] = loss
        trainer.validated = (trainer.position.step, loss)

    def close(self, trainer: "Trainer") -> None: ...


class LogHook:
    """Every `logging.interval_steps` and at the end: read the device, write metrics, raise alarms, agree to stop."""

    def __init__(self, trainer: "Trainer") -> None:
        config = trainer.config
        self.flops_per_token = training_flops_per_token(
            config.model, config.data.seq_length, config.training.micro_batch_size
        )
        self.peak, self.peak_source = peak_flops(config, trainer.device)
        self.loggers: list[Logger] = []
        first_step = trainer.position.step + 1
        from_rank_zero(lambda: self.loggers.extend(make_loggers(config, trainer.run_dir, first_step)))
        self.bar = (
            ProgressBar("train", config.training.train_steps, trainer.position.step) if trainer.rank == 0 else None
        )
        self.alarms = Alarms(trainer)
        self._start_interval(trainer)
        if trainer.rank == 0:
            log.info("MFU against %.3g TFLOP/s a device (%s)", self.peak / 1e12, self.peak_source)

    def after_step(self, trainer: "Trainer") -> None:
        step, config = trainer.position.step, trainer.config
        # Also before every checkpoint: weights that are not finite must end the run before they are saved.
        if step % config.logging.interval_steps and not trainer.save_is_due and not trainer.pending:
            return
        losses = trainer.faults.read()
        metrics = self._measure(trainer, losses)
        for logger in self.loggers:
            logger.log(metrics)
        self.alarms.check(metrics)
        if self.bar:
            self.bar.update(trainer.position.step, _headline(metrics), always="validation_loss" in metrics)
        self._start_interval(trainer)
        trainer.agree()
        trainer.faults.check(trainer, losses)

    def close(self, trainer: "Trainer") -> None:
        for logger in self.loggers:
            logger.close()
        if self.bar:
            self.bar.close()

    def _start_interval(self, trainer: "Trainer") -> None:
        self.started, self.paused = time.perf_counter(), trainer.pause_seconds

    def _measure(self, trainer: "Trainer", losses: list[float]) -> Record:
        """One line of metrics.jsonl; the host waits for the device here and nowhere else."""
        config, position, step = trainer.config, trainer.position, trainer.position.step - 1
        steps = len(losses)
        finite = [loss for loss in losses if math.isfinite(loss)]
        cross_entropy = math.fsum(finite) / len(finite) if finite else math.nan
        loops = trainer.engine.step_context.accumulator.read_and_reset()
        trainer.engine.forget_timers()
        seconds = time.perf_counter() - self.started - (trainer.pause_seconds - self.paused)
        tokens = steps * config.training.global_batch_size * config.data.seq_length
        train_steps = config.training.train_steps
        metrics: Record = {
            "step": position.step,
            "tokens": position.tokens,
            "loss": cross_entropy + loops.get("ponder_loss", 0.0),
            "cross_entropy": cross_entropy,
            "lr": learning_rate(step, config.optimizer, config.schedule, train_steps),
            "beta1": beta1(step, config.optimizer, config.schedule, train_steps),
            "grad_norm": trainer.engine.grad_norm(),
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * self.flops_per_token / (self.peak * trainer.world_size),
            "seconds_per_step": seconds / steps,
            "skipped_steps": trainer.engine.skipped_steps,
            "saving_seconds": trainer.saver.seconds,
            **trainer.pending,
        }
        trainer.pending.clear()
        if loops:
            scales = trainer.engine.step_scales()
            zeta = [[softplus(s) for s in layer] for layer in scales]
            # The mean, as of the losses: at the last step alone a cyclic weight may show the same phase on every line.
            done = range(position.step - steps, position.step)
            weights = [ponder_weight(t, config.model.ponder_weight, config.training) for t in done]
            metrics |= {"ponder_weight": math.fsum(weights) / steps, **loops, "step_scales": scales, "zeta": zeta}
        return metrics


def softplus(s: float) -> float:
    """log(1 + e^s), also where a diverging run has made e^s too large for a float."""
    return max(s, 0.0) + math.log1p(math.exp(-abs(s)))


class ReplicaHook:
    """Every `parallel.check_replicas_interval` steps and when asked by SIGUSR2: are copies of weights still equal?"""

    def after_step(self, trainer: "Trainer") -> None:
        interval, step = trainer.config.parallel.check_replicas_interval, trainer.position.step
        if not trainer.check_replicas and (not interval or step % interval):
            return
        trainer.check_replicas = False
        with trainer.pause("replica check"):
            differences = trainer.engine.replica_differences()
        if differences:
            raise replicas_differ(differences, step)
        if trainer.rank == 0:
            log.info("replicas are identical at step %d", step)

    def close(self, trainer: "Trainer") -> None: ...


class CheckpointHook:
    """Every `checkpoint.interval_steps` and at the end."""

    def after_step(self, trainer: "Trainer") -> None:
        if not trainer.save_is_due:
            return
        with trainer.pause("save"):
            trainer.saver.save(wait=trainer.ending)
        trainer.save_asked = False
        self._mind_the_time(trainer)

    def _mind_the_time(self, trainer: "Trainer") -> None:
        saver = trainer.saver
        waited, elapsed = saver.seconds, time.perf_counter() - saver.started
        if trainer.rank == 0 and not saver.has_warned and elapsed > LONG_ENOUGH and waited > MUCH * elapsed:
            saver.has_warned = True
            advice = "raise checkpoint.interval_steps"
            if not trainer.config.checkpoint.asynchronous:
                advice += " or set checkpoint.asynchronous=true"
            log.warning(
                "training has waited %.0f of %.0f s for checkpoints, more than %.0f %%: %s",
                waited,
                elapsed,
                100 * MUCH,
                advice,
            )

    def close(self, trainer: "Trainer") -> None: ...


class Alarms:
    """Watches each line of metrics and warns about halting and gates."""

    def __init__(self, trainer: "Trainer") -> None:
        self.config = trainer.config
        self.talks = trainer.rank == 0
        self.raised: set[str] = set()

    def check(self, metrics: Record) -> None:
        for problem, value in alarms(metrics, self.config):
            if self.talks and problem not in self.raised:
                self.raised.add(problem)
                log.warning("%s: %s at step %d", problem, value, metrics["step"])


def _headline(metrics: Record) -> str:
    parts = [
        f"loss {metrics['loss']:.4f}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"MFU {metrics['mfu']:.1%}",
    ]
    if "expected_loops" in metrics:
        loops = metrics["expected_loops"]
        parts.append(f"loops {sum(loops) / len(loops):.2f}")
    if "validation_loss" in metrics:
        parts.append(f"validation {metrics['validation_loss']:.4f}")
    return "  ".join(parts)
