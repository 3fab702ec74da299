"""Small prepared folders, written with megatron-core's own builder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from loopmem_pretrain.data.files import sha256_file
from loopmem_pretrain.data.manifest import (
    Counts,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    token_dtype,
    write_manifest,
)

Documents = Sequence[Sequence[int]]
WriteFolder = Callable[..., Path]


def _write_shard(folder: Path, prefix: str, documents: Documents, dtype: type) -> Shard:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / f"{prefix}.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(folder / f"{prefix}.idx"))
    paths = folder / f"{prefix}.bin", folder / f"{prefix}.idx"
    return Shard(
        prefix=prefix,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        bin_bytes=paths[0].stat().st_size,
        idx_bytes=paths[1].stat().st_size,
        bin_sha256=sha256_file(paths[0]),
        idx_sha256=sha256_file(paths[1]),
    )


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """`write_folder(name, train=[shard, ...], validation=[...])`; a shard is a list of documents, lists of ids."""

    def write(
        name: str,
        train: Sequence[Documents] = (),
        validation: Sequence[Documents] = (),
        vocab_size: int = 1000,
        tokenizer: str = "pieces",
        eos_id: int = 0,
    ) -> Path:
        folder = tmp_path / name
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.model").write_text(tokenizer)
        dtype = token_dtype(vocab_size)
        splits = {}
        for split, shards in (("train", train), ("validation", validation)):
            records = tuple(
                _write_shard(folder, f"{split}-{i:05d}", shard, getattr(np, dtype)) for i, shard in enumerate(shards)
            )
            splits[split] = Split(
                documents=sum(r.documents for r in records),
                tokens=sum(r.tokens for r in records),
                text_bytes=0,
                shards=records,
            )
        record = TokenizerRecord(
            kind="sentencepiece",
            file="tokenizer/tokenizer.model",
            sha256=sha256_file(folder / "tokenizer" / "tokenizer.model"),
            vocab_size=vocab_size,
            bos_id=None,
            eos_id=eos_id,
            pad_id=None,
            unk_id=None,
        )
        kept = sum(split.documents for split in splits.values())
        counts = Counts(
            documents_read=kept, broken_lines=0, empty_documents=0, filtered_documents=0, documents_kept=kept
        )
        manifest = Manifest(
            tokenizer=record, dtype=dtype, splits=splits, source=(), license="CC0", counts=counts, recipe={}
        )
        write_manifest(folder, manifest)
        return folder

    return write
