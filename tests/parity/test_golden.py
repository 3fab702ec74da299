"""The model against independent float64 vectors: outputs and gradients, float64 and float32."""

import pytest
import torch

from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.golden_vectors import NAMES, as_config, load_golden


def run(name: str, dtype: torch.dtype, prepare=lambda model: None):
    golden = load_golden(name)
    model = LoopMemLM(as_config(golden.spec), TorchBackend()).to(dtype)
    params = dict(golden.params)
    if golden.spec["tie_word_embeddings"]:
        params["lm_head.weight"] = params["model.embed_tokens.weight"]
    model.load_state_dict(params, strict=True)
    prepare(model)
    output = model(golden.token_ids[:, :-1], labels=golden.token_ids[:, 1:])
    output.loss.backward()
    return golden, model, output


def named_outputs(output) -> dict[str, torch.Tensor]:
    named = {
        "logits": output.logits,
        "cross_entropy": output.cross_entropy,
        "ponder_cost": output.ponder_cost,
        "loss": output.loss,
    }
    for index, stats in enumerate(output.stats):
        named[f"layers.{index}.halting_probs"] = stats.halting_probs
        named[f"layers.{index}.expected_loops"] = stats.expected_loops()
        for bank in ("local", "global"):
            gate = getattr(stats, f"{bank}_gate")
            if gate is not None:
                named[f"layers.{index}.{bank}_gate_mean"] = gate.mean()
    return named


def assert_equals_golden(golden, model, output, relative: float, absolute: float) -> None:
    outputs, grads = named_outputs(output), {n: p.grad for n, p in model.named_parameters()}
    assert set(golden.outputs) <= set(outputs)
    assert set(golden.grads) == set(grads)
    for kind, expected, actual in (("output", golden.outputs, outputs), ("grad", golden.grads, grads)):
        for key, value in expected.items():
            assert actual[key] is not None, f"{kind} {key}"
            error = (actual[key].double() - value).abs().max()
            scale = value.abs().max()
            assert error <= absolute + relative * scale, f"{kind} {key}: {error:.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    assert_equals_golden(*run(name, torch.float64), relative=0, absolute=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    # 1e-4 relative to each tensor's largest entry. LN_k's bias shifts all scores of a read alike, so its exact gradient
    # is zero: 1e-7 is float32 noise about it.
    assert_equals_golden(*run(name, torch.float32), relative=1e-4, absolute=1e-7)


def test_five_files_are_there():
    assert NAMES == ["global_only", "loop_memory", "loop_only_gqa", "memory_one_loop", "plain_inverse_depth"]
