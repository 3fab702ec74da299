"""A folder that appears whole or not at all."""

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopmem_pretrain.data.files import disk_faults, sync_file, sync_folder
from loopmem_pretrain.errors import ConfigError

WRITTEN = (
    "README.md",
    "config.json",
    "generation_config.json",
    "configuration_loopmem.py",
    "modeling_loopmem.py",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Names an export may write; `overwrite` replaces a folder only where all its files are among them."""

UNROLLED_MARK = "loopmem_unrolled"
"""Key of config.json that tells an export of a dense model from other models of that kind."""


def check_destination(out_dir: str | Path, overwrite: bool) -> Path:
    """The absolute path an export will get.

    Raises:
        ConfigError: it is a file, holds something without `overwrite`, or holds what no export wrote.
    """
    target = Path(out_dir).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file", "name a folder to export into")
    found = sorted(item.name for item in target.iterdir()) if target.is_dir() else []
    if not found:
        return target
    if not overwrite:
        what, fix = "is not empty", "name a new folder"
        if _is_export(target):
            what, fix = "holds an exported model", "name a new folder, or replace it with --overwrite"
        raise ConfigError(f"{target} {what}: {_some(found)}", fix)
    if not _is_export(target):
        raise ConfigError(
            f"{target} is no exported loopmem model (its config.json does not say so): {_some(found)}",
            "name a new folder; only an earlier export is overwritten",
        )
    foreign = [name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in WRITTEN)]
    if foreign:
        raise ConfigError(
            f"{target} holds an exported model and files that no export writes: {_some(foreign)}",
            "move them away, or name a new folder",
        )
    return target


@contextmanager
def staged(out_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out_dir` that takes its name when the block ends, and vanishes when it raises.

    Raises:
        ConfigError: as check_destination, which runs first.
        EnvironmentFault: disk full, no permission.
    """
    target = check_destination(out_dir, overwrite)
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        with disk_faults(target):
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)  # mkdtemp's folders are for the owner's eyes only
        yield folder
        with disk_faults(target):
            for path in folder.iterdir():
                sync_file(path)
            sync_folder(folder)
            _replace(folder, check_destination(target, overwrite))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already unless something above failed


def _replace(folder: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(folder, target)  # an empty folder is replaced as if it were not there
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.replace(target, old)
        try:
            os.replace(folder, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old)
    sync_folder(target.parent)


def _is_export(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(values, dict) and (values.get("model_type") == "loopmem" or UNROLLED_MARK in values)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
