"""Saving a run: what is kept is copied and written while training goes on.

    main thread   collect the state: names and live tensors   (training waits)
    a thread      copy it to host memory                      (beside the next forward and backward pass; the update of
                                                               the weights waits until it is done)
    the thread    write this rank's files, flush, hash        (training goes on)
    of rank 0     when all ranks have written: manifest, rename, move `latest`, remove old checkpoints

The loss that a resumed run must reproduce is that of the next step's first micro-batch, which is computed anyway.

The threads need no collective: each leaves a record of its files in `.incomplete-step_...-written/`, and rank 0's waits
for all records. The ranks' main threads learn of a failure when they agree the next time (`Trainer.agree`).

A random token in the folder's name keeps ranks of a start that was thought dead out of the save of the next one.
"""

import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from loopmem_pretrain.checkpoint import state
from loopmem_pretrain.checkpoint.generators import generator_states, generators_file
from loopmem_pretrain.checkpoint.probe import FILE as PROBE_FILE
from loopmem_pretrain.checkpoint.probe import Sample, take_sample
from loopmem_pretrain.checkpoint.snapshot import HostBuffers, compact, frozen
from loopmem_pretrain.checkpoint.store import CheckpointStore, hash_files
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.training import CheckpointConfig
from loopmem_pretrain.data.files import sync_folder
from loopmem_pretrain.errors import EnvironmentFault, LoopMemError, TrainingGaveUp
from loopmem_pretrain.parallel.agreement import from_rank_zero

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between looks at whether others are done."""
GRACE = 10.0
"""Seconds without a new record after which rank 0 of a start that ends waits no longer for ranks that may be gone."""
FAILURES = 2
"""Saves in a row that fail and end the run: with each interval more work could be lost."""


class Run(state.Run, Protocol):
    """What saving needs of a run; the trainer is one."""

    device: torch.device
    pause_seconds: float
    """What does not count as training time."""


class Saver:
    """The saves of one rank, at most one under way. Public methods are collectives, properties are local."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.engine.on_update(self._wait_for_copy)
        self.seconds = 0.0
        """That training has waited for saves, in this start."""
        self.started, self.has_warned = time.perf_counter(), False
        """Since when `seconds` counts, and whether it was remarked on that they are many."""
        self._longest_seconds = 0.0
        self._buffers = HostBuffers(pin_memory=run.device.type == "cuda")
        self._save: _Save | None = None
        self._failed_in_a_row = 0

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save under way has failed."""
        return self._save is not None and self._save.failure is not None

    @property
    def longest_seconds(self) -> float:
        """From the start of a save to its publication, at most so far; one under way counts as far as it has come."""
        now = 0.0 if self._save is None else self._save.took or time.perf_counter() - self._save.started
        return max(self._longest_seconds, now)

    def close(self) -> None:
        """Let this rank's thread come to its end; not a collective, for a start that ends with or without an error.

        A process that ended while torch writes would abort. What is whole is published; rank 0 waits a little for the
        records of the others, who may be gone. A failure is only told: what ended the start is raised already.
        """
        save = self._save
        if save is None:
            return
        save.sample.no_more()
        save.wait_for_others = time.monotonic() + GRACE
        save.thread.join()
        if save.failure is not None:
            log.error("the checkpoint of step %d is not saved: rank %d: %s", save.step, self.run.rank, save.failure)

    def save(self, wait: bool) -> None:
        """Save the current step. With `wait`, or where `checkpoint.asynchronous` is off, return when it is published.

        Raises:
            EnvironmentFault: disk full or not writable, at once where it is waited for, else the second time in a row.
                The newest checkpoint is then the one before.
            TrainingGaveUp: the loss of these weights is not finite: nobody could go on from such a checkpoint. In the
                background the second time in a row, since one micro-batch may be to blame.
        """
        self.finish()
        started = time.perf_counter()
        wait = wait or not self.run.config.checkpoint.asynchronous
        try:
            save = self._start(wait)
        except EnvironmentFault as fault:  # the same on every rank
            self._take_failure(fault, final=wait)
        else:
            self._save = save
            if wait:
                self.finish(final=True)
        self.seconds += time.perf_counter() - started

    def finish(self, final: bool = False) -> None:
        """Wait until the save under way, if any, is published; with `final` any failure is raised.

        Raises:
            EnvironmentFault, TrainingGaveUp: as `save` says.
        """
        save, self._save = self._save, None
        if save is None:
            return
        save.sample.no_more()
        started = time.perf_counter()
        while not self._all_done(save):
            save.thread.join(POLL)
        self._longest_seconds = max(self._longest_seconds, save.took)
        if not final:
            self.seconds += time.perf_counter() - started
        failures: list[Any] = [None] * self.run.world_size
        dist.all_gather_object(failures, save.failure)
        told = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if isinstance(failure, str)]
        gave_up = [failure for failure in failures if isinstance(failure, TrainingGaveUp)]
        if told or gave_up:
            if self.run.rank == 0:
                self.run.store.discard_incomplete()  # it may be what fills the disk
            fault = EnvironmentFault(
                f"cannot save the checkpoint of step {save.step} in {save.folder.parent}: {'; '.join(told)}",
                "free space or mend permissions there; the previous checkpoint is whole",
            )
            self._take_failure(fault if told else gave_up[0], final)
        else:
            self._failed_in_a_row = 0

    def _wait_for_copy(self) -> None:
        """Before the weights change, the save under way must have its copy of them."""
        if self._save is not None and not self._save.copied.is_set():
            started = time.perf_counter()
            self._save.copied.wait()
            waited = time.perf_counter() - started
            self.seconds += waited
            self.run.pause_seconds += waited

    def _take_failure(self, fault: EnvironmentFault | TrainingGaveUp, final: bool) -> None:
        self._failed_in_a_row += 1
        if final or self._failed_in_a_row >= FAILURES:
            raise fault
        if self.run.rank == 0:
            log.error("%s\n  the run goes on and tries again at the next checkpoint", fault)

    def _all_done(self, save: "_Save") -> bool:
        """Whether every rank's thread has ended; a failure anywhere ends the wait of rank 0's for the others."""
        now = [int(not save.thread.is_alive()), int(save.failure is None)]
        told = torch.tensor(now, device=self.run.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        done, well = told.tolist()
        if not well:
            save.given_up.set()
        return bool(done)

    def _start(self, wait: bool) -> "_Save":
        """Make the folder, collect the state and start the thread."""
        run, step = self.run, self.run.position.step
        started = time.perf_counter()
        sample = Sample(step)
        if wait:  # perhaps no step follows
            take_sample(run, sample)
        elif run.engine.has_loss:
            run.engine.on_next_loss(sample.take)
        sampled = time.perf_counter() - started
        token = from_rank_zero(lambda: secrets.token_hex(4))
        from_rank_zero(lambda: make_folder(run.store, step, token))
        states: dict[str, Any] = run.engine.collect_states(run.store.folder, run.store.incomplete_name(step, token))
        states[generators_file(run.rank)] = generator_states()
        states = {name: frozen(value) for name, value in states.items()}
        texts, facts = {}, {}
        if run.rank == 0:
            texts["config.yaml"] = dump_config(run.config).encode()
            facts = state.facts(run)
        seconds = {"loss_on_sample": sampled, "collect": time.perf_counter() - started - sampled}
        save = _Save(run, token, states, texts, facts, sample, seconds, None if wait else self._buffers)
        save.thread.start()
        return save


class _Save:
    """One save of one rank, from its snapshot to its publication."""

    def __init__(
        self,
        run: Run,
        token: str,
        states: dict[str, Any],
        texts: Mapping[str, bytes],
        facts: Mapping[str, Any],
        sample: Sample,
        seconds: dict[str, float],
        buffers: HostBuffers | None,
    ) -> None:
        self.step, self.store, self.rank, self.world_size = run.position.step, run.store, run.rank, run.world_size
        self.keep: CheckpointConfig = run.config.checkpoint
        self.token = token
        self.folder = self.store.folder / self.store.incomplete_name(self.step, token)
        self.records = records_folder(self.folder)
        self.wait_for_others = math.inf
        """Until when (monotonic seconds) rank 0 waits for the others' records, and as long as they keep coming."""
        self.states, self.texts, self.facts, self.seconds = states, dict(texts), facts, seconds
        self.writes_sample, self.sample, self.buffers = run.engine.has_loss, sample, buffers
        self.failure: str | TrainingGaveUp | None = None
        self.device, self.copied = run.device, threading.Event()
        """Whether training may change the weights."""
        self.collected = torch.cuda.current_stream(run.device).record_event() if run.device.type == "cuda" else None
        self.started = time.perf_counter() - sum(seconds.values())
        self.took = 0.0
        """Seconds from its beginning until its thread ended."""
        self.given_up = threading.Event()
        # A daemon: a process that ends without waiting leaves an incomplete folder, as if it had been killed.
        self.thread = threading.Thread(target=self._work, name=f"save-{self.step}", daemon=True)

    def _work(self) -> None:
        try:
            self._copy()
            self._write()
            if self.rank == 0:
                self._publish(self._records())
        except _GivenUp:
            pass  # another rank has failed and says why
        except TrainingGaveUp as error:
            self.failure = error
        except (OSError, RuntimeError, LoopMemError) as error:
            self.failure = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise  # a bug: the traceback is printed
        finally:
            self.copied.set()
            self.states = {}
            self.took = time.perf_counter() - self.started

    def _copy(self) -> None:
        """The state to host memory, unless training waits until it is written."""
        started = time.perf_counter()
        if self.buffers is not None:
            try:
                self.states = self._copies(self.buffers)
            except (MemoryError, RuntimeError) as error:
                raise EnvironmentFault(f"cannot copy the state to host memory: {error}") from error
        self.copied.set()
        self.seconds["copy"] = time.perf_counter() - started

    def _copies(self, buffers: HostBuffers) -> dict[str, Any]:
        if self.collected is None:
            return {name: buffers.copy(name, value) for name, value in self.states.items()}
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # beside the one that computes
        stream.wait_event(self.collected)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            copies = {name: buffers.copy(name, value) for name, value in self.states.items()}
        stream.synchronize()
        return copies

    def _write(self) -> None:
        """This rank's files, and the record that they are whole."""
        started = time.perf_counter()
        for name, value in self.states.items():
            write_state(self.folder / name, compact(value))
        content = self.sample.content() if self.writes_sample else None
        if content is not None:
            self.texts[PROBE_FILE] = content
        for name, text in self.texts.items():
            (self.folder / name).write_bytes(text)
        self.seconds["write"] = time.perf_counter() - started
        files = hash_files(self.folder, [*self.texts, *self.states])
        self.seconds["flush_and_hash"] = time.perf_counter() - started - self.seconds["write"]
        leave_record(self.records, self.rank, {"files": files, "seconds": self.seconds})

    def _records(self) -> list[dict[str, Any]]:
        """Of all ranks, when they are there."""
        missing = [_record_name(rank) for rank in range(self.world_size)]
        records: list[dict[str, Any]] = []
        newest = time.monotonic()
        while missing:
            # The folder's list: NFS would for a minute go on to say that a name which was not there is not there.
            there = set(os.listdir(self.records))
            found = [name for name in missing if name in there]
            records += [json.loads((self.records / name).read_text(encoding="utf-8")) for name in found]
            missing = [name for name in missing if name not in there]
            newest = time.monotonic() if found else newest
            if not missing:
                break
            if self.given_up.wait(POLL):
                raise _GivenUp
            if time.monotonic() > max(self.wait_for_others, newest + GRACE):
                raise EnvironmentFault(f"{len(missing)} of {self.world_size} ranks have not written their part")
        return records

    def _publish(self, records: list[dict[str, Any]]) -> None:
        files = {name: entry for record in records for name, entry in record["files"].items()}
        phases = {name: round(max(record["seconds"][name] for record in records), 4) for name in self.seconds}
        self.store.publish(self.step, files, {**self.facts, "seconds": phases}, self.token)
        shutil.rmtree(self.records, ignore_errors=True)  # the next save removes what may be left of it
        self.store.prune(self.keep)
        sync_folder(self.store.folder)


class _GivenUp(Exception):
    """The wait for the other ranks' records has no point any more."""


def write_state(path: Path, value: Any) -> None:
    """torch.save, whose errors do not say what is wrong: mostly, that the disk is full."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free
        problem = f"cannot write {path.name}, {free / 1e6:,.1f} MB are free there: {str(error).splitlines()[0]}"
        raise EnvironmentFault(problem) from error


def leave_record(folder: Path, rank: int, record: Mapping[str, Any]) -> None:
    """The name of the record is the last that a rank writes: when rank 0 sees it, it may remove the folder."""
    temporary = folder / f".{rank}.tmp"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, folder / _record_name(rank))


def _record_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def records_folder(folder: Path) -> Path:
    """Where the ranks leave their records of a save into `folder`: beside it, not part of the checkpoint."""
    return folder.with_name(f"{folder.name}-written")


def make_folder(store: CheckpointStore, step: int, token: str) -> None:
    """Make the folders of a save, after what earlier, interrupted saves left is gone. Rank 0 only.

    Raises:
        EnvironmentFault: disk full, no permission, or another start has taken the run folder over.
    """
    folder = store.folder / store.incomplete_name(step, token)
    try:
        store.discard_incomplete()
        folder.mkdir(parents=True)
        records_folder(folder).mkdir()
    except OSError as error:
        raise EnvironmentFault(
            f"cannot save the checkpoint of step {step} in {os.fspath(store.folder)}: {error.strerror or error}",
            "free space or mend permissions there; the previous checkpoint is whole",
        ) from error
