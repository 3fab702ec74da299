"""Writes token shards in Megatron's indexed format, each under its name only when it is whole."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from loopmem_pretrain.data.files import disk_faults, sha256_file, sync_file, sync_folder
from loopmem_pretrain.data.manifest import DTypeName, Shard, SplitName
from loopmem_pretrain.data.workers import Tokens

_SHARD_FILE = re.compile(r"^(\.tmp-)?(train|validation)-\d{5,}\.(bin|idx)$")


class ShardWriter:
    """The shards of one split, one after the other; a shard is open from its first document on.

    Args:
        folder: where they go.
        split: first part of their names.
        dtype: type of a token.
        index: number of the next shard.
    """

    def __init__(self, folder: Path, split: SplitName, dtype: DTypeName, index: int) -> None:
        self.folder = folder
        self.split = split
        self.dtype = np.dtype(dtype).type
        self.index = index
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self._builder: Any = None

    def add(self, tokens: Tokens) -> None:
        """Append documents to the open shard.

        Raises:
            EnvironmentFault: disk full, no permission.
        """
        with disk_faults(self._temporary("bin")):
            if self._builder is None:
                self._builder = _builder_class()(str(self._temporary("bin")), dtype=self.dtype)
            begin = 0
            for length in tokens.lengths:
                self._builder.add_document(tokens.ids[begin : begin + length], [length])
                begin += length
        self.tokens += begin
        self.documents += len(tokens.lengths)
        self.text_bytes += tokens.text_bytes

    def close(self) -> Shard | None:
        """Finish the open shard and give it its name; None if there is none.

        Raises:
            EnvironmentFault: disk full, no permission.
        """
        if self._builder is None:
            return None
        prefix = f"{self.split}-{self.index:05d}"
        facts: dict[str, Any] = {}
        with disk_faults(self.folder / f"{prefix}.bin"):
            self._builder.finalize(str(self._temporary("idx")))
            for suffix in ("bin", "idx"):
                sync_file(self._temporary(suffix))
                facts[f"{suffix}_bytes"] = self._temporary(suffix).stat().st_size
                facts[f"{suffix}_sha256"] = sha256_file(self._temporary(suffix))
            for suffix in ("bin", "idx"):
                os.replace(self._temporary(suffix), self.folder / f"{prefix}.{suffix}")
            sync_folder(self.folder)
        shard = Shard(prefix=prefix, documents=self.documents, tokens=self.tokens, **facts)
        self.index += 1
        self.tokens = self.documents = self.text_bytes = 0
        self._builder = None
        return shard

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".tmp-{self.split}-{self.index:05d}.{suffix}"


def _builder_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import tells at length which GPU libraries it misses
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder


def shard_files(folder: Path) -> list[Path]:
    """Files in `folder` that are named like shards, or like unfinished ones."""
    return sorted(path for path in folder.iterdir() if _SHARD_FILE.match(path.name)) if folder.is_dir() else []


def remove_unlisted(folder: Path, shards: list[Shard]) -> None:
    """Remove shards, whole or not, that no journal vouches for: what a killed run wrote after its last entry."""
    listed = {f"{shard.prefix}.{suffix}" for shard in shards for suffix in ("bin", "idx")}
    with disk_faults(folder):
        for path in shard_files(folder):
            if path.name not in listed:
                path.unlink()
