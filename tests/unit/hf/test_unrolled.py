"""A model of one loop without memory leaves as a dense model of transformers, and nothing else does."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConversionError
from loopmem_pretrain.hf.export import export
from loopmem_pretrain.hf.unrolled import UnrolledWeights, check_unrolled, dense_config
from tests.unit.hf.conftest import SIZES, TEXTS, model_config, native_model

PLAIN = ModelConfig(**SIZES, max_loops=0, residual_scale="inverse_depth")
SETTINGS = {"max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "dtype": "float32"}


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        PLAIN.model_copy(update={"residual_scale": "one", "tie_word_embeddings": True}),
        ModelConfig(**SIZES, max_loops=1),
        ModelConfig(**SIZES, max_loops=3),
    ],
    ids=["inverse_depth", "one, tied", "one loop", "the first of three loops"],
)
def test_computes_the_same(config):
    model = native_model(config)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    dense = AutoModelForCausalLM.from_config(dense_config(config, SETTINGS)).eval()
    unrolled = dict(UnrolledWeights(config, weights, weights))
    if config.tie_word_embeddings:
        unrolled["lm_head.weight"] = unrolled["model.embed_tokens.weight"]
    dense.load_state_dict(unrolled, strict=True)
    ids = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids, num_loops=1).logits
    assert torch.allclose(dense(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def test_more_loops_or_memory_are_refused_with_every_reason():
    with pytest.raises(ConversionError) as caught:
        check_unrolled(model_config("full"), 2)
    problem = caught.value.problem
    assert "with 2 loops a layer's output is a mixture" in problem and "it reads memory banks" in problem
    assert "without --unrolled" in caught.value.fix
    with pytest.raises(ConversionError, match="0 loops: valid is 1"):
        check_unrolled(model_config("loop"), 0)
    check_unrolled(model_config("loop"), 1)
    with pytest.raises(ConversionError, match=r"its attention \(qk_norm before_rope, attention_bias qkv\)"):
        check_unrolled(model_config("qwen"), 1)


@pytest.mark.parametrize(
    "changes",
    [{"local_slots": 4}, {"global_slots": 4}, {"attention_bias": "qkv"}, {"qk_norm": "none"}],
    ids=str,
)
def test_each_reason_is_enough(changes):
    check_unrolled(ModelConfig(**SIZES, max_loops=1), 1)
    with pytest.raises(ConversionError):
        check_unrolled(ModelConfig(**SIZES, max_loops=1, **changes), 1)


def test_what_an_export_in_bfloat16_is_compared_with():
    """Weights of this model whose dense form is, number by number, what is written: rounded after they are scaled."""
    config = ModelConfig(**SIZES, max_loops=1)
    weights = {name: value.detach() for name, value in native_model(config).named_parameters()}
    unrolled = UnrolledWeights(config, weights, weights)
    rounded = unrolled.rounding(torch.bfloat16)
    assert unrolled.scale("model.layers.1.mlp.down_proj.weight") not in (0.5, 1.0, 2.0)  # it must matter which is first
    again = UnrolledWeights(config, {name: rounded(name, value) for name, value in weights.items()}, weights)
    for name, value in unrolled.items():
        torch.testing.assert_close(again[name], value.bfloat16().float(), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export(tmp_path, tokenizer_path, dtype):
    config = ModelConfig(**SIZES, max_loops=3)
    model = native_model(config)

    def write():
        return export(
            config,
            dict(model.named_parameters()),
            tokenizer_path,
            tmp_path / "out",
            sample_texts=TEXTS,
            dtype=dtype,
            seq_length=48,
            overwrite=True,
            unrolled=1,
        )

    report = write()
    assert report.comparison.places == 3 * (2 + 1)
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((report.folder / "config.json").read_text())["model_type"] == "hunyuan_v1_dense"
    assert "trust_remote_code" not in (report.folder / "README.md").read_text()
    dense = AutoModelForCausalLM.from_pretrained(report.folder, dtype="auto")
    ids = torch.tensor([AutoTokenizer.from_pretrained(report.folder)(TEXTS[0])["input_ids"]])
    logits, expected = dense(ids).logits.float(), model(ids, num_loops=1).logits
    assert dense.dtype == getattr(torch, dtype)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4 if dtype == "float32" else 0.2)
    write()  # over itself
