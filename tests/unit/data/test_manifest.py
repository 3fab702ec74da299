"""manifest.json: round trip, every kind of damage, and shards that do not match it."""

import json
from pathlib import Path
from typing import Any

import pytest

from loopmem_pretrain.data.files import sha256_file
from loopmem_pretrain.data.manifest import (
    Counts,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    load_manifest,
    token_dtype,
    verify_shards,
    write_manifest,
)
from loopmem_pretrain.errors import DataError, EnvironmentFault

ZERO = "0" * 64


def make(folder: Path) -> Manifest:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer/tokenizer.model").write_bytes(b"pieces")
    (folder / "train-00000.bin").write_bytes(bytes(8))
    (folder / "train-00000.idx").write_bytes(bytes(50))
    shard = Shard(
        prefix="train-00000",
        documents=1,
        tokens=4,
        bin_bytes=8,
        idx_bytes=50,
        bin_sha256=sha256_file(folder / "train-00000.bin"),
        idx_sha256=sha256_file(folder / "train-00000.idx"),
    )
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            kind="sentencepiece",
            file="tokenizer/tokenizer.model",
            sha256=sha256_file(folder / "tokenizer/tokenizer.model"),
            vocab_size=1000,
            bos_id=1,
            eos_id=2,
            pad_id=None,
            unk_id=0,
        ),
        dtype="uint16",
        splits={
            "train": Split(documents=1, tokens=4, text_bytes=9, shards=(shard,)),
            "validation": Split(documents=0, tokens=0, text_bytes=0, shards=()),
        },
        source=(),
        license="CC0",
        counts=Counts(documents_read=1, broken_lines=0, empty_documents=0, filtered_documents=0, documents_kept=1),
        recipe={"output_dir": "x"},
    )
    write_manifest(folder, manifest)
    return manifest


def change(folder: Path, **values: Any) -> None:
    """Overwrite keys (dots as __) of the written manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for dotted, value in values.items():
        *parents, name = dotted.split("__")
        target = content
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else target[parent]
        target[name] = value
    path.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_manifest(folder)
    assert caught.value.fix
    assert str(folder) in caught.value.problem
    return caught.value.problem


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path / "d")
    assert load_manifest(tmp_path / "d") == manifest
    verify_shards(tmp_path / "d", manifest, hashes=True)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "manifest.json", "tokenizer", "train-00000.bin", "train-00000.idx",
    ]  # fmt: skip


def test_dtype_rule() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == ("uint16", "int32")


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_no_manifest(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path)


def test_cut_off(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:-40])
    assert "cut off" in refused(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("")
    assert "cut off" in refused(tmp_path)


def test_binary(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path)


def test_other_format(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[1]")
    assert "format" in refused(tmp_path)


def test_other_version(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, version=2)
    assert "version: 2 is not 1" in refused(tmp_path)


def test_missing_key_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    del content["tokenizer"]["eos_id"]
    path.write_text(json.dumps(content))
    assert "tokenizer.eos_id: missing" in refused(tmp_path)


def test_wrong_type_shows_the_value(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, counts__documents_read="many")
    assert "counts.documents_read" in (message := refused(tmp_path))
    assert "'many'" in message


def test_prefix_cannot_leave_the_folder(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, splits__train__shards__0__prefix="../train-00000")
    assert "splits.train.shards.0.prefix" in refused(tmp_path)


def test_tokenizer_cannot_leave_the_folder(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, tokenizer__file="../tokenizer.model")
    assert "leads out of the folder" in refused(tmp_path)


def test_totals_must_add_up(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, splits__train__tokens=5)
    assert "splits.train says 5, its shards add up to 4" in refused(tmp_path)


def test_dtype_must_fit_the_vocabulary(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, dtype="int32")
    assert "does not belong to vocab_size 1000" in refused(tmp_path)


def test_missing_and_short_shards_are_all_named(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / "train-00000.idx").unlink()
    (tmp_path / "train-00000.bin").write_bytes(bytes(6))
    with pytest.raises(DataError) as caught:
        verify_shards(tmp_path, manifest, hashes=False)
    assert "train-00000.idx: missing" in caught.value.problem
    assert "train-00000.bin: 6 bytes, expected 8" in caught.value.problem


def test_a_flipped_bit_is_found_by_hash_only(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / "train-00000.bin").write_bytes(bytes(7) + b"\1")
    verify_shards(tmp_path, manifest, hashes=False)
    with pytest.raises(DataError, match="sha256"):
        verify_shards(tmp_path, manifest, hashes=True)


def test_unwritable_place(tmp_path: Path) -> None:
    manifest = make(tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault) as caught:
        write_manifest(tmp_path / "file" / "sub", manifest)
    assert caught.value.fix
