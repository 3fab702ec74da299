"""Checkpoint folders that are whole or not there.

    RUN/checkpoints/
      latest                     name of the newest whole checkpoint, replaced atomically
      step_00000500/             DeepSpeed's files, config.yaml, and manifest.json with every file's size and hash
      .incomplete-step_00001000  being written, or left by a run that died; never read, removed by the next save
      abandoned-step_...-at-...  of a branch that was left by going back; never read or removed
      damaged-step_...           what a resume could not use; never read or removed
      replaced-step_...          written again; removed as soon as the new one is in its place

Written to `.incomplete-...`, flushed to disk, renamed, then `latest` moves: a reader never meets half of one.
"""

import heapq
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain import control
from loopmem_pretrain.checkpoint.manifest import MANIFEST, DamagedCheckpoint, encode_manifest, read_manifest
from loopmem_pretrain.config.training import CheckpointConfig
from loopmem_pretrain.data.files import require_folder, sha256_file, sync_file, sync_folder, write_file
from loopmem_pretrain.errors import CheckpointError

RUN_ID = "run_id"
"""File in the run folder with the random id that every checkpoint of the run carries."""
LOCK = ".lock"
"""File in the run folder that a process holds locked while it writes there: a start, or a command that makes one."""
POINTER = ".latest"
"""In a checkpoint that is being published, what `latest` is going to be; hidden, so no part of it (`unlisted`)."""

log = logging.getLogger(__name__)


class Candidates(NamedTuple):
    """What a resume may start from."""

    paths: list[Path]
    """Checkpoints in the order to try them."""
    doubt: str
    """What is wrong with `latest`, so that the paths go by step alone; empty where nothing is."""


class CheckpointStore:
    """The checkpoints of one run folder. Every method is local; the caller decides which rank calls it."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def name(self, step: int) -> str:
        """Of the folder; `step_of` is the inverse."""
        return f"step_{step:08d}"

    def incomplete_name(self, step: int, token: str = "") -> str:
        """Of the folder that a save of `step` is written into; `token` tells this save from another of the step."""
        return f".incomplete-{self.name(step)}{'-' if token else ''}{token}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        names = (path.name for path in self.folder.glob("step_*") if path.is_dir()) if self.folder.is_dir() else ()
        return sorted(step for name in names if (step := step_of(name)) is not None)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None when the run has none.

        Raises:
            CheckpointError: `latest` names no checkpoint that is there.
        """
        steps, (named, doubt) = self.steps(), self._pointer()
        if named is None and not (self.folder / "latest").exists():
            return self.folder / self.name(steps[-1]) if steps else None  # killed before `latest` was written
        if named is None:
            raise self._lost(doubt)
        return self.folder / self.name(named)

    def candidates(self) -> Candidates:
        """What to resume from: what `latest` names, then what is older; where `latest` says nothing, all, by step.

        Raises:
            CheckpointError: `latest` says that there was a checkpoint, and there is none.
        """
        steps, (named, doubt) = self.steps(), self._pointer()
        if not steps and (self.folder / "latest").exists():
            raise self._lost(doubt)
        order = [step for step in reversed(steps) if named is None or step <= named]
        return Candidates([self.folder / self.name(step) for step in order], doubt if steps else "")

    def _pointer(self) -> tuple[int | None, str]:
        """The step that `latest` names, or None and what is wrong with it.

        Raises:
            CheckpointError: checkpoints/ is a link to what is not there: a disk that is not mounted, say.
        """
        if self.folder.is_symlink() and not self.folder.exists():
            raise CheckpointError(
                f"{self.folder} leads to {self.folder.readlink()}, which is not there",
                "mount that disk or restore that folder; make it, empty, only for a run that has no checkpoints",
            )
        pointer = self._pointer_file()
        try:
            with pointer.open("rb") as stream:
                text = stream.read(100).decode("ascii", "backslashreplace").strip()
        except FileNotFoundError:
            return None, f"{pointer} is missing"
        except OSError as error:
            return None, f"{pointer} cannot be read: {error.strerror}"
        step = step_of(text)
        if step not in self.steps():
            replaced = self.folder / f"replaced-{text}"
            if step is not None and replaced.is_dir():
                return None, f"{pointer} names {text}, a kill in the midst of a save left it as {replaced}: rename it"
            return None, f"{pointer} names {text if text.isprintable() else ascii(text)}, which is not there"
        return step, ""

    def _pointer_file(self) -> Path:
        """`latest`; or, where it was written later, that of a checkpoint whose publication a kill has cut short."""
        return max([self.folder / "latest", *self.folder.glob(f"step_*/{POINTER}")], key=_written_at)

    def _lost(self, doubt: str) -> CheckpointError:
        present = ", ".join(self.name(step) for step in self.steps()) or "none"
        return CheckpointError(
            f"{doubt}; present: {present}",
            f"restore the folder, or write one of the present names into {self.folder / 'latest'}",
        )

    def discard_incomplete(self) -> None:
        """Remove what earlier, interrupted saves left.

        Raises:
            EnvironmentFault: another start has taken the folder over; so do all methods that change it.
        """
        control.refuse_if_replaced(self.folder.parent)
        for path in self.folder.glob(".incomplete-*") if self.folder.is_dir() else []:
            _delete(path)

    def publish(
        self, step: int, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], token: str = ""
    ) -> Path:
        """Make the incomplete checkpoint of `step` the newest one; `files` as `hash_files` returned them."""
        source, target = self.folder / self.incomplete_name(step, token), self.folder / self.name(step)
        values = {
            "step": step,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
            "files": dict(sorted(files.items())),
        }
        write_file(source / MANIFEST, encode_manifest(values))
        # Written before anything is renamed: a disk that is full must not leave a checkpoint that `latest` disowns.
        write_file(source / POINTER, f"{target.name}\n".encode())
        sync_folder(source)
        control.refuse_if_replaced(self.folder.parent)
        replaced = None
        if target.exists():  # the same step again, after an older one was resumed by hand or a spike undone
            # Under a name that counts for nothing, but stays: a kill before the next renaming must not lose both.
            replaced = self._set_aside(target.name, f"replaced-{target.name}")
        self._abandon_after(step)
        os.rename(source, target)
        sync_folder(self.folder)
        os.replace(target / POINTER, self.folder / "latest")
        sync_folder(self.folder)
        if replaced is not None:
            # Last: it may take long, and a kill meanwhile must find the new one in its place.
            _delete(self._hide(replaced))
        return target

    def fall_back(self, chosen: Path, damaged: Iterable[Path]) -> None:
        """Make `chosen` the one that is resumed; the damaged ones get another name and are kept."""
        control.refuse_if_replaced(self.folder.parent)
        write_file(self.folder / "latest", f"{chosen.name}\n".encode())
        for path in damaged:
            self._set_aside(path.name, f"damaged-{path.name}")
        sync_folder(self.folder)

    def go_back_to(self, step: int) -> None:
        """Make the published checkpoint of `step` the one that is resumed, and set later ones aside."""
        control.refuse_if_replaced(self.folder.parent)
        write_file(self.folder / "latest", f"{self.name(step)}\n".encode())
        self._abandon_after(step)
        sync_folder(self.folder)

    def leave_branch(self, step: int) -> None:
        """Set aside what is later than `step`, from which a start now goes on."""
        if any(later > step for later in self.steps()):
            self.go_back_to(step)

    def _abandon_after(self, step: int) -> None:
        """Checkpoints of a branch that was left by going back are kept, but no longer counted or resumed."""
        for later in self.steps():
            if later > step:
                self._set_aside(self.name(later), f"abandoned-{self.name(later)}-at-{step}")

    def _set_aside(self, name: str, aside: str) -> Path:
        """Rename a checkpoint and return where it is; one that was set aside under that name before stays."""
        number, free = 1, aside
        while (self.folder / free).exists():
            number, free = number + 1, f"{aside}-{number + 1}"
        os.rename(self.folder / name, self.folder / free)
        return self.folder / free

    def kept(self, config: CheckpointConfig) -> dict[int, list[str]]:
        """Why each checkpoint is kept, oldest first; one without a reason may be removed.

        A checkpoint whose manifest or sizes are wrong counts as none of the last or best, and is kept: somebody may
        want to look at it. Contents are not read here.
        """
        reasons: dict[int, list[str]] = {step: [] for step in self.steps()}
        whole: dict[int, float | None] = {}
        for step in reversed(reasons):
            try:
                manifest = read_manifest(self.folder / self.name(step))
                intact = not damage(self.folder / self.name(step), manifest, hashes=False)
            except CheckpointError:
                intact = False
            if intact:
                whole[step] = manifest.get("validation_loss")
            else:
                reasons[step].append("damaged")
        for step in list(whole)[: config.keep_last]:
            reasons[step].append("last")
        for step in whole:
            if config.keep_every_steps and step % config.keep_every_steps == 0:
                reasons[step].append(f"every {config.keep_every_steps:,}")
        validated = [(loss, -step) for step, loss in whole.items() if loss is not None]
        for _, negative in heapq.nsmallest(config.keep_best, validated):
            reasons[-negative].append("best")
        return reasons

    def prune(self, config: CheckpointConfig) -> None:
        """Remove the checkpoints that no field of the configuration keeps; never the newest whole one."""
        for step, reasons in self.kept(config).items():
            if not reasons:
                _delete(self._hide(self.folder / self.name(step)))
            elif "damaged" in reasons:
                log.warning("%s is damaged; it is kept, and not counted", os.fspath(self.folder / self.name(step)))

    def _hide(self, checkpoint: Path) -> Path:
        """Take its name: a removal that is cut short leaves nothing that looks whole."""
        return self._set_aside(checkpoint.name, f".incomplete-{checkpoint.name}-removed")


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # not there; what else there is to say, opening it says
        return 0


def _delete(path: Path) -> None:
    """Remove a folder that nothing counts any more; where that fails, say so: the next save tries again."""
    try:
        if path.is_symlink():  # a checkpoint that was moved to another disk: what it leads to is not ours to remove
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", os.fspath(path), error.strerror or error)


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, or None where it is no such name."""
    match = re.fullmatch(r"step_([0-9]{8}|[1-9][0-9]{8,18})", name)
    return int(match[1]) if match else None


def is_run_folder(folder: Path) -> bool:
    """Whether a run has been started there: it has a configuration, or checkpoints.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    return (folder / "config.yaml").exists() or CheckpointStore(folder).latest() is not None


def checkpointed_step(status: Mapping[str, Any]) -> int:
    """The last step at which, as status.json says, there was a checkpoint; 0 where it tells of none.

    A start that ended as it should has saved, and one that began behind step 0 had a checkpoint. Of one that failed,
    what was known before is in a key of its own.
    """
    return int((status.get("checkpoint") if status["status"] == "failed" else status["step"]) or 0)


def checkpoint_at(path: str | Path) -> Path:
    """The checkpoint that a user names: a run folder, of which it is the newest, or the folder of a checkpoint.

    Raises:
        ConfigError: no such folder.
        CheckpointError: neither; or `latest` names a checkpoint that is not there.
    """
    folder = Path(path)
    fix = (
        "give a run folder (with checkpoints/ in it) or one checkpoint folder; generate and eval also take an exported "
        "folder (with config.json in it)"
    )
    require_folder(folder, fix)
    if not (folder / "checkpoints").is_dir() and ((folder / MANIFEST).exists() or step_of(folder.name)):
        checkpoint = folder if folder.is_dir() else None
    else:
        checkpoint = CheckpointStore(folder).latest()
    if checkpoint is None:
        what = " but an exported model" if (folder / "config.json").exists() else ""
        raise CheckpointError(f"{folder} holds no checkpoint{what}", fix)
    return checkpoint


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, relative, sorted."""
    paths = (path for path in folder.rglob("*") if path != folder / MANIFEST and (path.is_file() or path.is_symlink()))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, which is flushed to disk first."""
    table = {}
    for name in names:
        sync_file(folder / name)
        table[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    return table


def damage(
    checkpoint: Path,
    manifest: Mapping[str, Any],
    names: Iterable[str] | None = None,
    hashes: bool = True,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, as `name: what`; nothing in them is interpreted.

    Args:
        names: the share of the files to look at; all of them, and what is there besides, where it is None.
        hashes: whether to read the files, not only their sizes.
        on_bytes: is told of bytes that were read.

    Raises:
        CheckpointError: not allowed to read a file.
    """
    files = manifest["files"]
    found = []
    for name in files if names is None else names:
        try:
            what = _wrong_with(checkpoint, name, files[name], hashes, on_bytes)
        except PermissionError as error:
            raise CheckpointError(
                f"cannot read {checkpoint / name}: {error.strerror}", "give permission to read it"
            ) from None
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
        if what:
            found.append(f"{name}: {what}")
    return found + unlisted(checkpoint, manifest) if names is None else found


def unlisted(checkpoint: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are no part of the checkpoint, as `name: what`: DeepSpeed reads what its patterns find, listed or not.

    Hidden ones, which file systems make, its patterns do not find. Of a checkpoint in one form, files of the other are
    read by nobody: a `loopmem checkpoint reshape` that was killed has left them.
    """
    merged = "form" in manifest
    found = []
    for name in list_files(checkpoint):
        other_form = name.endswith("_states.pt") if merged else name.startswith("merged/")
        if name not in manifest["files"] and not other_form and not Path(name).name.startswith("."):
            found.append(f"{name}: not listed in {MANIFEST}")
    return found


def _wrong_with(
    checkpoint: Path, name: str, expected: Mapping[str, Any], hashes: bool, on_bytes: Callable[[int], None]
) -> str:
    path = checkpoint / name
    if any((checkpoint / part).is_symlink() for part in [Path(name), *Path(name).parents][:-1]):
        return "reached through a symbolic link, which may lead anywhere"
    if not path.is_file():
        return "no plain file" if path.exists() else "missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{size:,} bytes, expected {expected['bytes']:,}"
    if hashes and sha256_file(path, on_bytes) != expected["sha256"]:
        return "content differs from its recorded hash"
    return ""


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: existence, size, hash; `names` limits it to a share of the files.

    Raises:
        DamagedCheckpoint: naming every file that is missing, differs or is not listed, and an older whole checkpoint.
        CheckpointError: not allowed to read a file.
    """
    try:
        wrong = damage(checkpoint, read_manifest(checkpoint), names)
        if wrong:
            raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged:\n    " + "\n    ".join(wrong))
    except DamagedCheckpoint as error:
        older = _whole_before(checkpoint)
        other = f"use {older}, which is older and whole" if older else "use another checkpoint"
        raise DamagedCheckpoint(error.problem, f"restore the files, or {other}") from None


def _whole_before(checkpoint: Path) -> Path | None:
    """The newest whole checkpoint beside and before this one; reads all its files."""
    newest, store = step_of(checkpoint.name), CheckpointStore(checkpoint.parent.parent)
    if newest is None or checkpoint.parent != store.folder:
        return None
    for step in reversed([step for step in store.steps() if step < newest]):
        path = store.folder / store.name(step)
        try:
            if not damage(path, read_manifest(path)):
                return path
        except CheckpointError:
            continue
    return None
