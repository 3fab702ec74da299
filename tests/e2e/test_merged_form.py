"""A checkpoint kept in merged form: any sizes read it, and nothing is lost on the way."""

import shutil

import pytest
import torch

from loopmem_pretrain.checkpoint.manifest import read_manifest
from loopmem_pretrain.checkpoint.reshape import reshape
from loopmem_pretrain.checkpoint.store import verify
from loopmem_pretrain.checkpoint.universal import fp32_weights
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.lock import take_lock
from tests.distributed import run_command
from tests.e2e.test_reshape import LAYOUTS, config
from tests.e2e.test_training import exact, run


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dp2 zero2", "one"),
        pytest.param("tp2 pp2", "dp3 zero3", marks=pytest.mark.slow),
        pytest.param("dp3 zero3", "tp2 sharded", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.replace(" ", "-"),
)
def test_goes_on_as_after_merging_at_the_start(tmp_path, sentences, before, after):
    (first, ranks), (second, other_ranks) = LAYOUTS[before], LAYOUTS[after]
    assert run(config(tmp_path / "merged", sentences, first), ranks, stop_at_step=2) == ("interrupted", None)
    shutil.copytree(tmp_path / "merged", tmp_path / "dealt")
    checkpoint = tmp_path / "merged" / "checkpoints" / "step_00000002"
    weights = dict(fp32_weights(checkpoint))

    assert reshape(tmp_path / "merged") == checkpoint
    verify(checkpoint)
    assert not list(checkpoint.rglob("*_states.pt"))
    assert reshape(checkpoint) == checkpoint  # nothing left to do
    for name, value in fp32_weights(checkpoint):
        assert torch.equal(value, weights[name]), name

    for folder in ("merged", "dealt"):
        assert run(config(tmp_path / folder, sentences, second), other_ranks) == ("done", None)
    assert exact(tmp_path / "merged") == exact(tmp_path / "dealt")


def test_into_another_run_folder(tmp_path, sentences):
    run(config(tmp_path / "run", sentences, {}), 2, stop_at_step=2)
    shutil.copytree(tmp_path / "run", tmp_path / "dealt")
    result = run_command("checkpoint", "reshape", tmp_path / "run", "--out", tmp_path / "new")
    assert result.returncode == 0, result.stderr
    assert "form" not in read_manifest(tmp_path / "run" / "checkpoints" / "step_00000002")
    for name in ("new", "dealt"):
        assert run(config(tmp_path / name, sentences, {}), 1) == ("done", None)  # no trust needed: the same run
    assert exact(tmp_path / "new")[-2:] == exact(tmp_path / "dealt")[-2:]
    again = run_command("checkpoint", "reshape", tmp_path / "run", "--out", tmp_path / "new")
    assert again.returncode == 2 and "is a run folder already" in again.stderr
    with pytest.raises(ConfigError, match="no run folder"):
        reshape(shutil.copytree(tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "alone"))


@pytest.mark.parametrize("moment", ["hash_files", "write_file"])
def test_a_reshape_that_is_cut_short_changes_nothing(tmp_path, sentences, monkeypatch, moment):
    run(config(tmp_path / "run", sentences, {}), 1, stop_at_step=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    manifest = read_manifest(checkpoint)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"loopmem_pretrain.checkpoint.reshape.{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            reshape(checkpoint)
    assert read_manifest(checkpoint) == manifest
    verify(checkpoint)
    reshape(checkpoint)
    verify(checkpoint)
    assert read_manifest(checkpoint)["form"] == "merged"


def test_not_under_a_run_that_is_training(tmp_path, sentences):
    run(config(tmp_path / "run", sentences, {}), 1, stop_at_step=2)
    with take_lock(tmp_path / "run" / ".lock", "", ""), pytest.raises(EnvironmentFault, match="is training"):
        reshape(tmp_path / "run")


def test_where_checkpoints_are_on_another_disk(tmp_path, sentences):
    """The lock is in the run folder, not beside what checkpoints/ leads to."""
    run(config(tmp_path / "run", sentences, {}), 1, stop_at_step=2)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "disk" / "checkpoints")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    with take_lock(tmp_path / "run" / ".lock", "", ""), pytest.raises(EnvironmentFault, match="is training"):
        reshape(tmp_path / "run")
    with pytest.raises(ConfigError, match="no run folder"):
        reshape(tmp_path / "disk" / "checkpoints" / "step_00000002")
    assert reshape(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_00000002"
    verify(tmp_path / "run" / "checkpoints" / "step_00000002")
