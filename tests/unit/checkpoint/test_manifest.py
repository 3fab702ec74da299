"""A manifest is what was written, or refused by name: whatever stands in the file, no other exception, no hang."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmem_pretrain.checkpoint.manifest import DamagedCheckpoint, encode_manifest, read_manifest
from loopmem_pretrain.checkpoint.store import damage
from loopmem_pretrain.errors import CheckpointError
from tests.mutations import damaged_bytes, damaged_json, examples
from tests.unit.checkpoint.published import publish


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = publish(tmp_path_factory.mktemp("run"), 5)
    return path, read_manifest(path)


@pytest.fixture(scope="module")
def checkpoint(published):
    """Tests write over its manifest."""
    return published[0]


@pytest.fixture(scope="module")
def content(published):
    return published[1]


def written(checkpoint, manifest):
    """The same manifest with a hash that holds, as somebody who means harm would write it."""
    (checkpoint / "manifest.json").write_bytes(encode_manifest(manifest))
    return checkpoint


def changed(manifest, key, value):
    """A copy with one value replaced; `key` is dotted with slashes."""
    copy = json.loads(json.dumps(manifest))
    *around, last = key.split("/")
    inner = copy
    for part in around:
        inner = inner[part]
    inner[last] = value
    return copy


NO_MANIFESTS = ["", "{", "[]", "null", "NaN", '{"format": "other"}', '{"format": "loopmem-checkpoint", "version": 0}']
NO_MANIFESTS += ["[" * 100_000, '{"a": ' * 100_000, '{"step": 1, "step": 2}', "9" * 5000, "\ufeff{}"]


@pytest.mark.parametrize("text", NO_MANIFESTS, ids=range(len(NO_MANIFESTS)))
def test_a_file_that_is_no_manifest(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("junk", [b"\xff\xfe\x00", b"\0" * 100, b"\x80\x05K\x01."])
def test_a_file_that_is_no_text(checkpoint, junk):
    (checkpoint / "manifest.json").write_bytes(junk)
    with pytest.raises(DamagedCheckpoint, match=r"not valid JSON"):
        read_manifest(checkpoint)


def test_a_file_without_end(tmp_path):
    path = publish(tmp_path, 5)
    with open(path / "manifest.json", "ab") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(DamagedCheckpoint, match="larger than"):
        read_manifest(path)


def test_a_folder_or_a_link_in_its_place(tmp_path):
    path = publish(tmp_path, 5)
    (path / "manifest.json").rename(tmp_path / "elsewhere")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="no plain file"):
        read_manifest(path)
    (path / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="missing"):
        read_manifest(path)
    (path / "manifest.json").mkdir()
    with pytest.raises(DamagedCheckpoint, match="no plain file"):
        read_manifest(path)


def test_a_later_version_is_not_called_damaged(checkpoint, content):
    with pytest.raises(CheckpointError, match="version 2") as caught:
        read_manifest(written(checkpoint, {**content, "version": 2}))
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_every_byte_with_a_flipped_bit_is_found(checkpoint, content):
    whole = (written(checkpoint, content) / "manifest.json").read_bytes()
    for index in range(len(whole)):
        for bit in (0, 5):
            (checkpoint / "manifest.json").write_bytes(
                whole[:index] + bytes([whole[index] ^ (1 << bit)]) + whole[index + 1 :]
            )
            try:
                found = read_manifest(checkpoint)
            except CheckpointError:
                continue
            assert {key: found.get(key) for key in content if key != "sha256"} == {
                key: content[key] for key in content if key != "sha256"
            }


WAYS_OUT = ["../x.pt", "/etc/passwd", "a/../../x", "a\\..\\x", "", ".", "..", "a//b", ".hidden", "a/.b", "a\0b", "a\n"]
WAYS_OUT += ["\u0430", "a/" * 600 + "b"]


@pytest.mark.parametrize("name", WAYS_OUT, ids=ascii)
def test_names_that_lead_out_of_the_folder(checkpoint, content, name):
    files = {**content["files"], name: {"bytes": 1, "sha256": "a" * 64}}
    with pytest.raises(DamagedCheckpoint):
        read_manifest(written(checkpoint, {**content, "files": files}))
    names = {**content["parameter_names"], name: "model.embed.weight"}  # the merged form makes folders of them
    with pytest.raises(DamagedCheckpoint):
        read_manifest(written(checkpoint, {**content, "parameter_names": names}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "5"),
        ("step", True),
        ("step", -1),
        ("step", 2**70),
        ("step", 6),
        ("position", {"step": 5}),
        ("position/samples", 1.5),
        ("position/later", 1),
        ("world_size", 0),
        ("zero_stage", 4),
        ("data/datasets", []),
        ("data/datasets", [{}]),
        ("data/seed", None),
        ("tokenizer_sha256", "A" * 64),
        ("parameter_shapes", {}),
        ("parameter_shapes/model.embed.weight", [96, -1]),
        ("parameter_names/0.weight", 7),
        ("files", {}),
        ("files/manifest.json", {"bytes": 1, "sha256": "a" * 64}),
        ("files/weights.pt", 100),
        ("files/weights.pt/bytes", -1),
        ("files/weights.pt/bytes", 100.0),
        ("files/weights.pt/sha256", "a" * 63),
        ("files/weights.pt/sha256", "a" * 64 + "\n"),
        ("validation_loss", "low"),
        ("seconds", {"files": -1}),
        ("skipped_steps", "none"),
    ],
)
def test_values_that_cannot_be(checkpoint, content, key, value):
    with pytest.raises(DamagedCheckpoint) as caught:
        read_manifest(written(checkpoint, changed(content, key, value)))
    assert key.split("/")[-1] in caught.value.problem or key.split("/")[0] in caught.value.problem


def test_keys_of_others_may_be_there(checkpoint, content):
    assert read_manifest(written(checkpoint, {**content, "more": {"of": "it"}}))["more"] == {"of": "it"}


def test_a_manifest_from_before_it_had_a_hash(checkpoint, content):
    older = {key: value for key, value in content.items() if key not in ("sha256", "saved", "seconds")}
    (checkpoint / "manifest.json").write_text(json.dumps(older) + "\n")
    assert read_manifest(checkpoint) == older


@examples(100)
@given(data=st.data())
def test_any_mutation_is_refused_by_name_or_harmless(checkpoint, content, data):
    if data.draw(st.booleans()):
        mutated = data.draw(damaged_json(content))
        text = data.draw(st.sampled_from([json.dumps(mutated), json.dumps({**mutated, "sha256": None})]))
        (checkpoint / "manifest.json").write_text(text)
    else:
        whole = (json.dumps({**content, "sha256": None})).encode()
        (checkpoint / "manifest.json").write_bytes(data.draw(damaged_bytes(whole)))
    try:
        manifest = read_manifest(checkpoint)
        assert all(isinstance(problem, str) for problem in damage(checkpoint, manifest))
        assert manifest["position"]["step"] == manifest["step"]
    except CheckpointError as error:
        assert "manifest.json" in error.problem and error.fix
