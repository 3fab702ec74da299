"""Secrets of the environment and of the command line are in no file that a run writes and in nothing it says."""

import os
import secrets
import shutil

import pytest

from loopmem_pretrain.config.load import dump_config
from tests.configs import tiny_run
from tests.distributed import run_command

NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_SECRET")


@pytest.fixture
def environment():
    return {**os.environ, **{name: secrets.token_hex(20) for name in NAMES}}


def test_secrets_stay_where_they_are(tmp_path, sentences, environment):
    run_dir, said = tmp_path / "run", ""
    logging = {"tensorboard": True, "wandb": "offline"}
    config = tiny_run(run_dir, sentences, model={"vocab_size": 320}, training={"train_steps": 6}, logging=logging)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    shard = shutil.copytree(sentences, tmp_path / "damaged") / "train-00000.bin"
    shard.write_bytes(b"")
    for code, *command in (
        (0, "train", "--config", file, "--ranks", "2"),
        (0, "convert", run_dir, tmp_path / "out" / "hf"),
        (0, "report", run_dir),
        (0, "plot", run_dir, tmp_path / "out" / "figures"),
        (2, "train", "--config", file, "optimizer.lr=0.5"),
        (2, "train", "--config", file, "optimizer.rate=0.5"),
        (3, "train", "--config", file, f"data.datasets.0.path={tmp_path / 'damaged'}"),
        (6, "train", "--config", file, "training.device=cuda"),
    ):
        result = run_command(*command, env=environment)
        assert result.returncode == code, result.stderr
        said += result.stdout + result.stderr
    files = [path for folder in (run_dir, tmp_path / "out") for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    texts = {"what was said": said.encode()} | {str(path): path.read_bytes() for path in files}
    found = [(place, name) for place, text in texts.items() for name in NAMES if environment[name].encode() in text]
    assert not found
