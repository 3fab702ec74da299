"""Saving and resuming a run: what is kept, what is restored, and what is said about it.

Kept: weights, float32 master weights, optimizer moments and engine counters (DeepSpeed's files), the position in the
run, a description of the data, the names of all parameters, the configuration, the number of ranks. Not kept, because
it is a function of the step: learning rate, beta1, ponder weight, the order of samples. The model draws no random
numbers in training, so there is no generator state.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from loopmem_pretrain.checkpoint.store import (
    CheckpointStore,
    hash_files,
    list_files,
    read_manifest,
    verify,
)
from loopmem_pretrain.checkpoint.universal import Merged, merge
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import BlendedDataset, description_differences
from loopmem_pretrain.data.files import sync_folder, write_file
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault

log = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Training samples consumed."""
    tokens: int = 0
    """Training tokens consumed."""


class Engine(Protocol):
    """What saving needs of a training engine."""

    public_names: dict[str, str]
    whole_shapes: dict[str, list[int]]
    bounds: list[int]

    def save(self, folder: Path, tag: str) -> None: ...

    def load(self, folder: Path, tag: str) -> None: ...

    def load_merged(self, merged: Merged, step: int, skipped_steps: int) -> None: ...

    @property
    def skipped_steps(self) -> int: ...


class Run(Protocol):
    """What saving and resuming need of a run; the trainer is one."""

    config: RunConfig
    store: CheckpointStore
    dataset: BlendedDataset
    position: Position
    rank: int
    world_size: int

    @property
    def engine(self) -> Engine: ...

    def on_rank_zero(self, action: Callable[[], object]) -> None: ...


def save(run: Run) -> Path:
    """Write and publish a checkpoint of the current step. Called on every rank.

    Raises:
        EnvironmentFault: the disk is full or not writable; the previous checkpoint stays the newest.
    """
    store, step = run.store, run.position.step
    run.on_rank_zero(lambda: _prepare_folder(run))
    folder = store.folder / store.incomplete_name(step)
    try:
        run.engine.save(store.folder, folder.name)
        dist.barrier()
        files = list_files(folder)
        shares: list[Any] = [None] * run.world_size
        dist.all_gather_object(shares, hash_files(folder, files[run.rank :: run.world_size]))
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError ("unexpected pos", "file write failed"), and so do collectives
        # when another rank is gone: that one is not about the disk.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("write", "unexpected pos")):
            raise
        raise EnvironmentFault(
            f"cannot save the checkpoint of step {step} in {store.folder}: {error}",
            "free space or mend permissions there and start the same command again; "
            "the previous checkpoint is whole and will be resumed",
        ) from error
    hashes = {name: entry for share in shares for name, entry in share.items()}
    run.on_rank_zero(lambda: _publish(run, hashes))
    return store.folder / store.name(step)


def _prepare_folder(run: Run) -> None:
    store = run.store
    try:
        store.discard_incomplete()
        (store.folder / store.incomplete_name(run.position.step)).mkdir(parents=True)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write to {store.folder}: {error.strerror}", "give write permission or free space, then start again"
        ) from None


def _publish(run: Run, hashes: dict[str, dict[str, Any]]) -> None:
    store, step = run.store, run.position.step
    folder = store.folder / store.incomplete_name(step)
    try:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):  # DeepSpeed's; they cannot read pipeline checkpoints
            (store.folder / script).unlink(missing_ok=True)
        write_file(folder / "config.yaml", dump_config(run.config).encode())
        hashes.update(hash_files(folder, ["config.yaml"]))
        store.publish(step, hashes, facts(run))
        store.prune(run.config.checkpoint.keep_last)
        sync_folder(store.folder)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot publish the checkpoint of step {step} in {store.folder}: {error.strerror}",
            "free space there and start the same command again",
        ) from error


def facts(run: Run) -> dict[str, Any]:
    """What the manifest says besides the files."""
    names = run.engine.public_names
    return {
        "position": asdict(run.position),
        "skipped_steps": run.engine.skipped_steps,
        **layout(run),
        "data": run.dataset.describe(),
        "tokenizer_sha256": run.dataset.datasets[0].stream.manifest.tokenizer.sha256,
        "parameter_names": names,
        "parameter_shapes": run.engine.whole_shapes,
    }


# What a checkpoint without these keys, written before there were such sizes, was saved with.
BEFORE_SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "memory_placement": "replicated",
}


def layout(run: Run) -> dict[str, Any]:
    """What DeepSpeed's files depend on: they are read as they are where all of it is the same, else merged first."""
    parallel = run.config.parallel
    return {
        "world_size": run.world_size,
        "zero_stage": parallel.zero_stage,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "memory_placement": parallel.memory_placement,
        "stage_bounds": run.engine.bounds,
    }


def resume(run: Run) -> Path | None:
    """Restore the newest checkpoint of the run folder into a fresh run; None where there is none.

    With the ranks and sizes it was saved with, bit for bit. With others, the same weights and moments are dealt out
    anew and the samples go on in the same order; sums over ranks are then rounded differently.

    Raises:
        CheckpointError: damaged, or saved for other data.
    """
    checkpoint = run.store.latest()
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    changed = description_differences(manifest["data"], run.dataset.describe())
    if changed:
        raise CheckpointError(
            f"{checkpoint} was trained on other data:\n    " + "\n    ".join(changed),
            "restore the data it was trained on, or start a new run folder",
        )
    names = sorted(manifest["files"])
    failures: list[Any] = [None] * run.world_size
    dist.all_gather_object(failures, _failure_of(checkpoint, names[run.rank :: run.world_size]))
    damaged = [failure for failure in failures if failure is not None]
    if damaged:
        raise damaged[0]
    run.position = Position(**manifest["position"])
    before = BEFORE_SIZES | manifest
    moved = [f"{key} {before[key]} -> {now}" for key, now in layout(run).items() if before.get(key, now) != now]
    if moved:
        _load_reshaped(run, checkpoint, manifest.get("skipped_steps", 0))
    else:
        run.engine.load(checkpoint.parent, checkpoint.name)
    if run.rank == 0:
        log.info("resumed from %s at step %d%s", os.fspath(checkpoint), run.position.step, _in_words(moved))
    return checkpoint


def _in_words(moved: list[str]) -> str:
    return f", dealt out anew: {'; '.join(moved)}" if moved else ""


def _load_reshaped(run: Run, checkpoint: Path, skipped_steps: int) -> None:
    """Rank 0 merges the checkpoint beside it, where all ranks can read it; each takes its parts."""
    folder = checkpoint.with_name(f".incomplete-{checkpoint.name}-merged")

    def prepare() -> None:
        if folder.exists():
            shutil.rmtree(folder)  # of a start that was killed
        log.info("merging %s, which other ranks wrote", os.fspath(checkpoint))
        folder.mkdir()
        merge(checkpoint, folder / "merged")

    run.on_rank_zero(prepare)
    run.engine.load_merged(Merged(checkpoint, folder / "merged"), run.position.step, skipped_steps)
    dist.barrier()
    run.on_rank_zero(lambda: shutil.rmtree(folder))


def _failure_of(checkpoint: Path, names: list[str]) -> CheckpointError | None:
    """This rank's share of the verification, so that no rank waits for one that has failed."""
    try:
        verify(checkpoint, names)
    except CheckpointError as error:
        return error
    return None
