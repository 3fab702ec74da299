"""The training loop, and everything that must exist before its first step."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loopmem_pretrain import control
from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.checkpoint.saving import Saver
from loopmem_pretrain.checkpoint.state import resume
from loopmem_pretrain.checkpoint.store import CheckpointStore
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import open_datasets, split_warning
from loopmem_pretrain.data.sampler import train_batches
from loopmem_pretrain.errors import EnvironmentFault, LoopMemError
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.parallel.agreement import from_rank_zero, together
from loopmem_pretrain.parallel.start import place_from_environment
from loopmem_pretrain.parallel.topology import Topology
from loopmem_pretrain.training import run_folder
from loopmem_pretrain.training.engine import TrainingEngine, init_distributed
from loopmem_pretrain.training.faults import FaultWatch
from loopmem_pretrain.training.hardware import choose_device
from loopmem_pretrain.training.hooks import Hook, make_hooks
from loopmem_pretrain.training.spikes import Spike
from loopmem_pretrain.training.time_limit import TimeLimit
from loopmem_pretrain.training.watchdog import Phase, Watchdog, ends_after
from loopmem_pretrain.words import counted

log = logging.getLogger(__name__)

_DEVICES = {"cpu": "CPU rank", "cuda": "GPU"}
"""What a rank is called in the log."""


class Trainer:
    """One rank of a run."""

    def __init__(self, config: RunConfig, stop_at_step: int | None = None, trust: bool = False) -> None:
        """Join the other ranks, open the data, build the model, resume where there is something to resume.

        `stop_at_step` ends this start, not the run: a checkpoint is written and the same command continues.
        `trust` resumes from a checkpoint that another run wrote.
        """
        self.trust = trust
        self.config, self.run_dir = config, Path(config.run_dir)
        place = place_from_environment()
        self.rank = place.rank
        self.device = choose_device(config, place.local_rank)
        init_distributed(self.device, config.parallel)
        self.topology = Topology.join(config.parallel)
        self.world_size = self.topology.world_size
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # We read no uninitialised memory; filling DeepSpeed's large buffers each step would cost minutes.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.locks: list[Any] = []  # held by rank 0 until its process ends
        with ends_after(config.faults.slow_phase_timeout_seconds, f"opening the run folder {self.run_dir}"):
            from_rank_zero(lambda: self.locks.append(run_folder.prepare(config, self.run_dir)))
        run_folder.hold(self.run_dir)
        self.watchdog = Watchdog(self.run_dir, self.rank, config.faults)  # from here on the folder is ours
        try:
            self._open(config, stop_at_step)
        except BaseException:
            self.watchdog.close()
            raise

    def _open(self, config: RunConfig, stop_at_step: int | None) -> None:
        self.dataset, self.validation_dataset = together(lambda: open_datasets(config))
        self.engine = TrainingEngine(config, self.device, self.topology)
        self.engine.on_micro_batch(self.watchdog.micro_batch)
        self.store = CheckpointStore(config.run_dir)
        self.position: Position = Position()
        self.validated: tuple[int, float] | None = None
        self.origin: Mapping[str, str] | None = None
        self.stop_at_step = min(stop_at_step or config.training.train_steps, config.training.train_steps)
        self.stop_reason: str | None = None
        self.signal: str | None = None
        self.save_asked = False
        """Whether a checkpoint of this step was asked for (RUN/SAVE); the same on every rank."""
        self.has_ended = False
        """Whether no step follows in this start."""
        self.check_asked = self.check_replicas = False
        """Whether this rank was asked by SIGUSR2 to compare replicas, and whether all ranks have agreed to."""
        self.pause_seconds: float = 0.0
        self.saver = Saver(self)
        self.faults: FaultWatch = FaultWatch(config.faults)
        self.time_limit = TimeLimit(config.faults.time_limit_seconds, control.job_end())
        self.pending: dict[str, Any] = {}
        """Measurements that wait for the next line of metrics.jsonl, such as a validation loss."""

        with self.watchdog.phase("resume"):
            resumed = resume(self)
        if resumed is None and self.rank == 0:  # so a run_dir misspelt, or an import forgotten, does not go unseen
            log.info(
                "%s has no checkpoint: weights begin random, from training.seed %d", self.run_dir, config.training.seed
            )
        self.watchdog.step = self.position.step
        self._introduce()
        self.hooks: list[Hook] = make_hooks(self)

    def train(self) -> run_folder.Status:
        """Run until the last step, `stop_at_step`, or a request to stop; returns how it ended."""
        # Signals are noted until the last save is over: a launcher sends SIGTERM as soon as one rank has gone.
        with contextlib.closing(self.watchdog), self._signals():
            return self._train()

    def _train(self) -> run_folder.Status:
        self.write_status("running", "training")
        failure: BaseException | None = None
        try:
            with self.watchdog.phase("step"):
                self._stop_before_the_first_step()
                batches = self._batches()
                while self.position.step < self.stop_at_step and not self.stop_reason:
                    skipped = self.engine.skipped_steps
                    loss = self.engine.train_batch(batches, self.position.step)
                    self.faults.record(loss, applied=self.engine.skipped_steps == skipped)
                    self._advance()
                    self.watchdog.step_done(self.position.step)
                    for hook in self.hooks:
                        hook.after_step(self)
                        if self.faults.spike and self._rewind(self.faults.spike):
                            batches = self._batches()
                            break  # nothing of the steps just undone is to be compared or saved
            done = self.position.step >= self.config.training.train_steps
            status: run_folder.Status = "done" if done else "interrupted"
            reason = (
                "all steps trained" if done else self.stop_reason or f"{control.AT_STEP} {self.stop_at_step} as asked"
            )
        except OSError as error:  # logs and status files; what else writes has its own, named errors
            failure = EnvironmentFault(
                f"cannot write in {self.run_dir}: {error}", "free space or mend permissions, then start again to resume"
            )
            raise failure from error
        except BaseException as error:
            failure = error
            raise
        finally:
            self.has_ended = True
            with self.watchdog.phase("end"):
                if failure is None:
                    try:
                        self.write_status(status, reason)
                    except LoopMemError as error:
                        log.error("cannot write status.json: %s", error.problem)
                elif self.rank == 0 and not self.watchdog.has_found_hang:
                    run_folder.write_failure(self.run_dir, failure, self.position.step)
                for hook in reversed(self.hooks):
                    try:
                        hook.close(self)
                    except OSError as error:
                        log.error("cannot close a log: %s", error)
                if not isinstance(sys.exception(), KeyboardInterrupt):
                    self.saver.close()
                if failure is None:
                    self._say_how_it_ended(status, reason)
        return status

    def _introduce(self) -> None:
        training, steps = self.config.training, self.engine.accumulation_steps
        log.info(
            "%s: %s parameters in %s, %s, ZeRO %d",
            self.run_dir,
            f"{parameter_counts(self.config.model).total:,}",
            training.precision,
            self.topology.describe(_DEVICES[self.device.type]),
            self.config.parallel.zero_stage,
        )
        log.info(
            "from step %s to %s; a step is %s (%s tokens) = DP %d x micro-batch %d x %d accumulated",
            f"{self.position.step:,}",
            f"{training.train_steps:,}",
            counted(training.global_batch_size, "sample"),
            f"{training.global_batch_size * self.config.data.seq_length:,}",
            self.topology.data_size,
            training.micro_batch_size,
            steps,
        )
        passes = self.dataset.epochs(training.train_steps * training.global_batch_size)
        for dataset, times in zip(self.dataset.datasets, passes, strict=True):
            log.info(
                "data in %s: %s tokens, read %s times by all steps",
                dataset.stream.folder,
                f"{len(dataset.stream):,}",
                f"{times:,.2f}",
            )
        if warning := split_warning(self.dataset):
            log.warning(warning)
        if self.position.step >= self.stop_at_step:
            log.info("nothing left to train: this start ends at step %s", f"{self.stop_at_step:,}")

    def _say_how_it_ended(self, status: run_folder.Status, reason: str) -> None:
        step = self.position.step
        if status == "done":
            log.info("all %s steps are trained", f"{step:,}")
            return
        files = [self.run_dir / name for name in (control.STOP, control.PAUSE) if (self.run_dir / name).exists()]
        first = f"remove {files[0]}, then " if files else ""
        at = "" if reason.startswith(control.AT_STEP) else f", at step {step:,}"
        log.info("%s%s; %sthe same command continues from there", reason, at, first)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        training, data = self.config.training, self.config.data
        return train_batches(
            self.dataset,
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            dp_rank=self.topology.data_rank,
            dp_size=self.topology.data_size,
            consumed_samples=self.position.samples,
            num_workers=data.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _advance(self) -> None:
        samples = self.config.training.global_batch_size
        self.position.step += 1
        self.position.samples += samples
        self.position.tokens += samples * self.config.data.seq_length

    def _rewind(self, spike: Spike) -> bool:
        """Undo `spike` where there is a checkpoint from before it, and go on as a fresh start from there would."""
        with self.watchdog.phase("resume"):
            if not self.faults.rewind(self, spike):
                return False
        for hook in reversed(self.hooks):
            hook.close(self)
        self.hooks = make_hooks(self)
        if self.stop_reason:  # also asked to stop: the next start must not meet the spike again
            with self.pause("save"):
                self.saver.save(wait=True)
        return True

    @property
    def save_is_due(self) -> bool:
        """Whether a checkpoint of the step just done is to be written."""
        return self.ending or self.save_asked or self.position.step % self.config.checkpoint.interval_steps == 0

    @property
    def ending(self) -> bool:
        """Whether the step just done is the last of this start."""
        return self.position.step >= self.stop_at_step or self.stop_reason is not None

    def _stop_before_the_first_step(self) -> None:
        """A request that was there before the start, or came during it, is heeded before a step is trained."""
        self.stop_reason = from_rank_zero(lambda: control.stop_request(self.run_dir)) or None

    def agree(self) -> None:
        """What any rank was asked by a signal or by its clock, or rank 0 by a file, all ranks do now.

        A collective, called where the host waits anyway.
        """
        names = ("SIGTERM", "SIGINT", "SIGUSR1")
        stop = names.index(self.signal) + 1 if self.signal else 0
        is_due = self.time_limit.is_due(self.saver.longest_seconds)
        request = control.stop_request(self.run_dir) if self.rank == 0 else ""
        save = self.rank == 0 and control.save_request(self.run_dir)
        check, self.check_asked = self.check_asked, False  # now: another signal may come while this rank waits below
        mine = (stop, check, self.saver.has_failed, is_due, bool(request), save)
        asked = torch.tensor([int(value) for value in mine], device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        stop, check, save_failed, is_due, requested, save = asked.tolist()
        if requested:
            self.stop_reason = request or "stopped on request"  # rank 0 alone writes it down
        elif stop:
            self.stop_reason = f"stopped by {names[stop - 1]}"
        elif is_due:
            self.stop_reason = f"stopped before {self.time_limit} over"
        if save:
            from_rank_zero(lambda: control.save_begins(self.run_dir))
        self.save_asked |= bool(save)  # until a checkpoint is written, a rewind may come between
        self.check_replicas = bool(check)
        if save_failed:
            with self.pause("save"):
                self.saver.finish()

    @contextlib.contextmanager
    def pause(self, phase: Phase) -> Iterator[None]:
        """Time spent inside (validation, saving) does not count as training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or steps still queued would be booked as pause
        start = time.perf_counter()
        with self.watchdog.phase(phase):
            yield
        self.pause_seconds += time.perf_counter() - start

    def write_status(self, status: run_folder.Status, reason: str) -> None:
        if self.rank == 0 and not self.watchdog.has_found_hang:
            run_folder.write_status(self.run_dir, status, reason, self.position.step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGUSR1 ask for a clean stop at the next log interval; a second SIGINT is immediate.

        SIGUSR2 asks for a comparison of replicas there.
        """

        def remember(number: int, frame: Any) -> None:
            if self.signal == "SIGINT" and number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGUSR2:
                self.check_asked = True
            else:
                self.signal = signal.Signals(number).name
                if self.rank == 0 and not self.has_ended:
                    # Not through logging or print, whose locks the interrupted code may hold.
                    once_more = "; a second Ctrl-C ends at once, without saving" if number == signal.SIGINT else ""
                    os.write(
                        2, f"\nloopmem: {self.signal}: saving after the next line of the log{once_more}\n".encode()
                    )

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        previous = {number: signal.signal(number, remember) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
