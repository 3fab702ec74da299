"""Whatever stands in prepared shards and their manifest, they are read as written or refused as DataError."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmem_pretrain.data.files import sha256_file
from loopmem_pretrain.data.indexed import TokenStream
from loopmem_pretrain.data.manifest import load_manifest, verify_shards
from loopmem_pretrain.errors import DataError
from tests.mutations import damaged_bytes, damaged_json, examples

DOCUMENTS = [[[5, 6, 7, 0], [8, 9, 0]], [[10, 0], [11, 12, 13, 0]]]


@pytest.fixture
def opened(write_folder):
    """The folder as written, and what is in its files."""
    folder = write_folder("tokens", train=DOCUMENTS, validation=[[[1, 0]]])
    return folder, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_or_refuse(folder):
    """All tokens of the training split, or None where they are refused by name."""
    try:
        manifest = load_manifest(folder)
        verify_shards(folder, manifest, hashes=True)
        stream = TokenStream(folder, "train", manifest)
        return stream.read(0, len(stream))
    except DataError as error:
        assert str(folder) in error.problem and error.fix
        return None


def test_manifests(opened):
    folder, files = opened
    whole = files["manifest.json"]

    @examples(100)
    @given(data=st.data())
    def check(data):
        values = json.loads(whole)
        damaged = data.draw(damaged_bytes(whole) | damaged_json(values).map(lambda each: json.dumps(each).encode()))
        (folder / "manifest.json").write_bytes(damaged)
        read_or_refuse(folder)

    check()


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_shards(opened, name):
    """Whose sizes and hashes the manifest may give as they are: then the header and the tables are all there is."""
    folder, files = opened
    tokens = read_or_refuse(folder)

    @examples(100)
    @given(data=st.data())
    def check(data):
        damaged = data.draw(damaged_bytes(files[name]))
        (folder / name).write_bytes(damaged)
        (folder / "manifest.json").write_bytes(files["manifest.json"])
        found = read_or_refuse(folder)
        assert found is None or np.array_equal(found, tokens)
        manifest = json.loads(files["manifest.json"])
        shard, kind = manifest["splits"]["train"]["shards"][0], name[-3:]
        shard |= {f"{kind}_bytes": len(damaged), f"{kind}_sha256": sha256_file(folder / name)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found = read_or_refuse(folder)
        assert found is None or found.shape == tokens.shape

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, '{"format": NaN}', "\ufeff{}"])
def test_json_that_no_program_writes(opened, text):
    folder, _ = opened
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(folder)


def test_files_replaced_by_folders(opened):
    folder, files = opened
    for name in files:
        shutil.copytree(folder, folder.parent / "copy")
        (folder.parent / "copy" / name).unlink()
        (folder.parent / "copy" / name).mkdir()
        assert read_or_refuse(folder.parent / "copy") is None
        shutil.rmtree(folder.parent / "copy")
