"""A checkpoint folder is whole or not there."""

import json

import pytest

from loopmem_pretrain.checkpoint.store import CheckpointStore, hash_files, list_files, read_manifest, verify
from loopmem_pretrain.errors import CheckpointError


def publish(run_dir, step):
    store = CheckpointStore(run_dir)
    folder = store.folder / store.incomplete_name(step)
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"w" * 100)
    (folder / "inner" / "state.pt").write_bytes(b"s" * 50)
    return store.publish(step, hash_files(folder, list_files(folder)), {"world_size": 2})


def test_publish_and_read(tmp_path):
    path = publish(tmp_path, 7)
    assert CheckpointStore(tmp_path).latest() == path
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["world_size"]) == (7, 2)
    assert set(manifest["files"]) == {"weights.pt", "inner/state.pt"}
    verify(path)


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path).latest() is None


def test_without_the_pointer_the_newest_counts(tmp_path):
    publish(tmp_path, 5)
    newest = publish(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert CheckpointStore(tmp_path).latest() == newest


def test_a_pointer_to_nothing_names_what_is_there(tmp_path):
    publish(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match=r"step_00000009.*step_00000005"):
        CheckpointStore(tmp_path).latest()


def test_every_damage_is_listed(tmp_path):
    path = publish(tmp_path, 5)
    (path / "weights.pt").write_bytes(b"w" * 99)
    (path / "inner" / "state.pt").write_bytes(b"s" * 49 + b"t")
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    assert "weights.pt: 99 bytes, expected 100" in caught.value.problem
    assert "inner/state.pt: content differs" in caught.value.problem
    (path / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"weights.pt: missing"):
        verify(path, ["weights.pt"])


def test_going_back_sets_later_checkpoints_aside(tmp_path):
    """Twice: the second time such a folder is there already."""
    store = CheckpointStore(tmp_path)
    for _ in range(2):
        for step in (5, 10, 15):
            publish(tmp_path, step)
        store.go_back_to(5)
        assert store.steps() == [5] and store.latest() == store.folder / store.name(5)
        left = sorted(path.name for path in store.folder.glob("*step*"))
        assert left == ["abandoned-step_00000010-at-5", "abandoned-step_00000015-at-5", "step_00000005"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", json.dumps({"format": "other"}), json.dumps({"format": "loopmem-checkpoint", "version": 99})],
)
def test_a_manifest_that_is_not_ours(tmp_path, text):
    path = publish(tmp_path, 5)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(path)


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    CheckpointStore(tmp_path).prune(2)
    assert CheckpointStore(tmp_path).steps() == [2, 3]


def test_the_same_step_again_replaces(tmp_path):
    publish(tmp_path, 5)
    publish(tmp_path, 5)
    verify(CheckpointStore(tmp_path).latest())


def test_incomplete_checkpoints_are_never_seen(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.folder / store.incomplete_name(8)).mkdir(parents=True)
    assert store.latest() is None and store.steps() == []
    store.discard_incomplete()
    assert list(store.folder.iterdir()) == []


def test_going_back_sets_the_later_branch_aside(tmp_path):
    """`latest` was pointed at an older checkpoint by hand: what came after it no longer counts, and is not lost."""
    for step in (2000, 2500, 3000):
        publish(tmp_path, step)
    store = CheckpointStore(tmp_path)
    (store.folder / "latest").write_text(store.name(2000))
    publish(tmp_path, 2100)
    store.prune(2)
    assert store.steps() == [2000, 2100]
    assert store.latest() == store.folder / store.name(2100)
    aside = sorted(path.name for path in store.folder.glob("abandoned-*"))
    assert aside == ["abandoned-step_00002500-at-2100", "abandoned-step_00003000-at-2100"]
