"""What other tools do to a model: quantizers, autocast."""

import pytest
import torch

from tests.unit.hf.test_modeling import IDS, pair


@pytest.fixture(scope="module")
def looped():
    return pair("full")


# ----------------------------------------------------------------------------------------------- quantizers, autocast


@pytest.mark.filterwarnings("ignore")  # torch says that torchao will take its place
@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.99}], ids=str)
def test_quantized_linear_layers(looped, settings):
    """Every nn.Linear is replaced, and what is none stays as it was."""
    _, model = looped
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(type(part) is torch.nn.Linear for part in quantized.modules())
    for ours, kept in zip(quantized.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.halting.weight, kept.halting.weight)
    with torch.no_grad():
        logits, exact = quantized(IDS, **settings).logits, model(IDS, **settings).logits
    assert 0 < (logits - exact).norm() < 0.15 * exact.norm()  # of models without loops it is 0.07


@pytest.mark.parametrize("settings", [{}, {"exit_threshold": 0.99}], ids=str)
def test_halting_is_float32_under_autocast(looped, settings):
    _, model = looped
    layer, hidden, tau = model.model.layers[0], torch.randn(2, 3, 32), torch.tensor(0.5)
    exact = layer.halting(hidden, tau)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.halting(hidden, tau), exact) and layer.self_attn.q_proj(hidden).dtype == torch.bfloat16
        stats = model(IDS, output_loop_stats=True, **settings).loop_stats
    assert {each.halting_probs.dtype for each in stats} == {torch.float32}
