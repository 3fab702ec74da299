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

from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.training.optim import check_alignment
from loopmem_pretrain.training.pipeline import wrap_loops, wrap_loss
from tests.configs import tiny_run
from tests.distributed import run_ranks
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


def odd_addresses(rank, world_size, config):
    """Parameters of layers, by name, that are not at a multiple of 16 bytes in ZeRO's flat buffers."""
    engine = test_engines.make_engine(config)
    named = [(engine.public_names[name], parameter) for name, parameter in engine.engine.module.named_parameters()]
    check_alignment(named)
    return [name for name, parameter in named if ".layers." in name and parameter.data_ptr() % 16]


@pytest.mark.parametrize("rule", ["standard", "paper"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_what_compiled_loops_read_is_aligned(zero_stage, gate, precision, rule):
    """On GPUs the code compiled for the first layer loads 16 bytes at once, also from the parameters of the others."""
    config = tiny_run(
        model={"gate": gate, "num_hidden_layers": 4, "max_loops": 3},
        training={"precision": precision},
        parallel={"zero_stage": zero_stage},
        optimizer={"weight_decay_rule": rule},
    )
    found = run_ranks("tests.parity.test_compile:odd_addresses", 1, config)[0]
    assert found, "routers of D + 1 numbers cannot all be aligned: nothing was looked at"
    assert all(name.endswith(("halting.weight", "halting.bias", "step_scales", "gate.bias")) for name in found), found


def test_sizes_that_cannot_be_aligned_are_refused():
    flat = torch.zeros(100, dtype=torch.bfloat16)
    named = [("model.layers.0.norm.weight", flat[:36]), ("model.layers.1.norm.weight", flat[36:72])]
    with pytest.raises(ConfigError, match=r"training.compile=loop: model.layers.1.norm.weight, \[36\]"):
        check_alignment(named)


def test_a_compiled_loop_reads_no_router_where_it_lies(monkeypatch):
    """D + 1 numbers a layer: those of most layers are at odd addresses."""
    seen = []

    def looking(graph, inputs):
        seen.extend(tensor for tensor in inputs if isinstance(tensor, torch.Tensor))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=looking))
    net = build({}, compile="loop")
    net(*batch())
    routers = [tensor for tensor in seen if tensor.shape == net.model.layers[0].halting.weight.shape]
    assert routers and not any(isinstance(tensor, torch.nn.Parameter) for tensor in routers)


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
