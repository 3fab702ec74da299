"""The formulas of activations against the tensors that are really alive after a forward pass."""

import pytest
import torch

from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.tools.activations import Sizes, head_bytes, stage_keys_bytes, visit_bytes
from tests.configs import tiny_run
from tests.unit.tools.live_tensors import LiveTensors

NO_MEMORY = {"local_slots": 0, "global_slots": 0}
PLAIN = {"max_loops": 0, "residual_scale": "one", "ponder_weight": 0.0, **NO_MEMORY}
MODELS = {
    "loops and memory": {},
    "one loop": {"max_loops": 1, "ponder_weight": 0.0},
    "no memory": NO_MEMORY,
    "local bank": {"global_slots": 0, "local_slots": 200},
    "global bank": {"global_slots": 200, "local_slots": 0},
    "scalar gate": {"gate": "scalar"},
    "constant gate": {"gate": "constant"},
    "all heads have keys": {"num_key_value_heads": 4},
    "one key head, wide feed-forward": {"num_key_value_heads": 1, "intermediate_size": 160},
    "wide heads, normalised before the rotation": {"head_dim": 20, "qk_norm": "before_rope"},
    "narrow heads with biases, not normalised": {"head_dim": 6, "qk_norm": "none", "attention_bias": "all"},
    "deep": {"num_hidden_layers": 5, "max_loops": 2},
    "plain": PLAIN,
    "large vocabulary": {"vocab_size": 3000},
    "topk": {"retrieval": "topk", "global_slots": 64, "retrieval_topk": 4},
    "topk, larger k": {"retrieval": "topk", "global_slots": 64, "retrieval_topk": 16},
    "product keys": {"retrieval": "product_keys", "global_slots": 64, "retrieval_topk": 4},
    "product keys, larger k": {"retrieval": "product_keys", "global_slots": 256, "retrieval_topk": 16},
}


def measure(config):
    """(bytes held after forward, peak of forward and backward without parameter gradients' share known beforehand)."""
    from loopmem_pretrain.training.optim import keeps_float32
    from loopmem_pretrain.training.pipeline import wrap_loops

    model = LoopMemLM(config.model, TorchBackend())
    initialize(model.named_parameters(), config.model, 1)
    wrap_loops(model, config.training)
    if config.training.precision == "bf16":
        for name, parameter in model.named_parameters():
            if not keeps_float32(name):
                parameter.data = parameter.data.bfloat16()
    shape = (config.training.micro_batch_size, config.data.seq_length)
    tokens = torch.randint(0, config.model.vocab_size, shape)
    with LiveTensors([*model.parameters(), tokens]) as live:
        output = model(tokens, tokens)
        logits, loss = output.logits, output.loss  # what the engine holds
        del output
        held = live.bytes()
        loss.backward()
    assert logits.dtype == (torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    return held, live.peak


def formula(config):
    sizes = Sizes.of(config, fused_norms=False)
    return config.model.num_hidden_layers * visit_bytes(sizes) + stage_keys_bytes(sizes) + head_bytes(sizes)[0]


def run_of(model, precision, checkpointing, samples=3, seq_length=48):
    return tiny_run(
        model=model,
        training={"precision": precision, "activation_checkpointing": checkpointing, "micro_batch_size": samples},
        data={"datasets": [{"path": "unused"}], "seq_length": seq_length, "num_workers": 0},
    )


def saved_by_a_compiled_visit(config):
    """Bytes that autograd keeps of one visit of a compiled layer, beside parameters and banks."""
    from loopmem_pretrain.training.optim import keeps_float32
    from loopmem_pretrain.training.pipeline import wrap_loops

    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = LoopMemLM(config.model, TorchBackend())
    initialize(model.named_parameters(), config.model, 1)
    wrap_loops(model, config.training)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keeps_float32(name) else dtype)
    banks = (model.model.memory(),) if model.model.memory is not None else ()
    shape = (config.training.micro_batch_size, config.data.seq_length, config.model.hidden_size)
    others = [*model.parameters(), *(tensor for bank in banks for tensor in bank if isinstance(tensor, torch.Tensor))]
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its place is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](torch.randn(shape, dtype=dtype, requires_grad=True), *banks)
    return sum(size for size, _ in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["loops and memory", "no memory", "constant gate", "global bank", "topk", "plain"])
def test_what_compiled_loops_keep(name, precision):
    config = tiny_run(
        model={"hidden_size": 64, "intermediate_size": 128, **MODELS[name]},
        training={"precision": precision, "micro_batch_size": 4, "compile": "loop"},
        data={"datasets": [{"path": "unused"}], "seq_length": 64, "num_workers": 0},
    )
    torch._dynamo.reset()
    assert visit_bytes(Sizes.of(config)) == pytest.approx(saved_by_a_compiled_visit(config), rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_held_between_forward_and_backward(name, precision, checkpointing):
    config = run_of(MODELS[name], precision, checkpointing)
    held, _ = measure(config)
    assert formula(config) == pytest.approx(held, rel=0.05)
