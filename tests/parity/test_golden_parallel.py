"""The golden vectors through megatron's layers on two tensor-parallel ranks: outputs and gradients, float64 weights.

Megatron's cross-entropy is float32, so losses and gradients are compared as float32 ones are.
"""

import pytest
import torch

from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.parallel.placement import padded_size, part_of, placement
from tests.distributed import run_ranks
from tests.golden_vectors import NAMES, as_config, load_golden
from tests.parity.test_golden import named_outputs


def part(name, whole, config, parallel, rank):
    """This rank's part of a whole parameter, padded where the vocabulary is."""

    where = placement(name, parallel)
    if where.cut is None:
        return whole
    size = padded_size(whole.shape[where.cut], parallel.tensor_model_parallel_size)
    padded = whole.new_zeros(*(size if d == where.cut else n for d, n in enumerate(whole.shape)))
    padded.narrow(where.cut, 0, whole.shape[where.cut]).copy_(whole)
    return padded.chunk(parallel.tensor_model_parallel_size, dim=where.cut)[rank]


def on_rank(rank, world_size, name, parallel):
    from loopmem_pretrain.model.loopmem import LoopMemLM
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import init_distributed, make_backend, prepare_parameters

    init_distributed(torch.device("cpu"), parallel)
    topology = Topology.join(parallel)
    golden = load_golden(name)
    config = as_config(golden.spec)
    model = LoopMemLM(config, make_backend(config, parallel, topology)).double()
    params = dict(golden.params)
    if config.tie_word_embeddings:
        params["lm_head.weight"] = params["model.embed_tokens.weight"]
    model.load_state_dict({n: part(n, value, config, parallel, rank) for n, value in params.items()}, strict=True)
    names = {name: name for name, _ in model.named_parameters()}
    prepare_parameters(model, names, parallel, topology.groups["tensor"])
    output = model(golden.token_ids[:, :-1], labels=golden.token_ids[:, 1:])
    output.loss.backward()
    named = {key: value.detach() for key, value in named_outputs(output).items()}
    return named, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("banks", ["replicated", "sharded"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(name, banks):
    golden = load_golden(name)
    parallel = ParallelConfig(tensor_model_parallel_size=2, memory_placement=banks)
    ranks = run_ranks("tests.parity.test_golden_parallel:on_rank", 2, name, parallel)
    named, grads = zip(*ranks, strict=True)
    outputs = named[0] | {"logits": torch.cat([rank["logits"] for rank in named], dim=-1)}
    outputs["logits"] = outputs["logits"][..., : golden.spec["vocab_size"]]
    whole = {}
    for key, grad in grads[0].items():
        where = part_of(key, grad.shape, parallel, 0, golden.spec["vocab_size"])
        if where is None:
            assert torch.equal(grad, grads[1][key]), f"{key}: ranks have different gradients"
            whole[key] = grad
        else:
            whole[key] = torch.cat([rank[key] for rank in grads], dim=where.dimension).narrow(
                where.dimension, 0, where.whole
            )
    compare(golden, outputs, whole)


def compare(golden, outputs, grads):
    for kind, expected, actual in (("output", golden.outputs, outputs), ("grad", golden.grads, grads)):
        for key, value in expected.items():
            error = (actual[key].double() - value).abs().max()
            limit = 1e-7 + 1e-6 * value.abs().max()
            assert error <= limit, f"{kind} {key}: {error:.2e}, allowed {limit:.2e}"
