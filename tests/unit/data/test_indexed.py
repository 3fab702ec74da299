"""Reading a split back: every token, across shard borders, and every kind of damage named."""

import errno
import gc
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loopmem_pretrain.data.indexed import TokenStream
from loopmem_pretrain.errors import DataError, EnvironmentFault

WriteFolder = Callable[..., Path]
SHARDS = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9, 10], [11, 12]]]


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    return write_folder("data", train=SHARDS, validation=[[[20, 21]]])


def _rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def test_documents_in_order_across_shards(folder: Path) -> None:
    documents = list(TokenStream(folder, "train").documents())
    assert [tokens.tolist() for tokens in documents] == [document for shard in SHARDS for document in shard]
    assert all(tokens.dtype == np.int64 for tokens in documents)


def test_every_range_is_the_same_as_of_one_array(folder: Path) -> None:
    stream = TokenStream(folder, "train")
    everything = np.arange(1, 13)
    assert len(stream) == 12
    for start in range(13):
        for count in range(13 - start):
            tokens = stream.read(start, count)
            assert tokens.dtype == np.int64
            np.testing.assert_array_equal(tokens, everything[start : start + count])


def test_splits_do_not_mix(folder: Path) -> None:
    np.testing.assert_array_equal(TokenStream(folder, "validation").read(0, 2), [20, 21])


def test_a_read_is_a_copy(folder: Path) -> None:
    stream = TokenStream(folder, "train")
    stream.read(0, 3)[:] = 99
    np.testing.assert_array_equal(stream.read(0, 3), [1, 2, 3])


def test_four_byte_tokens(write_folder: WriteFolder) -> None:
    stream = TokenStream(write_folder("big", train=[[[70_000, 2]], [[99_999]]], vocab_size=100_000), "train")
    np.testing.assert_array_equal(stream.read(0, 3), [70_000, 2, 99_999])


def test_two_byte_tokens_are_unsigned(write_folder: WriteFolder) -> None:
    stream = TokenStream(write_folder("wide", train=[[[65_000, 40_000]]], vocab_size=65_400), "train")
    np.testing.assert_array_equal(stream.read(0, 2), [65_000, 40_000])


def test_a_shard_cut_short_under_the_run_is_named(folder: Path) -> None:
    stream = TokenStream(folder, "train")
    os.truncate(folder / "train-00002.bin", 5)
    np.testing.assert_array_equal(stream.read(5, 3), [6, 7, 8])
    with pytest.raises(DataError, match=r"train-00002\.bin ends at byte 5: it was cut short after it was opened"):
        stream.read(5, 5)


def _open_files(folder: Path) -> list[str]:
    descriptors = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    targets = [os.readlink(path) for path in descriptors if path.is_symlink()]
    return sorted(Path(target).name for target in targets if target.startswith(f"{folder}/"))


def test_files_are_closed_with_the_stream(folder: Path) -> None:
    stream = TokenStream(folder, "train")
    assert _open_files(folder) == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]
    del stream
    gc.collect()
    assert _open_files(folder) == []


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 13), (12, 1), (3, -1)])
def test_a_range_outside_is_an_index_error(folder: Path, start: int, count: int) -> None:
    with pytest.raises(IndexError, match="of 12 in the train split"):
        TokenStream(folder, "train").read(start, count)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        TokenStream(tmp_path / "nowhere", "train")


def test_missing_bin(folder: Path) -> None:
    (folder / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin: missing"):
        TokenStream(folder, "train")


def test_missing_idx(folder: Path) -> None:
    (folder / "train-00002.idx").unlink()
    with pytest.raises(DataError, match=r"train-00002\.idx: missing"):
        TokenStream(folder, "train")


def test_truncated_bin_names_both_sizes(folder: Path) -> None:
    path = folder / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00002\.bin: 10 bytes, expected 12"):
        TokenStream(folder, "train")


def test_truncated_idx_names_both_sizes(folder: Path) -> None:
    path = folder / "train-00000.idx"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train-00000\.idx: 74 bytes, expected 82"):
        TokenStream(folder, "train")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Megatron's __del__ of a failed open
def test_garbage_header(folder: Path) -> None:
    path = folder / "train-00000.idx"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"train-00000\.idx is not a readable Megatron index: bad header"):
        TokenStream(folder, "train")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_huge_counts_in_the_header(folder: Path) -> None:
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[18:26] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.idx is not a readable Megatron index"):
        TokenStream(folder, "train")


def test_another_dtype_in_the_header(folder: Path) -> None:
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[17] = 4  # int32 in Megatron's table
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"token dtype: expected uint16 \(manifest\), found int32"):
        TokenStream(folder, "train")


def test_another_token_count_in_the_index(folder: Path) -> None:
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = (2).to_bytes(4, "little")  # first document: 3 tokens
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.idx: tokens: expected 4 \(manifest\), found 3"):
        TokenStream(folder, "train")


def test_another_document_count(folder: Path) -> None:
    def change(values: dict) -> None:
        values["splits"]["train"]["shards"][0]["documents"] = 1
        values["splits"]["train"]["documents"] = 4

    _rewrite(folder, change)
    with pytest.raises(DataError, match=r"documents: expected 1 \(manifest\), found 2"):
        TokenStream(folder, "train")


def test_documents_that_do_not_follow_each_other(folder: Path) -> None:
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[34 + 8 + 8 : 34 + 8 + 16] = (4).to_bytes(8, "little")  # second document: at byte 6
    path.write_bytes(content)
    with pytest.raises(DataError, match="documents without gaps"):
        TokenStream(folder, "train")


def test_a_document_of_less_than_no_tokens(folder: Path) -> None:
    """5 and -1 tokens are 4, and the second begins where the first ends; its reader would go backwards."""
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[34:42] = (5).to_bytes(4, "little") + (-1).to_bytes(4, "little", signed=True)
    content[34 + 8 + 8 : 34 + 8 + 16] = (10).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="documents without gaps"):
        TokenStream(folder, "train")


def test_empty_validation_split(write_folder: WriteFolder) -> None:
    with pytest.raises(DataError, match="the validation split is empty") as caught:
        TokenStream(write_folder("data", train=SHARDS), "validation")
    assert "validation_fraction" in caught.value.fix


def test_another_tokenizer_than_the_manifests(folder: Path) -> None:
    """Ids would mean something else, and nothing else would tell."""
    file = next((folder / "tokenizer").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"{file.name}: sha256 .*, expected"):
        TokenStream(folder, "train", check_indexes=False)


def test_a_read_error_names_shard_and_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer is no full one, and no damaged data: the same command may succeed."""
    stream = TokenStream(folder, "train")

    def stale(*arguments: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(EnvironmentFault, match=r"train-00000.bin cannot be read at byte 0: Stale file handle"):
        stream.read(0, 4)


def test_the_limit_of_open_files_is_raised(folder: Path) -> None:
    """As far as a process may do that itself: every shard is held open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        TokenStream(folder, "train", check_indexes=False)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
