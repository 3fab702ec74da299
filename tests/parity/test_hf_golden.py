"""The Hugging Face form of the model against the golden vectors: outputs and gradients, float64 and float32."""

import pytest
import torch

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from tests.golden_vectors import NAMES, load_golden


def run(name: str, dtype: torch.dtype):
    """The model on all T + 1 golden tokens with unshifted labels: its loss is the golden one over T positions."""
    golden = load_golden(name)
    model = LoopMemForCausalLM(LoopMemConfig(**golden.spec)).to(dtype)
    model.load_state_dict(golden.params, strict=True)  # of a tied model without a head of its own
    output = model(input_ids=golden.token_ids, labels=golden.token_ids, output_loop_stats=True)
    output.loss.backward()
    return golden, model, output


def named_outputs(output) -> dict[str, torch.Tensor]:
    """Cut to the T positions of the golden outputs: the last token predicts nothing there."""
    named = {
        "logits": output.logits[:, :-1],
        "cross_entropy": output.cross_entropy,
        "ponder_cost": output.ponder_cost,
        "loss": output.loss,
    }
    for index, stats in enumerate(output.loop_stats):
        named[f"layers.{index}.halting_probs"] = stats.halting_probs[:, :-1]
        named[f"layers.{index}.expected_loops"] = stats.expected_loops()[:, :-1]
    return named


def assert_equals_golden(golden, model, output, relative: float, absolute: float) -> None:
    outputs, grads = named_outputs(output), {n: p.grad for n, p in model.named_parameters()}
    # A gate's mean runs over all tokens, so over one more than the golden one: see test_gates.
    expected_outputs = {key: value for key, value in golden.outputs.items() if not key.endswith("_gate_mean")}
    assert set(expected_outputs) <= set(outputs)
    assert set(golden.grads) == set(grads)
    for kind, expected, actual in (("output", expected_outputs, outputs), ("grad", golden.grads, grads)):
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
    # Tolerances as in test_golden.py.
    assert_equals_golden(*run(name, torch.float32), relative=1e-4, absolute=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_gates(name):
    golden, model, _ = run(name, torch.float64)
    output = model(input_ids=golden.token_ids[:, :-1], output_loop_stats=True)
    gates = {
        f"layers.{index}.{bank}_gate_mean": gate.mean()
        for index, stats in enumerate(output.loop_stats)
        for bank, gate in (("local", stats.local_gate), ("global", stats.global_gate))
        if gate is not None
    }
    expected = {key: value for key, value in golden.outputs.items() if key.endswith("_gate_mean")}
    assert gates.keys() == expected.keys()
    for key, value in expected.items():
        assert abs(float(gates[key] - value)) < 1e-9, key
