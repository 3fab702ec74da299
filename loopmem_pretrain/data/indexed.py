"""One split of a prepared folder as one long stream of tokens.

A split is its shards' .bin files one after the other. Each shard is opened through megatron-core's `IndexedDataset`,
the owner of the format: its class reads the .idx header, so a folder that opens here opens in Megatron too, and a
change of the format shows up here as an error. What Megatron does not check (that documents follow each other in the
.bin without gaps, that counts are the manifest's) is checked here once, at opening. After that a read is one `preadv`,
not a memory map: it lets other Python threads run while the disk works, and a file cut short under the run is an error
with a name instead of a bus error.

The import of megatron.core takes 4-5 s, so it happens when the first stream is opened.
"""

import errno
import os
import resource
import struct
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopmem_pretrain.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    SplitName,
    again,
    load_manifest,
    verify_shards,
)
from loopmem_pretrain.errors import DataError, EnvironmentFault

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_OTHER_FILES = 512
"""That a process has open besides shards: libraries, sockets to other ranks, logs."""


class TokenStream:
    """Random access to the tokens of one split, from any thread.

    Args:
        folder: written by `loopmem prepare-data`.
        split: `train` or `validation`.
        manifest: of that folder when it is loaded already.
        check_indexes: whether to compare the shards' indexes with the manifest, for which megatron-core is imported.

    Raises:
        DataError: a file is missing, truncated or not what the manifest says (file, expected, found), or the
            split holds no token.
    """

    def __init__(
        self, folder: str | Path, split: SplitName, manifest: Manifest | None = None, check_indexes: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = manifest or load_manifest(folder)
        self.manifest_sha256 = sha256((self.folder / MANIFEST_NAME).read_bytes()).hexdigest()
        shards = self.manifest.splits[split].shards
        if not shards:
            raise DataError(
                f"{self.folder}: the {split} split is empty",
                "prepare the folder again with a larger validation_fraction"
                if split == "validation"
                else "prepare the folder again from sources that hold text",
            )
        verify_shards(self.folder, self.manifest, hashes=False)
        self._item_size = 2 if self.manifest.dtype == "uint16" else 4
        for shard in shards if check_indexes else ():
            self._check_index(shard)
        _allow_open_files(len(shards))
        self._files = [_File(self.folder / f"{shard.prefix}.bin") for shard in shards]
        self._starts = [0, *accumulate(shard.tokens for shard in shards)]  # of each shard in the stream, and the end

    def __len__(self) -> int:
        """Tokens in the split."""
        return self._starts[-1]

    def read(self, start: int, count: int) -> "NDArray[np.int64]":
        """A copy of tokens start ... start + count - 1, across shard borders; int64 [count].

        Raises:
            IndexError: the range leaves the stream.
            DataError: a shard has become shorter since it was opened.
        """
        import numpy as np

        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(
                f"{self.folder}: tokens {start}...{start + count - 1} of {len(self)} in the {self.split} split"
            )
        tokens = np.empty(count, dtype=self.manifest.dtype)
        shard, done = bisect_right(self._starts, start) - 1, 0
        while done < count:
            offset = start + done - self._starts[shard]
            size = min(count - done, self._starts[shard + 1] - self._starts[shard] - offset)
            self._files[shard].read_into(tokens[done : done + size], offset * self._item_size)
            done += size
            shard += 1
        return tokens.astype(np.int64)

    def documents(self) -> "Iterator[NDArray[np.int64]]":
        """The tokens of each document, in order; int64 [its length, with its end-of-document token].

        Raises:
            DataError: a shard has become shorter since it was opened.
        """
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for shard, start in zip(self.manifest.splits[self.split].shards, self._starts, strict=False):
            opened = IndexedDataset(str(self.folder / shard.prefix))  # its arrays are gone from memory when it is
            for length in opened.sequence_lengths.tolist():
                yield self.read(start, length)
                start += length

    def _check_index(self, shard: Shard) -> None:
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        prefix = self.folder / shard.prefix
        try:
            opened = IndexedDataset(str(prefix))
            index, lengths = opened.index, opened.sequence_lengths
            ends = np.cumsum(lengths, dtype=np.int64)
            pointers = index.sequence_pointers
            gapless = not pointers[0] and np.array_equal(pointers[1:], ends[:-1] * self._item_size)
        except (AssertionError, ValueError, IndexError, OverflowError, OSError, struct.error) as error:
            raise DataError(f"{prefix}.idx is not a readable Megatron index: {error}", again(self.folder)) from error
        for what, expected, found in (
            ("token dtype", self.manifest.dtype, np.dtype(index.dtype).name),
            ("tokens", shard.tokens, int(ends[-1])),
            ("documents", shard.documents, len(opened.document_indices) - 1),
            ("documents without gaps", True, gapless and int(lengths.min()) >= 0),
        ):
            if expected != found:
                problem = f"{prefix}.idx: {what}: expected {expected} (manifest), found {found}"
                raise DataError(problem, again(self.folder))


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as it may itself, where `count` more come near it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * count + _OTHER_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _File:
    """A .bin file, open as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            advice = "allow reading it, then try again"
            if error.errno == errno.EMFILE:
                advice = "a process holds every shard open: raise its limit of open files (ulimit -n, LimitNOFILE)"
            raise DataError(f"{path} cannot be opened: {error.strerror}", advice) from error
        weakref.finalize(self, os.close, self.descriptor)

    def read_into(self, tokens: "NDArray[Any]", position: int) -> None:
        """Fill `tokens` with the bytes from `position` on."""
        rest = tokens.data.cast("B")
        while rest:
            try:
                count = os.preadv(self.descriptor, [rest], position)
            except OSError as error:
                raise EnvironmentFault(
                    f"{self.path} cannot be read at byte {position}: {error.strerror}",
                    "see to its disk, then start the same command again to resume",
                ) from error
            if not count:
                problem = f"{self.path} ends at byte {position}: it was cut short after it was opened"
                raise DataError(problem, again(self.path.parent))
            rest, position = rest[count:], position + count
