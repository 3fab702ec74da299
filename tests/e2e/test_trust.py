"""Checkpoints that somebody else made: code in them does not run, and other runs' are not resumed by accident."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from loopmem_pretrain.checkpoint.manifest import encode_manifest
from loopmem_pretrain.checkpoint.reshape import reshape
from loopmem_pretrain.checkpoint.store import hash_files
from loopmem_pretrain.checkpoint.universal import fp32_weights
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.hf.convert import convert_run
from loopmem_pretrain.inference.opening import open_model
from tests.distributed import run_command
from tests.e2e.test_training import config_for, run
from tests.unit.checkpoint.test_safe_load import Payload

STEPS = {"training": {"train_steps": 4}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, sentences):
    """Runs of two ranks that stopped at step 2, by ZeRO stage."""
    folder = tmp_path_factory.mktemp("stopped")
    for stage in (1, 2, 3):
        config = config_for(folder / str(stage), sentences, parallel={"zero_stage": stage}, **STEPS)
        assert run(config, stop_at_step=2) == ("interrupted", None)
    return folder


@pytest.fixture
def copied(tmp_path, stopped, sentences):
    """(config, checkpoint) of a copy of a stopped run: it goes on where it was copied to."""

    def copy(stage, name="run"):
        shutil.copytree(stopped / str(stage), tmp_path / name)
        config = config_for(tmp_path / name, sentences, parallel={"zero_stage": stage}, **STEPS)
        return config, tmp_path / name / "checkpoints" / "step_00000002"

    return copy


def change_manifest(checkpoint, **changes):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hash_files(checkpoint, [name])[name]
    manifest |= changes
    del manifest["sha256"]
    path.write_bytes(encode_manifest({key: value for key, value in manifest.items() if value is not None}))


def poison(path, content, mark):
    content["x"] = Payload(mark)
    torch.save(content, path)


def refused_everywhere(config, checkpoint, file, mark, tmp_path, because=r"\w+\.system\b"):
    """Resume at the same and at another size, convert, generate, reshape: each names the file, none runs it."""
    said = [run(config, ranks=ranks)[1] for ranks in (2, 1)]
    for read in (
        lambda: convert_run(config.run_dir, tmp_path / "hf"),
        lambda: open_model(checkpoint),
        lambda: list(fp32_weights(checkpoint)),
        lambda: reshape(checkpoint),
    ):
        with pytest.raises(CheckpointError) as caught:
            read()
        said.append(caught.value)
    for error in said:
        assert error.exit_code == 4
        assert file in error.problem and re.search(because, error.problem), error
    assert not mark.exists()
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        (1, "layer_02*"),
        (1, "mp_rank*_model_states.pt"),
        (1, "*pp_rank_1*_optim_states.pt"),
        (1, "generators_rank_00001.pt"),
        (2, "mp_rank*_model_states.pt"),
        (2, "*pp_rank_1*_optim_states.pt"),
        (3, "*pp_rank_1*_model_states.pt"),
        (3, "*pp_rank_0*_optim_states.pt"),
    ],
)
def test_a_payload_with_matching_hashes_does_not_run(tmp_path, copied, stage, pattern):
    config, checkpoint = copied(stage)
    (path,) = checkpoint.glob(pattern)
    poison(path, torch.load(path, weights_only=False), tmp_path / "mark")
    change_manifest(checkpoint)
    refused_everywhere(config, checkpoint, path.name, tmp_path / "mark", tmp_path)


def test_a_file_that_the_manifest_does_not_list(tmp_path, copied):
    """DeepSpeed looks for files by pattern."""
    config, checkpoint = copied(1)
    poison(checkpoint / "zero_pp_rank_2_mp_rank_00_optim_states.pt", {}, tmp_path / "mark")
    refused_everywhere(config, checkpoint, "zero_pp_rank_2", tmp_path / "mark", tmp_path, because="not listed")


def test_a_parameter_name_cannot_lead_out_of_the_folder(tmp_path, copied):
    """DeepSpeed writes the slices of a parameter below its name."""
    _, checkpoint = copied(1)
    outside = str(tmp_path / "outside")
    (path,) = checkpoint.glob("*pp_rank_0*_optim_states.pt")
    content = torch.load(path, weights_only=False)
    mappings = content["optimizer_state_dict"]["param_slice_mappings"][0]
    mappings[outside] = next(iter(mappings.values()))
    torch.save(content, path)
    change_manifest(checkpoint)
    with pytest.raises(CheckpointError, match="outside"):
        list(fp32_weights(checkpoint))
    assert not Path(outside).exists()


def test_a_checkpoint_of_another_run_needs_trust(tmp_path, copied, sentences):
    config, checkpoint = copied(1)
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config.model_copy(update={"run_dir": str(tmp_path / "other")})))
    shutil.copytree(checkpoint.parent, tmp_path / "other" / "checkpoints")
    refused = run_command("train", "--config", config_path)
    assert refused.returncode == 4
    assert "this run folder is of run" in refused.stderr and "--trust" in refused.stderr
    trusted = run_command("train", "--config", config_path, "--trust")
    assert trusted.returncode == 0, trusted.stderr
    assert "trusted because of --trust" in trusted.stderr and "at step 2" in trusted.stderr
    manifest = json.loads((tmp_path / "other" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["run_id"] == (tmp_path / "other" / "run_id").read_text().strip()
    # A later start, or a rewind, may come back to it.
    (tmp_path / "other" / "checkpoints" / "latest").write_text("step_00000002\n")
    again = run_command("train", "--config", config_path)
    assert again.returncode == 0, again.stderr


def test_trust_lets_no_other_configuration_in(tmp_path, copied):
    """DeepSpeed would go on with the weight decay of its files, and the run folder would say another."""
    config, checkpoint = copied(1)
    changed = {"run_dir": str(tmp_path / "other"), "optimizer": config.optimizer.model_copy(update={"eps": 1e-3})}
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config.model_copy(update=changed)))
    shutil.copytree(checkpoint.parent, tmp_path / "other" / "checkpoints")
    refused = run_command("train", "--config", config_path, "--trust")
    assert refused.returncode == 4 and "optimizer.eps: 1e-08 -> 0.001" in refused.stderr


def test_a_checkpoint_without_an_id_is_foreign(copied):
    config, checkpoint = copied(1)
    change_manifest(checkpoint, run_id=None)
    _, error = run(config)
    assert error.exit_code == 4 and "gave no id" in error.problem and "--trust" in error.fix


def test_trust_is_about_origin_only(tmp_path, copied):
    """A damaged or poisoned checkpoint is refused, trusted or not."""
    config, checkpoint = copied(1)
    (path,) = checkpoint.glob("layer_02*")
    poison(path, torch.load(path, weights_only=False), tmp_path / "mark")
    change_manifest(checkpoint, run_id=None)
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config))
    refused = run_command("train", "--config", config_path, "--trust")
    assert refused.returncode == 4 and "posix.system" in refused.stderr
    assert not (tmp_path / "mark").exists()
