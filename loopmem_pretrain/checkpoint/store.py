"""Checkpoint folders that are whole or not there.

    RUN/checkpoints/
      latest                     name of the newest whole checkpoint, replaced atomically
      step_00000500/             DeepSpeed's files, config.yaml, and manifest.json with every file's size and hash
      .incomplete-step_00001000  being written, or left by a run that died; never read, removed by the next save

Written to `.incomplete-...`, flushed to disk, renamed, then `latest` moves: a reader never meets half of one.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loopmem_pretrain.data.files import sha256_file, sync_file, sync_folder, write_file
from loopmem_pretrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "loopmem-checkpoint", 1


class CheckpointStore:
    """The checkpoints of one run folder. Every method is local; the caller decides which rank calls it."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def name(self, step: int) -> str:
        return f"step_{step:08d}"

    def incomplete_name(self, step: int) -> str:
        return f".incomplete-{self.name(step)}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        found = self.folder.glob("step_*") if self.folder.is_dir() else []
        return sorted(int(path.name.removeprefix("step_")) for path in found if path.is_dir())

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None when the run has none.

        Raises:
            CheckpointError: `latest` names a checkpoint that is not there.
        """
        pointer = self.folder / "latest"
        if not pointer.exists():
            steps = self.steps()  # a run killed between the rename and the move of `latest`
            return self.folder / self.name(steps[-1]) if steps else None
        path = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not path.is_dir():
            others = ", ".join(self.name(step) for step in self.steps()) or "none"
            raise CheckpointError(
                f"{pointer} names {path.name}, which is not there; present: {others}",
                f"restore the folder, or write one of the present names into {pointer}",
            )
        return path

    def discard_incomplete(self) -> None:
        """Remove what earlier, interrupted saves left."""
        for path in self.folder.glob(".incomplete-*") if self.folder.is_dir() else []:
            shutil.rmtree(path)

    def publish(self, step: int, files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
        """Make the incomplete checkpoint of `step` the newest one; `files` as `hash_files` returned them."""
        source, target = self.folder / self.incomplete_name(step), self.folder / self.name(step)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, **facts, "files": dict(sorted(files.items()))}
        write_file(source / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        sync_folder(source)
        if target.exists():
            self._remove(target)  # the same step trained again after an older checkpoint was resumed by hand
        self._abandon_after(step)
        os.rename(source, target)
        sync_folder(self.folder)
        write_file(self.folder / "latest", f"{target.name}\n".encode())
        return target

    def go_back_to(self, step: int) -> None:
        """Make the published checkpoint of `step` the one that is resumed, and set later ones aside."""
        write_file(self.folder / "latest", f"{self.name(step)}\n".encode())
        self._abandon_after(step)
        sync_folder(self.folder)

    def _abandon_after(self, step: int) -> None:
        """Checkpoints of a branch that was left by going back are kept, but no longer counted or resumed.

        Of branches left at the same step the last is kept.
        """
        for later in self.steps():
            if later > step:
                aside = self.folder / f"abandoned-{self.name(later)}-at-{step}"
                if aside.exists():
                    self._remove(aside)
                os.rename(self.folder / self.name(later), aside)

    def prune(self, keep_last: int) -> None:
        """Remove all but the newest `keep_last` checkpoints."""
        for step in self.steps()[:-keep_last]:
            self._remove(self.folder / self.name(step))

    def _remove(self, checkpoint: Path) -> None:
        """First the name, then the content: a removal that is cut short leaves nothing that looks whole."""
        doomed = checkpoint.with_name(f".incomplete-{checkpoint.name}-removed")
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, relative, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, which is flushed to disk first."""
    table = {}
    for name in names:
        sync_file(folder / name)
        table[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    return table


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint.

    Raises:
        CheckpointError: no manifest, not ours, or of a newer version.
    """
    path = checkpoint / MANIFEST
    fix = "resume from another checkpoint by writing its name into the `latest` file beside it"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", fix) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", fix) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} is no manifest of this format (expected {FORMAT} version {VERSION})", fix)
    return manifest


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: existence, size, hash; `names` limits it to a share of the files.

    Raises:
        CheckpointError: naming every file that is missing or differs.
    """
    files = read_manifest(checkpoint)["files"]
    damaged = []
    for name in files if names is None else names:
        expected, path = files[name], checkpoint / name
        if not path.is_file():
            damaged.append(f"{name}: missing")
        elif path.stat().st_size != expected["bytes"]:
            damaged.append(f"{name}: {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif hash_files(checkpoint, [name])[name]["sha256"] != expected["sha256"]:
            damaged.append(f"{name}: content differs from its recorded hash")
    if damaged:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged:\n    " + "\n    ".join(damaged),
            "restore the files, or resume from an older checkpoint by writing its name into "
            f"{checkpoint.parent / 'latest'}",
        )
