"""What an unfinished preparation has behind it: a recipe, then one line for each pair of finished shards.

A line is written and flushed to the disk only after its shards are; a line cut off by a kill does not count.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.data.files import disk_faults, sync_folder, write_file
from loopmem_pretrain.data.manifest import Count, Shard, SplitName
from loopmem_pretrain.errors import DataError
from loopmem_pretrain.lock import take_lock

JOURNAL_NAME = ".journal.jsonl"
LOCK_NAME = ".lock"


class SourceFile(Section):
    """A file as it was when the run began."""

    path: str
    """As found by the pattern."""
    bytes: int
    """Size."""
    mtime_ns: int
    """Time of its last change, nanoseconds."""
    sha256: str
    """Hash of its content."""


class Header(Section):
    """First line: what the run makes, and from what."""

    version: int = 1
    """Of the journal."""
    recipe: dict[str, Any]
    """Resolved configuration."""
    tokenizer_sha256: str
    """Hash of the tokenizer's file."""
    eos_id: int | None = None
    """Id that ends a document; unset in journals from before it was written down."""
    files: tuple[tuple[SourceFile, ...], ...]
    """Files of each source, in reading order."""


class Entry(Section):
    """A following line: shards that are whole, and where reading goes on behind them."""

    shards: dict[SplitName, Shard]
    """The shards closed together; a split without documents since the last entry is missing."""
    text_bytes: dict[SplitName, int]
    """UTF-8 bytes of the text behind them."""
    source: int
    """Index of the source to go on with; the number of sources at the end."""
    cursor: tuple[int, int, int, int, int, str]
    """Place in it, a `corpus.Cursor`."""
    documents_read: Count
    """Tally of everything before that place."""
    broken_lines: Count
    """As above."""
    empty_documents: Count
    """As above."""
    filtered_documents: Count
    """As above."""
    broken_examples: tuple[str, ...]
    """First broken lines, `file:line: reason`."""


class Journal:
    """The journal of a folder.

    Raises:
        DataError: it is damaged other than by a last line cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME
        self.header: Header | None = None
        self.entries: list[Entry] = []
        self._size = 0
        content = self.path.read_bytes() if self.path.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # cut off by a kill or a power cut; `append` writes over it
            try:
                if self.header is None:
                    self.header = Header.model_validate_json(line)
                else:
                    self.entries.append(Entry.model_validate_json(line))
            except ValueError as error:
                raise DataError(
                    f"{self.path}:{number}: damaged: {' '.join(str(error).split())[:300]}",
                    f"delete {folder} and prepare it again",
                ) from error
            self._size += len(line)

    def begin(self, header: Header) -> None:
        """Write the first line, whole or not at all."""
        write_file(self.path, header.model_dump_json().encode() + b"\n")
        self.header, self.entries, self._size = header, [], self.path.stat().st_size

    def append(self, entry: Entry) -> None:
        """Add a line; when this returns it survives a power cut.

        Raises:
            EnvironmentFault: disk full, no permission.
        """
        line = entry.model_dump_json().encode() + b"\n"
        with disk_faults(self.path), self.path.open("r+b") as stream:
            stream.truncate(self._size)
            stream.seek(self._size)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._size += len(line)
        self.entries.append(entry)

    def remove(self) -> None:
        """Forget the run: the manifest is there."""
        with disk_faults(self.path):
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make the folder and keep other preparations out of it; the system drops the lock when the process ends.

    Raises:
        EnvironmentFault: another process is preparing this folder; no permission.
    """
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = take_lock(
            folder / LOCK_NAME,
            f"{folder}: another process is preparing this folder",
            "wait for it or stop it; or choose another output_dir",
        )
    with stream:
        yield
