"""training.compile: loop. Equal to eager, few graphs whatever the number of layers, and no silent way back to eager.

The fast tests trace and differentiate for real and leave out only the generation of machine code (backend aot_eager);
the slow ones run what training runs.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.training.pipeline import wrap_loops, wrap_loss
from tests.configs import tiny_run
from tests.parity import test_engines

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from eager_reference import EagerReference

PLAIN = {"max_loops": 0, "residual_scale": "inverse_depth", "local_slots": 0, "global_slots": 0, "ponder_weight": 0.0}
MODELS = {
    "memory": {},
    "no-memory": {"local_slots": 0, "global_slots": 0},
    "one-loop": {"max_loops": 1, "ponder_weight": 0.0},
    "plain": PLAIN,
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_code_generation(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def build(model, dtype=torch.float32, **training):
    config = tiny_run(model=model, training=training)
    net = LoopMemLM(config.model, TorchBackend())
    initialize(net.named_parameters(), config.model, 0)
    wrap_loops(net, config.training)
    return net.to(dtype)


def batch():
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(net):
    """Loss and gradients of the second of two passes, so that every cached graph has been used again."""
    for _ in range(2):
        net.zero_grad()
        loss = net(*batch()).loss
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_equals_eager(model, relative, **training):
    loss, compiled = gradients(build(model, compile="loop", **training))
    eager_loss, eager = gradients(build(model))
    torch.testing.assert_close(loss, eager_loss, rtol=1e-6, atol=0)
    for name, expected in eager.items():
        error = (compiled[name] - expected).abs().max()
        # LN_k's bias shifts all scores of a read alike: its exact gradient is zero, 1e-7 is float32 noise about it.
        assert error <= 1e-7 + relative * expected.abs().max(), f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_and_number_of_graphs(kind, checkpointing, without_code_generation):
    """Two graphs for looped layers, one where there is one loop, one for plain layers of all residual scales."""
    assert_equals_eager(MODELS[kind] | {"num_hidden_layers": 12}, 1e-6, activation_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] == (1 if kind in ("one-loop", "plain") else 2)
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", ["memory", "plain"])
def test_validation_adds_one_graph(kind, without_code_generation):
    net = build(MODELS[kind] | {"num_hidden_layers": 12}, compile="loop")
    gradients(net)
    training_graphs = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        compiled = net(*batch())
    assert counters["stats"]["unique_graphs"] == training_graphs + 1
    torch.testing.assert_close(compiled.logits, build(MODELS[kind] | {"num_hidden_layers": 12})(*batch()).logits)


def cross_entropy_and_gradient(logits, compile):
    logits = logits.clone().requires_grad_()
    loss = wrap_loss(TorchBackend().cross_entropy, tiny_run(training={"compile": compile}).training)(logits, batch()[1])
    held = sum(tensor.nbytes for tensor in loss.grad_fn.saved_tensors) if compile == "loop" else None
    loss.backward()
    return loss.detach(), logits.grad, held


def test_the_loss_is_compiled_too(without_code_generation):
    logits = torch.randn(2, 16, 96)
    loss, gradient, _ = cross_entropy_and_gradient(logits, "loop")
    expected_loss, expected, _ = cross_entropy_and_gradient(logits, "none")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_generated_loss_holds_no_copy_of_the_logits(dtype):
    """What `loopmem estimate` counts: the logits in their own dtype, and two numbers a token."""
    logits = torch.randn(2, 16, 96).to(dtype)
    loss, gradient, held = cross_entropy_and_gradient(logits, "loop")
    expected_loss, expected, _ = cross_entropy_and_gradient(logits, "none")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
    labels, number = 8 * 2 * 16, 4
    assert held == logits.nbytes + 2 * 4 * 2 * 16 + labels + number


def test_too_many_graphs_is_an_error_not_eager(without_code_generation):
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(FailOnRecompileLimitHit):
        gradients(build({}, compile="loop"))


def test_no_compiler_is_a_named_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    missing = {"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}
    with torch._inductor.config.patch(missing), pytest.raises(EnvironmentFault, match=r"C\+\+ compiler") as caught:
        gradients(build(PLAIN, compile="loop"))
    assert "training.compile=none" in caught.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("kind", ["memory", "plain"])
def test_generated_code_equals_eager(kind, checkpointing):
    assert_equals_eager(MODELS[kind] | {"num_hidden_layers": 12}, 1e-5, activation_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] == (1 if kind == "plain" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_training_with_compiled_loops_equals_one_process(zero_stage, checkpointing):
    training = {"compile": "loop", "activation_checkpointing": checkpointing}
    test_engines.check(tiny_run(parallel={"zero_stage": zero_stage}, training=training), 2)


@pytest.mark.parametrize("model", [{}, {"local_slots": 0, "global_slots": 0}], ids=["memory", "no-memory"])
def test_the_eager_reference_of_the_benchmark_computes_the_same(model):
    model = {**model, "num_key_value_heads": 4}
    reference = EagerReference(tiny_run(model=model).model)
    ours = build(model)
    reference.load_state_dict(ours.state_dict())
    loss = reference(*batch())
    loss.backward()
    expected_loss, expected = gradients(ours)
    torch.testing.assert_close(loss.detach(), expected_loss)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)
