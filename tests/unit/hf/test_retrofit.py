"""A dense model with loops and banks added computes what it did, and can learn to do more; others are refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loopmem_pretrain.config.model import ModelConfig, model_problems
from loopmem_pretrain.errors import ConfigError, ConversionError
from loopmem_pretrain.hf.export import huggingface_config, write_settings
from loopmem_pretrain.hf.retrofit import dense_fields
from loopmem_pretrain.hf.source import check_model, check_tensors, open_source, weights_of
from loopmem_pretrain.hf.verify import reference_model
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.block import rotary_angles
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.dense_models import DENSE, SIZES, dense_model, save_dense
from tests.unit.hf.conftest import model_config, native_model

LOOPED = {"max_loops": 3, "local_slots": 8, "global_slots": 4}
NOT_LOOPED = {"max_loops": 0, "residual_scale": "one"}
ADDED = {"loops and memory": LOOPED, "one loop": {"max_loops": 1}, "not looped": NOT_LOOPED}


def shapes_of(model):
    with torch.device("meta"):
        return {name: list(p.shape) for name, p in LoopMemLM(model, TorchBackend()).named_parameters()}


def retrofit(folder, **added):
    source = open_source(folder)
    model = ModelConfig(**{**source.fields, **added})
    assert not model_problems(model)
    check_model(source, model, "run.yaml")
    shapes = shapes_of(model)
    check_tensors(source, shapes)
    return reference_model(model, dict(weights_of(source, model, shapes, 3)))


def tokens(count=64):
    return torch.randint(0, SIZES["vocab_size"], (2, count), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    return {name: save_dense(root / name, name) for name in DENSE}


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", DENSE)
def test_computes_what_the_dense_model_computes(folders, name, added):
    model, ids = retrofit(folders[name], **ADDED[added]), tokens()
    with torch.no_grad():
        expected, found = dense_model(name)(ids).logits, model(ids[:, :-1], ids[:, 1:])
    scale = expected.abs().max().item()
    assert scale > 3
    torch.testing.assert_close(found.logits, expected[:, :-1], rtol=0, atol=3e-6 * scale)  # rounding of float32
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(loss.item(), abs=2e-6)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rotary_angles_are_those_of_transformers_to_the_last_bit(theta):
    """theta^-x in place of 1 / theta^x moved logits of a random Llama by 8e-4 of the largest at 4,096 tokens."""
    config = LlamaConfig(head_dim=128, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    positions, like = torch.arange(8192), torch.empty(0)
    cos, sin = LlamaRotaryEmbedding(config)(like, positions[None])
    ours = rotary_angles(positions, 128, theta, like)
    assert torch.equal(ours.cos[:, 0], cos[0])
    assert torch.equal(ours.sin[:, 0, 64:], sin[0, :, 64:]) and torch.equal(-ours.sin[:, 0, :64], sin[0, :, :64])


@pytest.mark.parametrize("name", DENSE)
def test_what_is_added_changes_as_little_as_rounding(folders, name):
    """In float64, beside the same model that does not loop."""
    with torch.no_grad():
        plain, looped = (retrofit(folders[name], **added).double()(tokens()).logits for added in (NOT_LOOPED, LOOPED))
    assert 0 < (plain - looped).abs().max() < 5e-7 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size_are_taken_as_they_are(tmp_path, dtype):
    dense_model("llama").to(dtype).save_pretrained(tmp_path)
    model = retrofit(tmp_path, max_loops=2)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, dict(model.named_parameters())[name].to(dtype)) for name, value in stored.items())


def test_shards_are_read_alike(tmp_path, folders):
    dense_model("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = (retrofit(folder, max_loops=2).state_dict() for folder in (folders["qwen3"], tmp_path))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_all_loops_but_the_first_hardly_count(folders):
    model = retrofit(folders["llama"], **LOOPED)
    layer = model.model.layers[0]
    assert F.softplus(layer.step_scales)[0].item() == 1.0
    stats = model(tokens()).stats[0]
    assert stats.halting_probs[..., 0].min().item() == pytest.approx(1 - 4.54e-5, abs=1e-7)
    assert not layer.memory.local_proj.weight.any() and not layer.memory.global_proj.weight.any()
    assert layer.memory.local_keys.std().item() == pytest.approx(0.02, rel=0.2)


def gradients(model):
    ids = tokens()
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    return {name: parameter.grad for name, parameter in model.model.layers[0].named_parameters()}


def test_what_is_new_can_be_learned(folders):
    found = gradients(retrofit(folders["llama"], **LOOPED))
    for name in ("halting.weight", "halting.bias", "step_scales", "memory.local_proj.weight"):
        assert found[name].abs().max() > 0, name
    assert (found["step_scales"] != 0).all()


def test_with_lambda_one_to_the_last_bit_it_could_not(folders):
    """Why the router's bias is 10 and not 17."""
    model = retrofit(folders["llama"], **LOOPED)
    for layer in model.model.layers:
        layer.halting.bias.data.fill_(17.0)
    found = gradients(model)
    assert not found["halting.weight"].any() and not found["halting.bias"].any()
    assert not found["step_scales"][1:].any()


# ----------------------------------------------------------------------------------------------------- what is refused


def edited(folder, target, **changes):
    """A copy of a saved model with other values in config.json; None removes a key."""
    values = json.loads((folder / "config.json").read_text()) | changes
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if not (target / "model.safetensors").exists():
        (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


def refusal(folder, kind=ConversionError):
    with pytest.raises(kind) as caught:
        open_source(folder)
    return str(caught.value)


PUBLISHED = {  # config.json as it was published, before transformers 5
    "llama 2": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
         "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000},
        {"head_dim": None, "rope_theta": 1e4, "qk_norm": "none", "attention_bias": "none"},
    ),
    "qwen 2.5": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 21,
         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
         "vocab_size": 151936},
        {"head_dim": None, "rope_theta": 1e6, "qk_norm": "none", "attention_bias": "qkv", "vocab_size": 151936},
    ),
    "qwen 3": (
        {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
         "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
        {"head_dim": 128, "rope_theta": 1e6, "qk_norm": "before_rope", "attention_bias": "none"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_older_forms_of_config_json(values, expected):
    fields = dense_fields(values, "config.json")
    assert {key: fields[key] for key in expected} == expected
    assert not model_problems(ModelConfig(**fields, max_loops=2))


SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["original_max_position_embeddings"] = 128
REFUSED = [
    ("llama", {"rope_parameters": SCALED}, "rope_type 'llama3'; valid: 'default'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type 'linear'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5; valid: 1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu'; valid: 'silu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias: true"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'quant_method': 'gptq'"),
    ("mistral", {"sliding_window": 16}, "attention is cut to sliding_window 16"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}, "cut to sliding_attention"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "attention is cut to sliding_attention"),
    ("qwen3", {"num_hidden_layers": "two"}, "transformers does not take it for a qwen3 model"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_a_model_that_cannot_be_matched(folders, tmp_path, name, changes, message):
    assert message in refusal(edited(folders[name], tmp_path, **changes))


def test_every_reason_at_once(folders, tmp_path):
    said = refusal(edited(folders["llama"], tmp_path, hidden_act="relu", mlp_bias=True, rope_parameters=SCALED))
    assert "hidden_act: 'relu'" in said and "mlp_bias" in said and "rope_type 'llama3'" in said


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3_moe", "gemma2", None, 3])
def test_another_kind_of_model(folders, tmp_path, kind):
    said = refusal(edited(folders["llama"], tmp_path, model_type=kind), ConfigError)
    assert f"model_type is {kind!r}" in said and "valid: loopmem, llama, mistral, qwen2, qwen3" in said


def test_no_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere", ConfigError)


def test_no_model(tmp_path):
    assert "holds no config.json: it is no model of transformers" in refusal(tmp_path, ConfigError)


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff\ud7ff"])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert "config.json is damaged" in refusal(tmp_path)


def test_weights_that_are_not_read(folders, tmp_path):
    edited(folders["llama"], tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    said = refusal(tmp_path)
    assert "has no model.safetensors; beside it pytorch_model.bin, which are not read" in said


def test_a_file_cut_short(folders, tmp_path):
    edited(folders["llama"], tmp_path)
    content = (folders["llama"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("table", [None, [], {"lm_head.weight": 3}, {"lm_head.weight": "../model.safetensors"}])
def test_an_index_that_cannot_be_followed(folders, tmp_path, table):
    edited(folders["llama"], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert "weight_map is no table" in (said := refusal(tmp_path)) or "has no ../model.safetensors" in said


def with_tensors(folder, target, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_every_tensor_that_does_not_fit_is_named(folders, tmp_path):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(32, 32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # follows from the config

    with pytest.raises(ConversionError) as caught:
        retrofit(with_tensors(folders["llama"], tmp_path, change), max_loops=2)
    problems = str(caught.value).split("\n  what")[0].split("\n    ")[1:]
    assert sorted(problems) == [
        "lm_head.weight: I8, expected one of F32, BF16, F16",
        "model.layers.0.mlp.up_proj.weight: missing",
        "model.layers.1.self_attn.k_proj.weight: shape [32, 32], expected [16, 32]",
        "model.layers.2.input_layernorm.weight: not expected",
        "model.norm.weight: missing",
    ]


def test_numbers_that_are_not_finite(folders, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    with pytest.raises(ConversionError, match=r"model\.norm\.weight in .*: 1 of 32 numbers not finite"):
        retrofit(with_tensors(folders["llama"], tmp_path, change), max_loops=2)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_too(folders, tmp_path, equal):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)

    folder = with_tensors(folders["qwen2"], tmp_path, change)
    if equal:
        retrofit(folder, max_loops=2)
    else:
        with pytest.raises(ConversionError, match=r"lm_head\.weight .* is not model\.embed_tokens\.weight"):
            retrofit(folder, max_loops=2)


def test_a_model_that_is_not_that_of_the_weights(folders):
    source = open_source(folders["qwen3"])
    other = ModelConfig(**{**source.fields, "max_loops": 0, "residual_scale": "inverse_depth", "head_dim": None})
    with pytest.raises(ConfigError) as caught:
        check_model(source, other, "run.yaml")
    said = str(caught.value)
    assert "model.head_dim: None, the weights need 16" in said
    assert "model.residual_scale: inverse_depth, the weights need one" in said
    assert "write this as the section `model`; max_loops, slots and gates are your choice:" in said
    assert "\n    head_dim: 16\n" in said and "\n    qk_norm: before_rope\n" in said


# --------------------------------------------------------------------------------------------------- an exported model


def exported(folder, tokenizer, variant="full"):
    model = native_model(model_config(variant))
    folder.mkdir()
    write_settings(folder, huggingface_config(model.config, tokenizer, 48, "float32"))
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("variant", ["full", "tied", "qwen", "plain"])
def test_an_exported_model_comes_back_bit_for_bit(tmp_path, tokenizer, variant):
    model = exported(tmp_path / "out", tokenizer, variant)
    source = open_source(tmp_path / "out")
    check_model(source, model.config.model_copy(update={"ponder_weight": 0.5}), "run.yaml")
    shapes = shapes_of(model.config)
    check_tensors(source, shapes)
    back = dict(weights_of(source, model.config, shapes, 3))
    assert list(back) == list(shapes)
    assert all(torch.equal(value, back[name]) for name, value in model.named_parameters())


def test_an_exported_model_lacks_nothing(tmp_path, tokenizer):
    model = exported(tmp_path / "out", tokenizer)
    folder = with_tensors(tmp_path / "out", tmp_path / "less", lambda t: t.pop("model.layers.1.step_scales"))
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.step_scales: missing"):
        check_tensors(open_source(folder), shapes_of(model.config))


def test_a_config_of_a_later_version(tmp_path, tokenizer):
    exported(tmp_path / "out", tokenizer)
    folder = edited(tmp_path / "out", tmp_path / "later", loop_shape="spiral", warp=9)
    assert "unknown keys loop_shape, warp" in refusal(folder)


def test_a_config_that_is_none_of_ours(tmp_path, tokenizer):
    exported(tmp_path / "out", tokenizer)
    assert "max_loops: -1 is not valid" in refusal(edited(tmp_path / "out", tmp_path / "bad", max_loops=-1))
