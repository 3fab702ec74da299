"""What a checkpoint keeps of a run, what is restored from it, and what is said about it.

Kept: weights, float32 master weights, optimizer moments and engine counters (DeepSpeed's files), the position in the
run, the losses that later ones are compared with, a description of the data, the names of all parameters, the
configuration, where imported weights came from, the number of ranks, the states of random generators, the id of the
run at Weights & Biases, one sample and its loss. Not kept, because it is a function of the step: learning rate, beta1,
ponder weight, the order of samples.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from loopmem_pretrain.checkpoint import probe
from loopmem_pretrain.checkpoint.choose import Choice, choose
from loopmem_pretrain.checkpoint.generators import restore_generators
from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.checkpoint.safe_load import check_pickles, pickles
from loopmem_pretrain.checkpoint.store import RUN_ID, CheckpointStore, checkpointed_step
from loopmem_pretrain.checkpoint.universal import MERGED, Merged, is_merged, merge
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.restart import changes
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import BlendedDataset, description_differences
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.metrics_file import METRICS_NAME, read_lines
from loopmem_pretrain.parallel.agreement import from_rank_zero, together
from loopmem_pretrain.words import counted

log = logging.getLogger(__name__)

TRUSTED = "trusted_run_ids"
"""File in the run folder with the ids of other runs whose checkpoints --trust has let in."""
WANDB_ID = "wandb_id"
"""File in the run folder with the run's id at Weights & Biases."""
FIRST_SAVES = 3
"""Of a run, at least one of which has succeeded: two in a row that fail end it, before the next is done."""


class Engine(probe.Engine, Protocol):
    """What saving and resuming need of a training engine."""

    public_names: dict[str, str]
    whole_shapes: dict[str, list[int]]
    bounds: list[int]
    group_order: str

    def collect_states(self, folder: Path, tag: str) -> dict[str, Any]: ...

    def on_update(self, call: Callable[[], None]) -> None: ...

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
    validated: tuple[int, float] | None
    """Step and loss of the last validation."""
    origin: Mapping[str, str] | None
    """Folder and model_type of the weights that the run began with; None where it began with its own."""
    rank: int
    world_size: int
    trust: bool
    """Whether to resume from a checkpoint of another run."""

    @property
    def engine(self) -> Engine: ...

    @property
    def faults(self) -> Watch: ...


def facts(run: Run) -> dict[str, Any]:
    """What the manifest says besides the files; read on rank 0 only."""
    names = run.engine.public_names
    wandb_id = run.run_dir / WANDB_ID
    return {
        "run_id": read_run_id(run.run_dir),
        "origin": run.origin,
        "position": asdict(run.position),
        "skipped_steps": run.engine.skipped_steps,
        "statistics": run.faults.state(),
        **layout(run),
        "versions": {name: version(name) for name in ("loopmem-pretrain", "torch", "deepspeed")},
        "data": run.dataset.describe(),
        "tokenizer_sha256": run.dataset.datasets[0].stream.manifest.tokenizer.sha256,
        "validation_loss": _validation_loss(run),
        "wandb_id": wandb_id.read_text(encoding="utf-8").strip() if wandb_id.is_file() else None,
        "parameter_names": names,
        "parameter_shapes": run.engine.whole_shapes,
    }


def _validation_loss(run: Run) -> float | None:
    """Of this step, where one was measured and is a number."""
    step, loss = run.validated or (-1, math.nan)
    return loss if step == run.position.step and math.isfinite(loss) else None


# What a checkpoint without these keys, written before there were such choices, was saved with.
BEFORE_CHOICES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "memory_placement": "replicated",
    "group_order": "float32 first",
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
        "group_order": run.engine.group_order,
    }


def resume(run: Run) -> Path | None:
    """Restore the newest whole checkpoint of the run folder into a fresh run; None where there is none.

    With the ranks and sizes it was saved with, bit for bit. With others, the same weights and moments are dealt out
    anew and the samples go on in the same order; sums over ranks are then rounded differently.

    Raises:
        CheckpointError: all are damaged, or have gone; or the newest whole one was saved for other data or by another
            run, or holds more than weights.
    """
    choice = choose(run.store, run.rank, run.world_size)
    if choice is None:
        from_rank_zero(lambda: _refuse_lost_checkpoints(run.run_dir, run.config.checkpoint.interval_steps))
        return None
    _restore(run, choice)
    # Where an older one was chosen by hand: checkpoints of the branch that is left must not come back later.
    from_rank_zero(lambda: run.store.leave_branch(run.position.step))
    return choice.checkpoint


def _refuse_lost_checkpoints(run_dir: Path, interval_steps: int) -> None:
    """A run that has come far has saved: a folder that says so and has no checkpoint was not copied whole.

    Also where status.json does not know of one: a run that was killed or failed after FIRST_SAVES intervals had one.

    Raises:
        CheckpointError: it would be trained from the beginning.
    """
    path = run_dir / "status.json"
    if not path.exists():
        return
    try:
        step = checkpointed_step(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path} is damaged, and there is no checkpoint in {run_dir}: how far it was trained is not known",
            "remove the file to train this run from its beginning, or choose another run_dir",
        ) from None
    logged = [line["step"] for line in read_lines(run_dir / METRICS_NAME, last=2)][-1:]  # the very last may be torn
    source = path.name
    if not step and logged and logged[0] > FIRST_SAVES * interval_steps:
        step, source = logged[0], METRICS_NAME
    if step:
        raise CheckpointError(
            f"{run_dir} has trained {step:,} steps ({source}), and there is no checkpoint in it",
            "restore its checkpoints/ folder, or choose another run_dir; remove status.json to train this one anew",
        )


def go_back(run: Run, choice: Choice) -> None:
    """Load an older checkpoint into a run under way, and leave out the samples consumed since.

    Later checkpoints are set aside. The run goes on as a fresh start from that checkpoint, with other samples, would.

    Raises:
        CheckpointError: saved for other data or by another run, or holding more than weights.
    """
    samples = run.position.samples
    _restore(run, choice)
    run.position.skipped_ranges.append([run.position.samples, samples])
    run.position.samples = samples
    from_rank_zero(lambda: run.store.go_back_to(run.position.step))


def _restore(run: Run, choice: Choice) -> None:
    """Check and load a checkpoint that is whole."""
    checkpoint, manifest = choice.checkpoint, choice.manifest
    changed = description_differences(manifest["data"], run.dataset.describe())
    if changed:
        raise CheckpointError(
            f"{checkpoint} was trained on other data:\n    " + "\n    ".join(changed),
            "restore the data it was trained on, or start a new run folder",
        )
    from_rank_zero(lambda: _refuse_foreign(run, checkpoint, manifest))
    from_rank_zero(lambda: _refuse_other_configuration(run, checkpoint))
    together(lambda: check_pickles(pickles(checkpoint)[run.rank :: run.world_size]))
    run.position = Position(**manifest["position"])
    run.origin = manifest.get("origin")
    run.faults.restore(manifest.get("statistics"))
    before = BEFORE_CHOICES | manifest
    if is_merged(manifest):
        del before["group_order"]  # whole parameters have none
    moved = [f"{key} {before[key]} -> {now}" for key, now in layout(run).items() if before.get(key, now) != now]
    skipped_steps = manifest.get("skipped_steps", 0)
    if is_merged(manifest):
        run.engine.load_merged(Merged(checkpoint, checkpoint / MERGED), run.position.step, skipped_steps)
    elif moved:
        _load_reshaped(run, checkpoint, skipped_steps)
    else:
        run.engine.load(checkpoint.parent, checkpoint.name)
    not_restored = _restore_the_rest(run, checkpoint, manifest)
    compared = probe.check_probe(run, checkpoint)
    if choice.falls_back:
        from_rank_zero(lambda: run.store.fall_back(checkpoint, choice.damaged))
    if run.rank == 0:
        dealt = f", redistributed: {'; '.join(moved)}" if moved else ""
        log.info("resumed from %s at step %d%s; %s", os.fspath(checkpoint), run.position.step, dealt, compared)
        for line in not_restored:
            log.warning("not restored: %s", line)


def _restore_the_rest(run: Run, checkpoint: Path, manifest: dict[str, Any]) -> list[str]:
    """What is neither weights nor moments; returns what could not be restored, by name. A collective."""
    missing: list[list[str]] = [[]] * run.world_size
    if run.position.step:  # a run that has not begun goes on with the generators of this start
        dist.all_gather_object(missing, together(lambda: restore_generators(checkpoint, run.rank)))
    lines = [
        f"states of the random generators {', '.join(names)} of rank {rank}: the checkpoint has those of "
        f"{counted(manifest['world_size'], 'rank')} (training draws no random numbers)"
        for rank, names in enumerate(missing)
        if names
    ]
    wandb_id, recorded = run.run_dir / WANDB_ID, manifest.get("wandb_id")
    if recorded:
        content = f"{recorded}\n".encode()
        from_rank_zero(lambda: None if wandb_id.exists() else write_file(wandb_id, content))
    return lines


def _load_reshaped(run: Run, checkpoint: Path, skipped_steps: int) -> None:
    """Rank 0 merges the checkpoint beside it, where all ranks can read it; each takes its parts."""
    folder = checkpoint.with_name(f".incomplete-{checkpoint.name}-merged")

    def prepare() -> None:
        if folder.exists():
            shutil.rmtree(folder)  # of a start that was killed
        log.info("merging %s, which other ranks wrote", os.fspath(checkpoint))
        merge(checkpoint, folder)

    from_rank_zero(prepare)
    run.engine.load_merged(Merged(checkpoint, folder), run.position.step, skipped_steps)
    dist.barrier()
    # What other nodes still have open may stay on a shared file system; the next merging begins by removing it.
    from_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))


def read_run_id(run_dir: Path) -> str:
    """What `run_folder.prepare` called the run of this folder."""
    return (run_dir / RUN_ID).read_text(encoding="utf-8").strip()


def _refuse_foreign(run: Run, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """A checkpoint put here from elsewhere is not resumed by accident. Rank 0 only."""
    ours, written_by = read_run_id(run.run_dir), manifest.get("run_id")
    if written_by == ours or (written_by and written_by in _trusted_ids(run)):
        return
    what = f"{checkpoint} was written by {f'run {written_by}' if written_by else 'a run that gave no id'}"
    if not run.trust:
        raise CheckpointError(
            f"{what}, this run folder is of run {ours}",
            "if you know where it comes from, start once with --trust; else remove it, or choose another run_dir",
        )
    if written_by:  # also when a later start, or a rewind, comes back to it
        content = "".join(f"{each}\n" for each in [*_trusted_ids(run), written_by])
        write_file(run.run_dir / TRUSTED, content.encode())
    log.warning("%s; trusted because of --trust", what)


def _refuse_other_configuration(run: Run, checkpoint: Path) -> None:
    """What RUN/config.yaml is compared with at each start may be missing, or not be that of a trusted checkpoint.

    Of what has changed DeepSpeed would take some from its files (weight_decay, eps) and some from this start.
    """
    recorded = checkpoint / "config.yaml"
    if not recorded.exists():  # and not listed: other versions, or other programs, wrote none
        return
    changed = changes(load_config(RunConfig, recorded), run.config)
    if changed:
        raise CheckpointError(
            f"{checkpoint} was trained with another configuration:\n    " + "\n    ".join(changed),
            "take the changes back to go on with it; to begin a run of this configuration with its weights, export "
            "them with `loopmem convert` and import them with `loopmem convert --from-hf`",
        )


def _trusted_ids(run: Run) -> list[str]:
    path = run.run_dir / TRUSTED
    return path.read_text(encoding="utf-8").split() if path.exists() else []
