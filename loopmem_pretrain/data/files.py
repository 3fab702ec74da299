"""Files that are either whole or absent, and operating system errors that say what to do.

A file is written under a temporary name, flushed to the disk and renamed: a reader, or a run that comes after a
kill, never meets half of one.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopmem_pretrain.errors import ConfigError, EnvironmentFault

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_faults(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes at `path`, into an EnvironmentFault naming the file and the cure.

    Raises:
        EnvironmentFault: disk full, quota or file size limit reached, no permission, or any other disk error.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise EnvironmentFault(
                f"no room to write {where}: {reason}",
                "free space or raise the quota (or `ulimit -f`), then run the same command again: it continues",
            ) from error
        if error.errno in _FORBIDDEN:
            raise EnvironmentFault(
                f"not allowed to write {where}: {reason}", "choose a folder you may write to, or change its permissions"
            ) from error
        raise EnvironmentFault(
            f"cannot write {where}: {reason}", "check the disk and the path, then run the same command again"
        ) from error


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's names (renames, new files) are on the disk."""
    sync_file(folder)


def replace_file(temporary: Path, final: Path) -> None:
    """Give a finished file its name, so that after a power cut the name means the whole file or does not exist."""
    sync_file(temporary)
    os.replace(temporary, final)
    sync_folder(final.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        EnvironmentFault: disk full, no permission.
    """
    # Not the process's number: on another node, or in another container, it may be the same.
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            replace_file(temporary, path)
        except OSError as error:
            error.filename = path  # nobody has named the temporary file
            raise
        finally:
            temporary.unlink(missing_ok=True)


def require_folder(path: str | Path, fix: str) -> None:
    """Refuse a folder named on the command line that is not there; `fix` says which kind to give.

    Raises:
        ConfigError: nothing has that name.
    """
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such folder", fix)


def check_target(path: str | Path) -> None:
    """Refuse before the work what `write_file` would refuse after it, as far as it can be known; makes the folder.

    Raises:
        ConfigError: a folder has that name.
        EnvironmentFault: no permission, or a folder that cannot be made.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", "give the name of a file to write")
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target.parent)


def sha256_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces; `on_bytes` is told the size of each."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
            on_bytes(count)
    return digest.hexdigest()


Progress = Callable[[int, int | None, Mapping[str, Any]], None]
"""Called as (done, total or None where it is unknown, info); info["stage"] says what is being done."""


def silent(done: int, total: int | None, info: Mapping[str, Any]) -> None:
    """A Progress that tells nobody."""
