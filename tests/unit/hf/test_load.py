"""load_hf: a clear error for everything that is no exported model, and no code of the folder is run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmem_pretrain.errors import ConfigError, ConversionError, EnvironmentFault
from loopmem_pretrain.hf.export import export, huggingface_config, write_settings, write_tokenizer
from loopmem_pretrain.hf.load import load_hf
from loopmem_pretrain.hf.weights import check_weights, write_weights
from tests.unit.hf.conftest import TEXTS, model_config, native_model


@pytest.fixture
def folder(tmp_path, tokenizer_path, tokenizer):
    model = native_model(model_config("full"))
    write_tokenizer(tmp_path, tokenizer_path, TEXTS)
    weights = dict(model.named_parameters())
    write_weights(tmp_path, weights, check_weights(model.config, weights), "float32", "100KB")
    write_settings(tmp_path, huggingface_config(model.config, tokenizer, 64, "float32"))
    return tmp_path


def refusal(error, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load_hf(*args, **kwargs)
    assert caught.value.fix
    return caught.value.problem


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_model_and_tokenizer(folder, tokenizer):
    model, loaded = load_hf(folder)
    assert not model.training and model.dtype == torch.float32
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer.encode(text)


def test_dtype(folder):
    assert load_hf(folder, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_code_of_the_folder_is_not_run(folder):
    (folder / "modeling_loopmem.py").write_text("raise SystemExit('ran')\n")
    (folder / "configuration_loopmem.py").write_text("raise SystemExit('ran')\n")
    load_hf(folder)


def test_no_folder(tmp_path):
    assert "no such folder" in refusal(ConfigError, tmp_path / "none")


def test_folder_without_config(tmp_path):
    assert "no config.json" in refusal(ConfigError, tmp_path)


def test_another_kind_of_model(folder):
    edit(folder / "config.json", model_type="llama")
    assert "model_type is 'llama', not 'loopmem'" in refusal(ConfigError, folder)


def test_an_unrolled_export(tmp_path, tokenizer_path):
    """A model of another kind, and yet one of ours."""
    model = native_model(model_config("plain"))
    weights = dict(model.named_parameters())
    folder = export(
        model.config, weights, tokenizer_path, tmp_path / "out", sample_texts=TEXTS, seq_length=64, unrolled=1
    ).folder
    with pytest.raises(ConfigError) as caught:
        load_hf(folder)
    assert "an export by `loopmem convert --unrolled`, a dense model (hunyuan_v1_dense)" in caught.value.problem
    assert "`hf` model of lm-evaluation-harness" in caught.value.fix and "without --unrolled" in caught.value.fix


def test_damaged_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    assert "config.json is damaged" in refusal(ConversionError, folder)


def test_config_with_a_bad_value(folder):
    edit(folder / "config.json", num_key_value_heads=3)
    assert "num_key_value_heads: 3 does not divide" in refusal(ConversionError, folder)


def test_config_of_a_newer_version(folder):
    edit(folder / "config.json", format_version=2, gate="tensor")  # what it says else may be new too
    problem = refusal(ConversionError, folder)
    assert "format_version: 2 is newer than 1" in problem and "gate" not in problem


def test_config_of_another_size(folder):
    edit(folder / "config.json", intermediate_size=64)
    problem = refusal(ConversionError, folder)
    assert "mismatched_keys" in problem and "model.layers.0.mlp.up_proj.weight" in problem


def test_config_with_another_number_of_layers(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    problem = refusal(ConversionError, folder)
    assert "do not fit config.json" in problem and "model.layers.2" in problem


def test_missing_weights(folder):
    next(iter(folder.glob("*.safetensors"))).unlink()
    assert "is incomplete, missing: model-0000" in refusal(ConversionError, folder)


def test_missing_and_extra_tensors_are_all_named(folder):
    path = next(path for path in folder.glob("*.safetensors") if len(load_file(path)) > 1)
    tensors = load_file(path)
    lost = [name for name in tensors if name.startswith("model.layers")][:2]
    save_file({**{k: v for k, v in tensors.items() if k not in lost}, "model.extra": torch.ones(1)}, path)
    problem = refusal(ConversionError, folder)
    assert "unexpected_keys" in problem and "missing_keys" in problem
    assert all(name in problem for name in [*lost, "model.extra"])


def test_tokenizer_that_is_too_large(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"<{number}>": number for number in range(len(vocab), 600)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "it has 600 tokens, the model's vocab_size is 512" in refusal(ConversionError, folder)


def test_tokenizer_with_other_special_tokens(folder):
    edit(folder / "tokenizer_config.json", eos_token="<s>", bos_token="</s>")
    problem = refusal(ConversionError, folder)
    assert "the tokenizer is not the model's" in problem and "its eos_token_id is 1, the model's 2" in problem


def test_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert "missing: tokenizer.json" in refusal(ConversionError, folder)


def test_truncated_weights(folder):
    path = next(iter(folder.glob("*.safetensors")))
    path.write_bytes(path.read_bytes()[:-100])
    assert "the weights cannot be loaded" in refusal(ConversionError, folder)


def test_damaged_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in refusal(ConversionError, folder)


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": 1}')
    assert "the tokenizer cannot be loaded" in refusal(ConversionError, folder)


def test_unknown_dtype(folder):
    assert "dtype 'int8' is not valid" in refusal(ConfigError, folder, dtype="int8")


def test_unknown_device(folder):
    assert "device 'gpu' is not known" in refusal(ConfigError, folder, device="gpu")


def test_device_that_is_not_there(folder):
    assert "is not there" in refusal(EnvironmentFault, folder, device="cuda:99")
