"""Memory of a rank by formula against live tensors: model states of real engines, and the peak of a whole pass."""

import gc

import pytest
import torch

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.tools.memory_plan import Layout, bank_bytes, model_states, stage_memory, worst_stage
from tests.configs import tiny_run
from tests.distributed import run_ranks
from tests.parity.test_engines import batches
from tests.unit.tools.test_activations import MODELS, measure, run_of


def live_bytes(ignored):
    """Storages of all tensors alive and of their gradients, by address."""
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return {address: size for address, size in found.items() if address not in ignored}


def bytes_before_optimizer_step(rank, world_size, config):
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import TrainingEngine, init_distributed

    init_distributed(torch.device("cpu"), config.parallel)
    before = live_bytes({})
    topology = Topology.join(config.parallel)
    engine = TrainingEngine(config, torch.device("cpu"), topology)
    optimizer, seen = engine.engine.optimizer, []
    original = optimizer.step

    def step(*args, **kwargs):
        gc.collect()
        seen.append(sum(live_bytes(before).values()))
        return original(*args, **kwargs)

    optimizer.step = step
    for index in range(2):
        mine = batches(config, index)[topology.data_rank :: topology.data_size]
        engine.train_batch(iter(mine), index)
    return topology.pipeline_rank, seen[-1]


def wide_run(precision, **parallel):
    """A model with many parameters and few tokens."""
    return tiny_run(
        parallel=parallel,
        training={"precision": precision, "micro_batch_size": 1, "global_batch_size": 4},
        data={"datasets": [{"path": "unused"}], "seq_length": 4, "num_workers": 0},
        model={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 500},
    )


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {"zero_stage": 1}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "memory_placement": "sharded"}),
        (2, {"pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(f"{k[:4]}{v}" for k, v in value.items()),
)
def test_model_states_before_the_optimizers_step(ranks, parallel, precision):
    config = wide_run(precision, **parallel)
    layout = Layout.of(config, ranks)
    measured = run_ranks("tests.unit.tools.test_memory_plan:bytes_before_optimizer_step", ranks, config)
    for stage, held in measured:
        elements = layout.parameters(stage)
        states = model_states(config, elements, layout.data_ranks)
        expected = states["weights"] + states["gradients"] + states["optimizer"]
        if config.parallel.zero_stage == 3:
            expected += states["zero_buckets"]
        if config.parallel.zero_stage == 1 and precision == "fp32":
            expected -= 4 * elements  # .grad, which is freed once cut
        assert expected == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "loop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["loops and memory", "no memory", "plain", "large vocabulary", "topk", "product keys"])
def test_peak_of_forward_and_backward(name, precision, checkpointing):
    """Many tokens, so that the gradients of parameters, which model_states counts, are next to nothing here."""
    config = run_of(MODELS[name], precision, checkpointing, samples=8, seq_length=128)
    _, peak = measure(config)
    memory = stage_memory(Layout.of(config, 1), 0, fused_norms=False)
    assert memory.activations + memory.logits + memory.backward == pytest.approx(peak, rel=0.1)


def test_parameters_of_all_stages_are_the_models():
    config = load_config(RunConfig, "configs/paper/m_3.yaml", [], run_problems)
    layout = Layout.of(config, 1)
    assert layout.parameters(0) == parameter_counts(config.model).total == 210_243_900


def test_stages_hold_as_many_micro_batches_as_follow_them():
    config = tiny_run(parallel={"pipeline_model_parallel_size": 2})
    layout = Layout.of(config, 2)
    assert [layout.in_flight(stage) for stage in range(2)] == [2, 1]
    assert Layout.of(tiny_run(), 1).in_flight(0) == 1
    first, last = stage_memory(layout, 0), stage_memory(layout, 1)
    assert first.activations > 1.9 * last.activations
    assert (first.logits, worst_stage(layout)[0]) == (0, 0 if first.total > last.total else 1)


def test_a_stage_keeps_what_it_sends_until_its_gradient_comes():
    layout = Layout.of(tiny_run(parallel={"pipeline_model_parallel_size": 2}), 2)
    first, last = stage_memory(layout, 0), stage_memory(layout, 1)
    training, model = layout.config.training, layout.config.model
    sent = 4 * training.micro_batch_size * layout.config.data.seq_length * model.hidden_size
    assert first.activations == 2 * (last.activations + sent), "two equal layers, one a stage; two in flight, and one"


@pytest.mark.parametrize(
    ("parallel", "gone"),
    [
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, ["optimizer"]),
        ({"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, ["optimizer", "weights"]),
    ],
)
def test_what_is_offloaded_takes_no_memory_of_the_device(parallel, gone):
    stage = parallel["zero_stage"]
    here, away = (model_states(tiny_run(parallel=fields), 1000, 2) for fields in ({"zero_stage": stage}, parallel))
    assert all(here[name] > 0 for name in gone)
    assert away == here | dict.fromkeys(gone, 0)


def test_sharded_banks_divide_over_tensor_ranks():
    fields = {"tensor_model_parallel_size": 2}
    whole = Layout.of(tiny_run(parallel=fields), 2)
    sharded = Layout.of(tiny_run(parallel={**fields, "memory_placement": "sharded"}), 2)
    assert bank_bytes(sharded, 0) * 2 == bank_bytes(whole, 0) > 0
