"""One process at a time in a folder. The system drops the lock when the process ends, however it ends."""

import fcntl
from pathlib import Path
from typing import BinaryIO

from loopmem_pretrain.errors import EnvironmentFault


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; false where the file is not there or its file system has no locks."""
    try:
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def take_lock(path: Path, busy: str, fix: str) -> BinaryIO:
    """Lock the file (made if absent); held until the returned stream is closed or the process ends.

    Raises:
        EnvironmentFault: another process holds it, `busy` says what that means and `fix` what to do; or the file system
            offers no locks.
        OSError: the file cannot be opened.
    """
    stream = path.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise EnvironmentFault(busy, fix) from None
    except OSError as error:
        stream.close()
        raise EnvironmentFault(
            f"cannot lock {path}: {error.strerror}: its file system has no locks, and two processes could write there",
            "choose a folder on a file system with flock (on Lustre: mounted with -o flock)",
        ) from None
    return stream
