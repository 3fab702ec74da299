"""A checkpoint folder is whole or not there."""

import logging
import os
from pathlib import Path

import pytest

from loopmem_pretrain.checkpoint import store as store_module
from loopmem_pretrain.checkpoint.manifest import DamagedCheckpoint, read_manifest
from loopmem_pretrain.checkpoint.store import CheckpointStore, checkpoint_at, verify
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.config.training import CheckpointConfig
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault
from tests.disk import assert_in_order, disk_steps
from tests.unit.checkpoint.published import publish

ROOT = Path(__file__).parents[3]


def prune(run_dir, **fields):
    CheckpointStore(run_dir).prune(CheckpointConfig(**fields))
    return CheckpointStore(run_dir).steps()


def test_publish_and_read(tmp_path):
    path = publish(tmp_path, 7)
    assert CheckpointStore(tmp_path).latest() == path
    manifest = read_manifest(path)
    assert (manifest["step"], manifest["world_size"]) == (7, 2)
    assert set(manifest["files"]) == {"weights.pt", "inner/state.pt"}
    verify(path)


@pytest.mark.parametrize("name", ["weights.pt", "inner/state.pt"])
def test_a_power_cut_never_finds_a_name_before_what_it_stands_for(tmp_path, monkeypatch, name):
    """Files, then the manifest, then the folder's name, then `latest`: each is on the disk before the next begins."""
    steps = disk_steps(monkeypatch)
    path = publish(tmp_path, 5)
    folder, writing = path.parent, path.parent / ".incomplete-step_00000005"
    assert_in_order(
        steps,
        ("flush", writing / name),
        ("name", writing / "manifest.json"),
        ("flush", writing),
        ("name", path),
        ("flush", folder),
        ("name", folder / "latest"),
        ("flush", folder),
    )


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path).latest() is None


def test_without_the_pointer_the_newest_counts(tmp_path):
    publish(tmp_path, 5)
    newest = publish(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert CheckpointStore(tmp_path).latest() == newest


def test_a_disk_that_is_full_before_latest_publishes_nothing(tmp_path, monkeypatch):
    """Else a start would go on from the one before, and set the whole new one aside."""
    write = store_module.write_file

    def full(path, content):
        if path.name.endswith("latest"):
            raise EnvironmentFault("no room")
        write(path, content)

    older, store = publish(tmp_path, 5), CheckpointStore(tmp_path)
    monkeypatch.setattr(store_module, "write_file", full)
    with pytest.raises(EnvironmentFault):
        publish(tmp_path, 10)
    assert store.steps() == [5] and store.latest() == older
    monkeypatch.undo()
    store.discard_incomplete()
    newer = publish(tmp_path, 10)
    assert store.latest() == newer and sorted(path.name for path in newer.iterdir()) == [
        "inner",
        "manifest.json",
        "weights.pt",
    ]


def test_what_could_not_be_removed_before_is_in_nobodys_way(tmp_path):
    """On NFS a file that a reader has open stays; the step may have been trained again since."""
    left = tmp_path / "checkpoints" / ".incomplete-step_00000005-removed"
    left.mkdir(parents=True)
    (left / ".nfs0001").touch()
    for step in (5, 6):
        publish(tmp_path, step)
    assert prune(tmp_path, keep_last=1) == [6]


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
    aside = ["abandoned-step_00000010-at-5", "abandoned-step_00000015-at-5"]
    assert left == [aside[0], f"{aside[0]}-2", aside[1], f"{aside[1]}-2", "step_00000005"]


def test_the_older_whole_checkpoint_is_suggested(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    folder = tmp_path / "checkpoints"
    for name in ("step_00000003", "step_00000002"):
        (folder / name / "weights.pt").unlink()
    with pytest.raises(DamagedCheckpoint) as caught:
        verify(folder / "step_00000003")
    assert f"use {folder / 'step_00000001'}, which is older and whole" in caught.value.fix


@pytest.mark.parametrize("name", ["layer_99-model_00-model_states.pt", "inner/other_optim_states.pt", "layer_00"])
def test_a_file_that_is_not_listed_is_damage(tmp_path, name):
    path = publish(tmp_path, 5)
    (path / name).write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=f"{name}: not listed in manifest.json"):
        verify(path)


def test_hidden_files_of_file_systems_are_not(tmp_path):
    path = publish(tmp_path, 5)
    (path / ".nfs0000001").write_bytes(b"")
    verify(path)


@pytest.mark.parametrize("name", ["weights.pt", "inner"])
def test_links_are_not_followed(tmp_path, name):
    path = publish(tmp_path, 5)
    os.rename(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="symbolic link"):
        verify(path)


def test_the_checkpoint_itself_may_be_linked(tmp_path):
    os.rename(publish(tmp_path, 5), tmp_path / "elsewhere")
    (tmp_path / "checkpoints" / "step_00000005").symlink_to(tmp_path / "elsewhere")
    verify(checkpoint_at(tmp_path))


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    assert prune(tmp_path, keep_last=2) == [2, 3]


def test_prune_keeps_every_nth_and_the_best(tmp_path):
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0, 50: None, 60: 4.0}
    for step, loss in losses.items():
        publish(tmp_path, step, validation_loss=loss)
    reasons = CheckpointStore(tmp_path).kept(CheckpointConfig(keep_last=2, keep_every_steps=30, keep_best=1))
    assert reasons == {10: [], 20: [], 30: ["every 30"], 40: ["best"], 50: ["last"], 60: ["last", "every 30"]}
    assert prune(tmp_path, keep_last=2, keep_every_steps=30, keep_best=1) == [30, 40, 50, 60]
    assert prune(tmp_path, keep_last=1, keep_best=2) == [30, 40, 60]


def test_a_run_of_the_papers_recipe_still_has_the_step_of_the_papers_tables_at_its_end(tmp_path):
    config = load_config(RunConfig, ROOT / "configs" / "paper" / "l3.yaml")
    steps = config.training.train_steps
    for step in [*range(34_000, steps, config.checkpoint.interval_steps), steps]:
        publish(tmp_path, step)
        CheckpointStore(tmp_path).prune(config.checkpoint)
    assert CheckpointStore(tmp_path).steps() == [35_000, 37_000, 38_000, steps]


@pytest.mark.parametrize("damaged", ["manifest.json", "weights.pt"])
def test_prune_neither_counts_nor_removes_what_is_damaged(tmp_path, damaged, caplog):
    for step in (1, 2, 3, 4):
        publish(tmp_path, step, validation_loss=5.0 - step)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / damaged).write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        assert prune(tmp_path, keep_last=1, keep_best=1) == [2, 3, 4]
    assert all(f"step_0000000{step} is damaged; it is kept" in caplog.text for step in (2, 4))


@pytest.mark.parametrize("name", ["step_", "step_5", "step_00000005.bak", "step_-0000005", "step_\u0665" + "0" * 8])
def test_folders_of_other_names_are_no_checkpoints(tmp_path, name):
    publish(tmp_path, 5)
    (tmp_path / "checkpoints" / name).mkdir()
    assert CheckpointStore(tmp_path).steps() == [5]


def names(store):
    paths, doubt = store.candidates()
    return [path.name[-1] for path in paths], doubt


def test_candidates_begin_where_latest_points(tmp_path):
    store = CheckpointStore(tmp_path)
    assert names(store) == ([], "")
    for step in (1, 2, 3):
        publish(tmp_path, step)
    assert names(store) == (["3", "2", "1"], "")
    (store.folder / "latest").write_text("step_00000002\n")
    assert names(store) == (["2", "1"], "")


@pytest.mark.parametrize(
    "content", [b"", b"step_00000009\n", b"../../other", b"\xff\xfe", b"step_00000003\0", b".", b"x" * 10_000, None]
)
def test_where_latest_says_nothing_all_are_tried(tmp_path, content):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    store = CheckpointStore(tmp_path)
    pointer = store.folder / "latest"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    steps, doubt = names(store)
    assert steps == ["3", "2", "1"] and str(pointer) in doubt and doubt.isprintable()
    if content is not None:
        with pytest.raises(CheckpointError, match="present: step_00000001"):  # an export does not choose by itself
            store.latest()


def test_a_run_that_lost_its_checkpoints_does_not_begin_anew(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="step_00000009"):
        CheckpointStore(tmp_path).candidates()


def test_falling_back_keeps_the_damaged_ones_aside(tmp_path):
    store = CheckpointStore(tmp_path)
    for _ in range(2):
        paths = [publish(tmp_path, step) for step in (1, 2, 3)]
        store.fall_back(paths[0], paths[1:])
    assert store.latest() == paths[0] and store.steps() == [1]
    aside = [f"damaged-step_0000000{step}{suffix}" for step in (2, 3) for suffix in ("", "-2")]
    assert sorted(path.name for path in store.folder.glob("damaged-*")) == sorted(aside)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["manifest.json", "weights.pt"])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path, name):
    path = publish(tmp_path, 5)
    (path / name).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        verify(path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_the_same_step_again_replaces(tmp_path):
    publish(tmp_path, 5)
    publish(tmp_path, 5)
    verify(CheckpointStore(tmp_path).latest())


def test_the_replaced_one_is_removed_when_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    publish(tmp_path, 5)
    store, removed = CheckpointStore(tmp_path), []

    def look(path):
        verify(store.latest())
        removed.append((path.name, store.latest().name))

    monkeypatch.setattr("loopmem_pretrain.checkpoint.store._delete", look)
    publish(tmp_path, 5)
    assert removed == [(".incomplete-replaced-step_00000005-removed", "step_00000005")]


def test_a_kill_between_the_two_renamings_loses_neither(tmp_path, monkeypatch):
    publish(tmp_path, 5)
    rename = os.rename

    def killed(source, target):
        if os.path.basename(source).startswith(".incomplete"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 5)
    monkeypatch.undo()

    store = CheckpointStore(tmp_path)
    store.discard_incomplete()  # what the next save begins with
    with pytest.raises(CheckpointError, match=r"left it as .*replaced-step_00000005: rename it"):
        store.candidates()
    rename(store.folder / "replaced-step_00000005", store.folder / "step_00000005")
    verify(store.latest())


def test_a_kill_before_latest_moves_loses_no_checkpoint(tmp_path, monkeypatch):
    """The new one is whole, and is what the next start resumes; `latest` written by hand since then counts instead."""
    older, store = publish(tmp_path, 5), CheckpointStore(tmp_path)
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == "latest":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 10)
    monkeypatch.undo()
    newer = store.folder / "step_00000010"
    assert (store.folder / "latest").read_text() == "step_00000005\n"
    assert store.latest() == newer and store.candidates().paths == [newer, older]
    verify(newer)
    (store.folder / "latest").write_text("step_00000005\n")
    assert store.latest() == older
    assert publish(tmp_path, 15) == store.latest()


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
    assert prune(tmp_path, keep_last=2) == [2000, 2100]
    assert store.latest() == store.folder / store.name(2100)
    aside = sorted(path.name for path in store.folder.glob("abandoned-*"))
    assert aside == ["abandoned-step_00002500-at-2100", "abandoned-step_00003000-at-2100"]


def test_a_checkpoint_that_was_moved_away_is_let_go_not_followed(tmp_path):
    """Its link goes, what it leads to stays, and later saves are not in the way of each other."""
    first = publish(tmp_path, 5)
    elsewhere = tmp_path / "elsewhere"
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    for step in (10, 15):
        publish(tmp_path, step)
    store = CheckpointStore(tmp_path)
    store.prune(CheckpointConfig(keep_last=1))
    assert store.steps() == [15]
    assert (elsewhere / "weights.pt").exists()
    store.discard_incomplete()
    assert not list(store.folder.glob(".incomplete-*"))
