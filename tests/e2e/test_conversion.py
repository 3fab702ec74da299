"""A conversion is the same model whatever ranks and files its checkpoint has, and wherever its data has gone."""

import shutil

import pytest
import yaml
from safetensors.torch import load_file

from loopmem_pretrain.checkpoint.reshape import reshape
from loopmem_pretrain.checkpoint.universal import fp32_weights
from loopmem_pretrain.data.manifest import load_manifest
from loopmem_pretrain.data.tokenizer import load_tokenizer
from loopmem_pretrain.hf.convert import convert_run, sample_texts
from tests.configs import tiny_run
from tests.e2e.test_reshape import LAYOUTS, config
from tests.e2e.test_training import run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2 pp2", "tp2 sharded"])
def test_tensor_and_pipeline_parallel(tmp_path, sentences, name):
    changes, ranks = LAYOUTS[name]
    run(config(tmp_path / "run", sentences, changes), ranks, stop_at_step=2)
    assert "step 2" in convert_run(tmp_path / "run", tmp_path / "hf")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    weights = dict(fp32_weights(checkpoint))
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(value.equal(weights[name]) for name, value in written.items())

    reshape(tmp_path / "run")  # the same checkpoint in merged form
    convert_run(checkpoint, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(value.equal(again[name]) for name, value in written.items())


@pytest.mark.slow
def test_data_that_has_moved(tmp_path, sentences):
    shutil.copytree(sentences, tmp_path / "before")
    run(config(tmp_path / "run", tmp_path / "before", {}), 1, stop_at_step=2)
    (tmp_path / "before").rename(tmp_path / "after")
    file = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["data"]["datasets"][0]["path"] = str(tmp_path / "after")
    file.write_text(yaml.safe_dump(values))
    assert "step 2" in convert_run(tmp_path / "run", tmp_path / "hf")
    assert str(tmp_path / "after") in (tmp_path / "hf" / "README.md").read_text()


def test_fewer_validation_samples_than_are_compared(sentences):
    """A run may have asked for two; its conversion compares on what there is."""
    tokens = load_manifest(sentences).splits["validation"].tokens
    of = tiny_run("unused", sentences, data={"seq_length": tokens // 3})
    texts = list(sample_texts(of, load_tokenizer(sentences / "tokenizer")))
    assert len(texts) in (2, 3) and all(texts)
