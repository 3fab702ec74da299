"""Which checkpoint a run resumes from: the newest that is whole, agreed on by all ranks before a byte is unpickled."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from loopmem_pretrain.checkpoint.manifest import DamagedCheckpoint, read_manifest
from loopmem_pretrain.checkpoint.store import CheckpointStore, damage, step_of, unlisted
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault
from loopmem_pretrain.parallel.agreement import from_rank_zero

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A whole checkpoint, and what was passed over for it."""

    checkpoint: Path
    manifest: dict[str, Any]
    damaged: list[Path]
    """Later ones that are damaged."""
    falls_back: bool
    """Whether `latest` does not name it: to be said in the store once it is loaded."""


def choose(store: CheckpointStore, rank: int, world_size: int, before: int | None = None) -> Choice | None:
    """The newest whole checkpoint; None where the run has none. A collective: each rank reads a share of the files.

    `before`: only of steps before this one.

    Raises:
        CheckpointError: all are damaged (each is named, with what is wrong), or a file may not be read.
    """
    paths, doubt = from_rank_zero(store.candidates)  # another rank may see a shared folder a little later
    if doubt and rank == 0:
        log.warning("%s: trying the checkpoints that are there, newest first", doubt)
    problems: dict[Path, list[str]] = {}
    for checkpoint in paths:
        if before is not None and (step_of(checkpoint.name) or 0) >= before:
            continue
        manifest, wrong = _examine(checkpoint, rank, world_size)
        if not wrong:
            if problems and rank == 0:
                log.warning("falling back to %s; the steps after it are trained again", os.fspath(checkpoint))
            return Choice(checkpoint, manifest, list(problems), bool(problems or doubt))
        problems[checkpoint] = wrong
        if rank == 0:
            log.warning("%s is damaged:\n    %s", os.fspath(checkpoint), "\n    ".join(wrong))
    if not problems or before is not None:
        return None
    lines = [f"{checkpoint.name}: {line}" for checkpoint, wrong in problems.items() for line in wrong]
    error = CheckpointError(
        f"every checkpoint in {store.folder} that could be resumed is damaged:\n    " + "\n    ".join(lines),
        "restore the files of one of them, or start a new run folder",
    )
    error.is_told = rank > 0
    raise error


def _examine(checkpoint: Path, rank: int, world_size: int) -> tuple[dict[str, Any], list[str]]:
    """The manifest, as rank 0 reads it, and what all ranks together find wrong; each hashes its share of the files.

    Raises:
        CheckpointError: a file may not be read, or a later version wrote it.
        EnvironmentFault: a rank sees damage where rank 0 sees none: a shared file system that is behind.
    """
    manifest, wrong = from_rank_zero(lambda: _first_look(checkpoint))
    mine: list[str] | CheckpointError = []
    if manifest:
        try:
            mine = damage(checkpoint, manifest, sorted(manifest["files"])[rank::world_size])
        except CheckpointError as error:  # told to all ranks below, so that none waits
            mine = error
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, CheckpointError):
            raise share
    found = sorted({line for share in shares for line in share})
    if not found:
        return manifest, wrong
    seen = from_rank_zero(lambda: damage(checkpoint, manifest, [line.partition(":")[0] for line in found]))
    if not seen:
        raise EnvironmentFault(
            f"in {checkpoint} other ranks see damage where rank 0 sees none: {'; '.join(found)}",
            "a shared file system may be behind, or broken on some machine: start the same command again",
        )
    return manifest, [*wrong, *seen]


def _first_look(checkpoint: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest and what is wrong with it and beside it."""
    try:
        manifest = read_manifest(checkpoint)
    except DamagedCheckpoint as error:
        return {}, [error.problem]
    wrong = unlisted(checkpoint, manifest)
    if manifest["step"] != step_of(checkpoint.name):
        wrong.append(f"manifest.json: is of step {manifest['step']:,}")
    return manifest, wrong
