"""A checkpoint rewritten in merged form, so that a start at any sizes reads it without merging first."""

import contextlib
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loopmem_pretrain.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from loopmem_pretrain.checkpoint.safe_load import check_pickles, pickles
from loopmem_pretrain.checkpoint.store import (
    LOCK,
    RUN_ID,
    CheckpointStore,
    checkpoint_at,
    hash_files,
    is_run_folder,
    list_files,
    verify,
)
from loopmem_pretrain.checkpoint.universal import MERGED, is_merged, merge
from loopmem_pretrain.data.files import disk_faults, sync_folder, write_file
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.lock import take_lock

DEEPSPEED_FILES = "*_states.pt"
"""What the merged form replaces; all other files of a checkpoint stay."""


def reshape(path: str | Path, out: str | Path | None = None) -> Path:
    """Rewrite a checkpoint (of a run folder the newest) in merged form, in its place or into the run folder `out`.

    In its place the manifest is replaced in one step: before it the checkpoint is the old one, from then on the new.

    Raises:
        CheckpointError: no checkpoint, damaged, or holding more than weights.
        ConfigError: no such folder, `out` is a run folder already, or a checkpoint outside of one is to be replaced in
            its place.
        EnvironmentFault: a run is training in the folder that would be written, or there is too little space.
    """
    checkpoint = checkpoint_at(path).absolute()  # not resolved: checkpoints/ may be a link, the lock is beside it
    if out is None and not (checkpoint.parent.name == "checkpoints" and (checkpoint.parent.parent / RUN_ID).exists()):
        raise ConfigError(f"{checkpoint} is in no run folder", "give --out a new run folder")
    if out is not None and is_run_folder(Path(out)):
        raise ConfigError(f"{out} is a run folder already", "give --out another folder, or leave it out")
    verify(checkpoint)
    check_pickles(pickles(checkpoint))
    if out is None:
        with not_in_training(checkpoint.parent.parent):
            _in_place(checkpoint)
        return checkpoint
    run_dir = Path(out)
    with disk_faults(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with not_in_training(run_dir):
        return _into(run_dir, checkpoint)


@contextlib.contextmanager
def not_in_training(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, or raise EnvironmentFault where a process trains in it."""
    busy = f"a process is training in the run folder {run_dir}"
    with take_lock(run_dir / LOCK, busy, "wait for it or stop it, or choose another folder"):
        yield


def _in_place(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    if not is_merged(manifest):
        beside, merged = checkpoint.with_name(f".incomplete-{checkpoint.name}-{MERGED}"), checkpoint / MERGED
        for folder in (beside, merged):
            if folder.exists():
                shutil.rmtree(folder)  # of a reshape that was killed
        merge(checkpoint, beside)
        beside.rename(merged)
        for folder in (checkpoint, merged, *merged.iterdir()):
            sync_folder(folder)
        files = hash_files(checkpoint, [*_kept(manifest), *(f"{MERGED}/{name}" for name in list_files(merged))])
        content = {key: value for key, value in manifest.items() if key != "files"} | {"form": MERGED, "files": files}
        write_file(checkpoint / MANIFEST, encode_manifest(content))
    for path in checkpoint.glob(DEEPSPEED_FILES):
        path.unlink()


def _kept(manifest: dict[str, Any]) -> list[str]:
    return [name for name in manifest["files"] if not fnmatch(name, DEEPSPEED_FILES)]


def _into(run_dir: Path, source: Path) -> Path:
    """A new run folder with the checkpoint, and with what makes it the same run."""
    manifest, store = read_manifest(source), CheckpointStore(run_dir)
    step = manifest["step"]
    store.discard_incomplete()
    folder = store.folder / store.incomplete_name(step)
    for name in _kept(manifest):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if not is_merged(manifest):
        merge(source, folder / MERGED)
    hashes = hash_files(folder, list_files(folder))
    for each in (folder / MERGED, *(folder / MERGED).iterdir()):
        sync_folder(each)
    ours = ("format", "version", "step", "files", "sha256")  # what publishing writes itself
    facts = {key: value for key, value in manifest.items() if key not in ours}
    if "run_id" in manifest:
        write_file(run_dir / RUN_ID, f"{manifest['run_id']}\n".encode())
    published = store.publish(step, hashes, facts | {"form": MERGED})
    write_file(run_dir / "config.yaml", (source / "config.yaml").read_bytes())  # last: now it is a run folder
    return published
