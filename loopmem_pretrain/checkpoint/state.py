"""What a checkpoint keeps of a run, what is restored from it, and what is said about it.

Kept: weights, float32 master weights, optimizer moments and engine counters (DeepSpeed's files), the position in the
run, the losses that later ones are compared with, a description of the data, the names of all parameters, the
configuration, the number of ranks, the states of random generators, the id of the run at Weights & Biases, one sample
and its loss. Not kept, because it is a function of the step: learning rate, beta1, ponder weight, the order of samples.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from loopmem_pretrain.checkpoint import probe
from loopmem_pretrain.checkpoint.generators import restore_generators
from loopmem_pretrain.checkpoint.store import CheckpointStore, read_manifest, verify
from loopmem_pretrain.checkpoint.universal import Merged, merge
from loopmem_pretrain.data.dataset import BlendedDataset, description_differences
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import CheckpointError

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"
"""File in the run folder with the run's id at Weights & Biases."""


@dataclass
class Position:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """The next sample of the order: samples consumed, and those left out."""
    tokens: int = 0
    """Training tokens consumed."""
    skipped_ranges: list[list[int]] = field(default_factory=list)
    """[first, last) samples of the order that rewinds left out."""


class Engine(probe.Engine, Protocol):
    """What saving and resuming need of a training engine."""

    public_names: dict[str, str]
    whole_shapes: dict[str, list[int]]
    bounds: list[int]

    def collect_states(self, folder: Path, tag: str) -> dict[str, Any]: ...

    def load(self, folder: Path, tag: str) -> None: ...

    def load_merged(self, merged: Merged, step: int, skipped_steps: int) -> None: ...

    @property
    def skipped_steps(self) -> int: ...


class Watch(Protocol):
    """What is remembered of the steps before."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any] | None) -> None: ...


class Run(probe.Run, Protocol):
    """What resuming needs of a run; the trainer is one."""

    run_dir: Path
    store: CheckpointStore
    dataset: BlendedDataset
    position: Position
    validated: tuple[int, float] | None
    """Step and loss of the last validation."""
    rank: int
    world_size: int

    @property
    def engine(self) -> Engine: ...

    @property
    def watch(self) -> Watch: ...

    def on_rank_zero(self, action: Callable[[], object]) -> None: ...


def facts(run: Run) -> dict[str, Any]:
    """What the manifest says besides the files."""
    names = run.engine.public_names
    wandb_id = run.run_dir / WANDB_ID
    return {
        "position": asdict(run.position),
        "skipped_steps": run.engine.skipped_steps,
        "statistics": run.watch.state(),
        **layout(run),
        "data": run.dataset.describe(),
        "tokenizer_sha256": run.dataset.datasets[0].stream.manifest.tokenizer.sha256,
        "validation_loss": run.validated[1] if run.validated and run.validated[0] == run.position.step else None,
        "wandb_id": wandb_id.read_text(encoding="utf-8").strip() if wandb_id.is_file() else None,
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
    _restore(run, checkpoint)
    return checkpoint


def newest_before(run: Run, step: int) -> int | None:
    """Step of the newest checkpoint of a step before `step`, as rank 0 sees it; a collective."""
    found = [None if run.rank else max((each for each in run.store.steps() if each < step), default=None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def go_back(run: Run, step: int) -> None:
    """Load the checkpoint of `step` into a run under way, and leave out the samples consumed since.

    Later checkpoints are set aside. The run goes on as a fresh start from that checkpoint, with other samples, would.

    Raises:
        CheckpointError: damaged.
    """
    samples = run.position.samples
    _restore(run, run.store.folder / run.store.name(step))
    run.position.skipped_ranges.append([run.position.samples, samples])
    run.position.samples = samples
    run.on_rank_zero(lambda: run.store.go_back_to(step))


def _restore(run: Run, checkpoint: Path) -> None:
    """Check and load `checkpoint`."""
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
    run.watch.restore(manifest.get("statistics"))
    before = BEFORE_SIZES | manifest
    moved = [f"{key} {before[key]} -> {now}" for key, now in layout(run).items() if before.get(key, now) != now]
    if moved:
        _load_reshaped(run, checkpoint, manifest.get("skipped_steps", 0))
    else:
        run.engine.load(checkpoint.parent, checkpoint.name)
    not_restored = _restore_the_rest(run, checkpoint, manifest)
    compared = probe.check_probe(run, checkpoint)
    if run.rank == 0:
        dealt = f", dealt out anew: {'; '.join(moved)}" if moved else ""
        log.info("resumed from %s at step %d%s; %s", os.fspath(checkpoint), run.position.step, dealt, compared)
        for line in not_restored:
            log.warning("not restored: %s", line)


def _restore_the_rest(run: Run, checkpoint: Path, manifest: dict[str, Any]) -> list[str]:
    """What is neither weights nor moments; returns what could not be restored, by name. A collective."""
    missing: list[list[str]] = [[]] * run.world_size
    dist.all_gather_object(missing, restore_generators(checkpoint, run.rank))
    lines = [
        f"states of the random generators {', '.join(names)} of rank {rank}: the checkpoint has "
        f"{manifest['world_size']} ranks (training draws no random numbers)"
        for rank, names in enumerate(missing)
        if names
    ]
    wandb_id, recorded = run.run_dir / WANDB_ID, manifest.get("wandb_id")
    if recorded and not wandb_id.exists() and run.rank == 0:
        write_file(wandb_id, f"{recorded}\n".encode())
    return lines


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
