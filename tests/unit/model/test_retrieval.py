"""Reading a large global bank: top-k and product keys against brute force, outputs and gradients, and their memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.model import memory
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.model.memory import Lookup, SharedMemory, best_slots, dense_read, product_key_read, topk_read
from loopmem_pretrain.training.optim import role_of
from tests.configs import TINY_MODEL

BATCH, TOKENS, WIDTH, SIDE = 2, 3, 8, 5
SLOTS = SIDE * SIDE
KINDS = {"topk": topk_read, "product_keys": product_key_read}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(kind="topk", slots=SLOTS):
    """Query, keys and values with gradient; well apart, so that no step of a finite difference changes the choice."""
    keys = (2, math.isqrt(slots), WIDTH // 2) if kind == "product_keys" else (slots, WIDTH)
    shapes = ((BATCH, TOKENS, WIDTH), keys, (slots, WIDTH))
    return [(3 * randn(*shape, seed=seed)).requires_grad_() for seed, shape in enumerate(shapes)]


def read(kind, tensors, k):
    (mixed,) = TorchBackend().softmax_reads([KINDS[kind](*tensors, Lookup(k, range(len(tensors[2])), TorchBackend()))])
    return mixed


def brute_force(query, keys, values, k):
    """Softmax over all slots, those below the k-th largest score left out."""
    scores = query @ keys.T / math.sqrt(query.shape[-1])
    kth = scores.topk(k, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf).softmax(-1) @ values


def whole_keys(subkeys):
    """Key of slot i * n + j: [first half-key i; second half-key j]."""
    return torch.stack([torch.cat((first, second)) for first in subkeys[0] for second in subkeys[1]])


def gradients(output, tensors):
    return torch.autograd.grad((output * randn(*output.shape, seed=9)).sum(), tensors)


def assert_same(one, other, tensors):
    torch.testing.assert_close(one, other)
    for ours, expected in zip(gradients(one, tensors), gradients(other, tensors), strict=True):
        torch.testing.assert_close(ours, expected)


def test_topk_of_all_slots_is_dense():
    tensors = inputs()
    (dense,) = TorchBackend().softmax_reads([dense_read(*tensors)])
    assert_same(read("topk", tensors, SLOTS), dense, tensors)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_against_brute_force(kind, k):
    tensors = query, keys, values = inputs(kind)
    all_keys = whole_keys(keys) if kind == "product_keys" else keys
    assert_same(read(kind, tensors, k), brute_force(query, all_keys, values, k), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = inputs(kind)
    assert torch.autograd.gradcheck(lambda *args: read(kind, args, 3), tensors)


@pytest.mark.parametrize("slots_at_a_time", [7, 8, 23, 24])
def test_search_in_chunks_finds_the_same(slots_at_a_time, monkeypatch):
    query, keys, _ = inputs(slots=23)
    expected = (query @ keys.T).topk(7, dim=-1).indices
    monkeypatch.setattr(memory, "SEARCH_BYTES", slots_at_a_time * BATCH * TOKENS * 8)
    assert torch.equal(best_slots(query, keys, 7), expected)


def test_more_wanted_than_this_rank_holds():
    query, keys, _ = inputs(slots=4)
    assert best_slots(query, keys, 9).shape == (BATCH, TOKENS, 4)


@pytest.mark.parametrize("own", [range(10), range(10, 20), range(20, 25), range(25)])
def test_product_keys_count_only_slots_of_this_rank(own):
    """What each rank hands to the merge: the same k candidates everywhere, each of them counted on one rank."""
    query, subkeys, values = inputs("product_keys")
    held, mix = product_key_read(query, subkeys, values[own.start : own.stop], Lookup(4, own, TorchBackend()))
    best, slots = (query @ whole_keys(subkeys).T / math.sqrt(WIDTH)).topk(4, dim=-1)
    here = (slots >= own.start) & (slots < own.stop)
    torch.testing.assert_close(held, best.masked_fill(~here, -math.inf))
    weights = held.exp()
    expected = torch.einsum("btk,btkd->btd", weights, F.embedding(slots, values))
    torch.testing.assert_close(mix(weights), expected)
    assert all(grad.isfinite().all() for grad in gradients(mix(weights), [query, subkeys, values]))


def test_half_keys_are_normalised_by_themselves():
    config = model_config("product_keys")
    shared = SharedMemory(config, TorchBackend()).double()
    with torch.no_grad():
        for seed, parameter in enumerate(shared.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    weight, bias = shared.key_norm.weight.chunk(2), shared.key_norm.bias.chunk(2)
    expected = [F.layer_norm(shared.global_subkeys[h], (16,), weight[h], bias[h], 1e-5) for h in range(2)]
    torch.testing.assert_close(shared().global_keys, torch.stack(expected))


# --------------------------------------------------------------------------------------------------- in the model


def model_config(kind, **changes):
    return ModelConfig(**{**TINY_MODEL, "global_slots": 16, "retrieval": kind, "retrieval_topk": 3, **changes})


def build(kind, dtype=torch.float32, **changes):
    config = model_config(kind, **changes)
    model = LoopMemLM(config, TorchBackend())
    initialize(model.named_parameters(), config, 0)
    return model.to(dtype)


def ids(batch=2, tokens=12):
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_public_names_and_roles(kind):
    shared = {name: parameter.shape for name, parameter in build(kind).model.memory.named_parameters()}
    keys = {"global_subkeys": (2, 4, 16)} if kind == "product_keys" else {"global_keys": (16, 32)}
    banks = {**keys, "global_values": (16, 32)}
    assert {name: shape for name, shape in shared.items() if "norm" not in name} == banks
    assert {role_of(f"model.memory.{name}") for name in banks} == {"bank"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = build(kind)
    model(ids(), labels=ids()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    keys = model.model.memory.global_subkeys if kind == "product_keys" else model.model.memory.global_keys
    assert keys.grad.abs().max() > 0


def test_model_with_topk_of_all_slots_is_the_dense_model():
    dense, topk = build("dense", torch.float64, retrieval_topk=32), build("topk", torch.float64, retrieval_topk=16)
    outputs = [model(ids(), labels=ids()) for model in (dense, topk)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for one, other in zip(dense.parameters(), topk.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    output = build(kind, torch.bfloat16)(ids(), labels=ids())
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_one_loop_compiles_whole_and_once_for_all_layers(kind):
    """As training compiles it, code generation left out."""
    torch._dynamo.reset()
    model, eager = build(kind), build(kind)
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.run = torch.compile(layer.one_loop, fullgraph=True, dynamic=False, backend=counter)
    for each in (model, eager):
        each(ids(), labels=ids()).loss.backward()
    assert counter.frame_count == 2  # the first loop, and the others
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_bank_never_has_all_its_scores_in_memory(kind, monkeypatch):
    """2^16 slots, 1,024 tokens: all scores would be 256 MiB; nothing made here is larger than the bank, 8 MiB."""
    slots, width, bank = 2**16, 32, 2**16 * 32 * 4
    monkeypatch.setattr(memory, "SEARCH_BYTES", bank)
    shared = SharedMemory(model_config(kind, global_slots=slots, retrieval_topk=16), TorchBackend())
    initialize(((f"model.memory.{name}", p) for name, p in shared.named_parameters()), None, 0)
    query = randn(4, 256, width, dtype=torch.float32)
    with LargestTensor() as seen:
        made = shared()
        read(kind, (query, made.global_keys, made.global_values), 16).square().sum().backward()
    assert bank <= seen.largest <= bank * 1.01
    assert all(p.grad is not None for name, p in shared.named_parameters() if name.startswith(("global", "key")))
