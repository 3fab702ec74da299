"""Looping, halting and memory: fixtures of the method, forced loops, precision, gradients everywhere."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model import block, loopmem, memory
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.block import add_scaled, rotary_angles, rotate
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopedLayer, LoopMemLM
from loopmem_pretrain.model.memory import dense_read
from tests.configs import TINY_MODEL


def build(seed=0, dtype=torch.float32, **changes) -> LoopMemLM:
    config = ModelConfig(**{**TINY_MODEL, **changes})
    model = LoopMemLM(config, TorchBackend())
    initialize(model.named_parameters(), config, seed)
    return model.to(dtype)


def ids(batch=2, tokens=12, seed=0):
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def set_lambda(model, value):
    """Make every router say `value`, whatever it sees."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.halting.weight)
        torch.nn.init.constant_(layer.halting.bias, math.log(value / (1 - value)))


@pytest.mark.parametrize(("loops", "expected"), [(1, 1.0), (3, 1.75), (5, 1.9375), (7, 1.984375)])
def test_expected_loops_at_lambda_half(loops, expected):
    model = build(max_loops=loops, ponder_weight=0.0)
    set_lambda(model, 0.5)
    for stats in model(ids()).stats:
        torch.testing.assert_close(stats.expected_loops(), torch.full((2, 12), expected))
        torch.testing.assert_close(stats.halting_probs.sum(-1), torch.ones(2, 12))
    if loops == 3:
        assert stats.halting_probs[0, 0].tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("num_loops", [1, 2, 3, 5])
def test_forced_loops(num_loops):
    model = build()
    stats = model(ids(), num_loops=num_loops).stats[0]
    assert stats.halting_probs.shape == (2, 12, num_loops)
    torch.testing.assert_close(stats.halting_probs.sum(-1), torch.ones(2, 12))


def test_forced_loops_beyond_training_repeat_the_last_scale():
    model = build(num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.step_scales.copy_(torch.tensor([0.0, 1.0, 2.0]))
    longer = build(num_hidden_layers=1, max_loops=4)
    longer.load_state_dict({**model.state_dict(), "model.layers.0.step_scales": torch.tensor([0.0, 1.0, 2.0, 2.0])})
    # Scales agree; tau does not (it is 1 from the third loop on), so take the routers' tau weight out.
    for one in (layer, longer.model.layers[0]):
        torch.nn.init.zeros_(one.halting.weight[:, -1:])
    torch.testing.assert_close(model(ids(), num_loops=4).logits, longer(ids()).logits)


def test_one_loop_equals_the_block():
    model = build(max_loops=1, local_slots=0, global_slots=0, ponder_weight=0.0)
    layer = model.model.layers[0]
    hidden = model.model.embed_tokens(ids())
    expected = layer.block(hidden, F.softplus(layer.step_scales[0]), layer.rotary(hidden))
    torch.testing.assert_close(layer(hidden)[0], expected)


@pytest.mark.parametrize(
    "changes", [{}, {"max_loops": 1, "ponder_weight": 0.0}, {"gate": "scalar"}, {"local_slots": 0}]
)
def test_every_parameter_gets_a_gradient(changes):
    model = build(**changes)
    model(ids(), labels=ids(seed=1)).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_the_router_learns_from_cross_entropy_alone():
    model = build(ponder_weight=0.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.step_scales.fill_(0.0)
    model(ids(), labels=ids(seed=1)).loss.backward()
    assert all(layer.halting.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_bank_read_is_a_softmax_over_slots():
    query, keys, values = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    expected = torch.softmax(query @ keys.T / math.sqrt(8), dim=-1) @ values
    (read,) = TorchBackend().softmax_reads([dense_read(query, keys, values)])
    torch.testing.assert_close(read, expected)


@pytest.mark.parametrize(("bias", "gate"), [(-3.0, 0.047426), (0.0, 0.5), (3.0, 0.952574)])
@pytest.mark.parametrize("kind", ["vector", "scalar", "constant"])
def test_gate_at_the_start(bias, gate, kind):
    stats = build(gate=kind, gate_init_bias=bias)(ids()).stats[0]
    for mean in (stats.local_gate, stats.global_gate):
        torch.testing.assert_close(mean, torch.full((3,), gate), atol=1e-6, rtol=0)


def test_keys_are_normalised_once_a_forward(monkeypatch):
    shapes = []
    real = F.layer_norm

    def counting(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", counting)
    build()(ids())
    assert shapes.count((8, 32)) == 2  # local bank: once a layer visit, not once a loop
    assert shapes.count((4, 32)) == 1  # global bank: once a forward


def test_bfloat16_keeps_halting_and_mixture_in_float32():
    model = build(dtype=torch.bfloat16)
    seen = []

    def spy(layer):
        run = layer.one_loop

        def wrapped(state, zeta, *rest):
            new_state, report = run(state, zeta, *rest)
            seen.append((zeta.dtype, new_state.remaining.dtype, new_state.output.dtype, report.halting_prob.dtype))
            assert new_state.hidden.dtype == torch.bfloat16
            return new_state, report

        layer.run = wrapped

    for layer in model.model.layers:
        spy(layer)
    output = model(ids(), labels=ids())
    assert set(seen) == {(torch.float32,) * 4}
    assert output.logits.dtype == torch.bfloat16
    assert output.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(output.stats[0].halting_probs.sum(-1), torch.ones(2, 12), rtol=0, atol=1e-6)


def test_float64_is_never_narrowed():
    output = build(dtype=torch.float64)(ids(), labels=ids())
    assert {output.logits.dtype, output.loss.dtype, output.stats[0].halting_probs.dtype} == {torch.float64}


def test_attention_is_causal_and_loops_do_not_leak():
    model, tokens = build(), ids()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 96
    torch.testing.assert_close(model(tokens).logits[:, :7], model(changed).logits[:, :7])


def test_rotation_depends_on_relative_position_only():
    rotary = rotary_angles(torch.arange(16), 8, 500000.0, torch.zeros(1, dtype=torch.float64))
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned_q = rotate(q.expand(1, 16, 1, 8), rotary)[0, :, 0]
    turned_k = rotate(k.expand(1, 16, 1, 8), rotary)[0, :, 0]
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[5, 3], scores[9, 7])
    torch.testing.assert_close(scores[0, 0], q @ k)


def test_angles_are_rounded_to_bfloat16_once():
    """Positions and frequencies in bf16, of 8 bits, would give positions that are hundreds apart the same angles."""
    positions = torch.tensor([0, 1, 255, 257, 1023, 4095])
    exact = rotary_angles(positions, 64, 500000.0, torch.zeros(1, dtype=torch.float64))
    rotary = rotary_angles(positions, 64, 500000.0, torch.zeros(1, dtype=torch.bfloat16))
    for ours, expected in zip(rotary, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # float32 knows a frequency to 2^-24, so the angle of position 4095 to 3e-4; then bf16 rounds by 2^-9 at most.
        torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-3)


def test_plain_layers_scale_by_depth():
    model = build(max_loops=0, residual_scale="inverse_depth", local_slots=0, global_slots=0, ponder_weight=0.0)
    assert [layer.scale for layer in model.model.layers] == [1.0, 0.5]
    assert model(ids(), labels=ids()).ponder_cost == 0


def test_two_models_share_nothing():
    first, second = build(seed=1), build(seed=2)
    before = second(ids()).logits
    with torch.no_grad():
        first.model.memory.global_keys.zero_()
    torch.testing.assert_close(second(ids()).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(("field", "value"), [("gate", "matrix"), ("retrieval", "hash")])
def test_unknown_variants_are_named(field, value):
    from types import SimpleNamespace

    config = SimpleNamespace(**{**ModelConfig(**TINY_MODEL).model_dump(), "head_width": 8, field: value})
    with pytest.raises(ValueError, match=value):
        LoopMemLM(config, TorchBackend())


def test_the_math_files_know_no_process_groups():
    for module in (loopmem, block, memory):
        assert "distributed" not in Path(module.__file__).read_text()
    assert LoopedLayer.one_loop.__doc__


def test_a_step_scale_is_not_rounded_to_bfloat16_on_the_way():
    """Two scales within one bf16 step give different outputs, and the scale's gradient is the float32 one."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(64, 64, generator=generator, dtype=torch.bfloat16) for _ in range(2))
    low, high = torch.tensor(1.0, requires_grad=True), torch.tensor(1.003)
    assert low.bfloat16() == high.bfloat16()
    assert not torch.equal(add_scaled(x * 0, low, branch), add_scaled(x * 0, high, branch))
    exact = (x.float() + high * branch.float()).bfloat16()
    assert torch.equal(add_scaled(x, high, branch), exact)
    add_scaled(x, low, branch).sum().backward()
    torch.testing.assert_close(low.grad, branch.float().sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("retrieval", ["dense", "topk", "product_keys"])
def test_projecting_slots_or_reads_is_the_same(retrieval, monkeypatch):
    """P (softmax V) = softmax (V P^T): which of the two is computed changes neither outputs nor gradients."""
    fields = {"global_slots": 16, "local_slots": 8, "retrieval": retrieval}
    fields |= {"retrieval_topk": 3} if retrieval != "dense" else {}
    losses, seen = [], []
    for never in (False, True):
        model = build(dtype=torch.float64, **fields)
        for layer in model.model.layers:
            make = layer.memory.banks

            def banks(shared, reads, make=make, never=never):
                made = make(shared, 0 if never else reads)
                seen.append((made.local_bank.projected, made.global_bank.projected))
                return made

            monkeypatch.setattr(layer.memory, "banks", banks)
        loss = model(ids(), labels=ids(seed=1)).loss
        loss.backward()
        losses.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert seen == [(True, True)] * 2 + [(False, False)] * 2
    torch.testing.assert_close(*(loss for loss, _ in losses), rtol=1e-12, atol=0)
    for name, gradient in losses[0][1].items():
        torch.testing.assert_close(gradient, losses[1][1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_slots_are_projected_where_they_are_fewer_than_reads():
    memory = build(local_slots=8, global_slots=16).model.layers[0].memory
    shared = build(local_slots=8, global_slots=16).model.memory()
    for reads, expected in ((7, (False, False)), (8, (True, False)), (16, (True, True))):
        made = memory.banks(shared, reads)
        assert (made.local_bank.projected, made.global_bank.projected) == expected
