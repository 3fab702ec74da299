"""An exported folder that computes something else is named by the first place that differs, and is gone."""

import pytest
import torch

from loopmem_pretrain.errors import ConversionError
from loopmem_pretrain.hf.export import huggingface_config, tokenize_samples, write_settings, write_tokenizer
from loopmem_pretrain.hf.fresh_load import convert_by_parts, watch
from loopmem_pretrain.hf.staging import staged
from loopmem_pretrain.hf.verify import verify_folder
from loopmem_pretrain.hf.weights import write_weights
from tests.unit.hf.conftest import TEXTS, model_config, native_model

SEQ_LENGTH = 48
LAYER = "model.layers.1."


@pytest.fixture
def exported_otherwise(tmp_path, tokenizer_path, tokenizer):
    """What export does, with a folder that `change(weights, config)` has altered, to whose code it may return more.

    Returns the error's text.
    """

    def export(change) -> str:
        model = native_model(model_config("full"))
        weights = {name: value.detach() for name, value in model.named_parameters()}
        with pytest.raises(ConversionError) as caught, staged(tmp_path / "out") as folder:
            write_tokenizer(folder, tokenizer_path, TEXTS)
            written = {name: value.clone() for name, value in weights.items()}
            config = huggingface_config(model.config, tokenizer, SEQ_LENGTH, "float32")
            added_code = change(written, config) or ""
            write_weights(folder, written, {name: list(value.shape) for name, value in written.items()}, "float32")
            write_settings(folder, config)
            with (folder / "modeling_loopmem.py").open("a") as code:
                code.write(added_code)
            verify_folder(folder, model.config, weights, TEXTS, tokenize_samples(tokenizer, TEXTS), SEQ_LENGTH)
        assert list(tmp_path.iterdir()) == []
        assert caught.value.fix
        return caught.value.problem

    return export


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("mlp.down_proj.weight", "hidden state of layer 1, loop 1"),
        pytest.param("step_scales", "hidden state of layer 1, loop 3", marks=pytest.mark.slow),
        pytest.param("memory.global_gate.bias", "global gate of layer 1, loop 1", marks=pytest.mark.slow),
        pytest.param("halting.bias", "halting probability of layer 1, loop 1", marks=pytest.mark.slow),
    ],
)
def test_other_weights(exported_otherwise, weight, first):
    def change(weights, config):
        weights[LAYER + weight].view(-1)[-1] += 0.01

    problem = exported_otherwise(change)
    assert f"computes something else, first in {first} (sample text 0): values differ by up to" in problem
    assert "allowed is" in problem


@pytest.mark.slow
def test_other_head(exported_otherwise):
    def change(weights, config):
        weights["lm_head.weight"][3] += 0.01

    assert "first in logits (sample text 0)" in exported_otherwise(change)


@pytest.mark.slow
def test_other_config(exported_otherwise):
    def change(weights, config):
        config.rope_theta = 10_000.0

    assert "first in hidden state of layer 0, loop 1" in exported_otherwise(change)


def test_what_is_no_number_is_no_small_difference(exported_otherwise):
    """Neither of a value nor of the loss: no comparison with NaN is true."""

    def change(weights, config):
        return """
_forward = LoopMemForCausalLM.forward
def _spoiled(self, *args, **others):
    output = _forward(self, *args, **others)
    if output.logits.shape[1] > 1:
        output.logits[0, 0, 0] = float("nan")
    return output
LoopMemForCausalLM.forward = _spoiled
"""

    assert "first in logits (sample text 0): values differ by up to nan" in exported_otherwise(change)


def test_lost_weights(exported_otherwise):
    def change(weights, config):
        del weights["model.memory.global_keys"]

    problem = exported_otherwise(change)
    assert "missing_keys" in problem and "model.memory.global_keys" in problem


@pytest.mark.slow
def test_a_broken_cache(exported_otherwise):
    """Logits of whole texts are the same; only text that is generated with the cache is not."""

    def change(weights, config):
        return """
_update = DynamicCache.update
DynamicCache.update = lambda self, keys, *others: _update(self, -keys, *others)
"""

    assert "greedy text differs at its token 0" in exported_otherwise(change)


def test_parts_compute_on_converted_weights_and_keep_their_own():
    model = native_model(model_config("tied"))
    ids = torch.arange(40)[None]
    expected = model(ids).logits
    convert_by_parts(model.bfloat16(), lambda name, value: value.float())
    kept = {name: value for name, value in model.named_parameters() if "layers" in name or "embed" in name}
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.dtype == torch.float32 and torch.allclose(logits, expected, atol=0.5)
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert torch.equal(model(ids).logits, logits)


def test_watch_tells_every_loop_in_order():
    model, told = native_model(model_config("full")), []
    watch(model, lambda place, values: told.append((place, list(values.shape))))
    for _ in range(2):
        model(torch.arange(5)[None])
    assert len(told) == 2 * 2 * 3 * 4 and told[: len(told) // 2] == told[len(told) // 2 :]
    assert told[:5] == [
        ("local gate of layer 0, loop 1", [1, 5, 32]),
        ("global gate of layer 0, loop 1", [1, 5, 32]),
        ("hidden state of layer 0, loop 1", [1, 5, 32]),
        ("halting probability of layer 0, loop 1", [1, 5]),
        ("local gate of layer 0, loop 2", [1, 5, 32]),
    ]
