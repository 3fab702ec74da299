"""DeepSpeed's engines against the same model in one plain process: losses, gradient norms, parameters, statistics."""

import pytest
import torch

from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.configs import tiny_run
from tests.distributed import run_ranks

STEPS = 5


def batches(config, step):
    """All micro-batches of one global step, the same on every rank that asks."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.training.global_batch_size, config.data.seq_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return [(part[:, :-1], part[:, 1:]) for part in tokens.split(config.training.micro_batch_size)]


def reference(config):
    """Five AdamW steps of the whole model in one process, with nothing but torch."""
    from loopmem_pretrain.training.optim import learning_rate, parameter_groups, ponder_weight

    model = LoopMemLM(config.model, TorchBackend())
    initialize(model.named_parameters(), config.model, config.training.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.optimizer), betas=(0.9, 0.95), eps=config.optimizer.eps
    )
    losses, norms, expected_loops = [], [], []
    first_gradients = {}
    for step in range(STEPS):
        micro_batches = batches(config, step)
        weight = ponder_weight(step, config.model.ponder_weight, config.training)
        total = 0.0
        for inputs, labels in micro_batches:
            output = model(inputs, labels)
            loss = output.cross_entropy + weight * output.ponder_cost
            (loss / len(micro_batches)).backward()
            total += output.cross_entropy.item() / len(micro_batches)
            if step == STEPS - 1:
                expected_loops.append([stats.expected_loops().mean().item() for stats in output.stats])
        if step == 0:
            first_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimizer, config.schedule, config.training.train_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, torch.tensor(expected_loops).mean(0), dict(model.state_dict()), first_gradients


def make_engine(config):
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import TrainingEngine, init_distributed

    init_distributed(torch.device("cpu"), config.parallel)
    return TrainingEngine(config, torch.device("cpu"), Topology.join(config.parallel))


def train_on_rank(rank, world_size, config):
    engine = make_engine(config)
    rank, size = engine.topology.data_rank, engine.topology.data_size
    losses, norms = [], []
    for step in range(STEPS):
        engine.step_context.accumulator.read_and_reset()
        losses.append(float(engine.train_batch(iter(batches(config, step)[rank::size]), step)))
        norms.append(engine.grad_norm())
    stats = engine.step_context.accumulator.read_and_reset()
    micro_batches = batches(config, 99)[rank::size]
    validation = float(engine.evaluate(iter(micro_batches), len(micro_batches)))
    import deepspeed

    parameters = {}
    for name, parameter in engine.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=config.parallel.zero_stage == 3):
            parameters[engine.public_names[name]] = parameter.detach().clone()
    looped = config.model.num_hidden_layers if config.model.max_loops else 0
    assert [len(scales) for scales in engine.step_scales()] == [config.model.max_loops] * looped
    return losses, norms, stats, parameters, validation


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_equals_one_process(zero_stage, world_size):
    config = tiny_run(parallel={"zero_stage": zero_stage})
    check(config, world_size)


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    ],
    ids=["zero2", "zero3"],
)
def test_offloading_changes_nothing(parallel):
    check(tiny_run(parallel=parallel), 2)


def whole_weights_on_rank(rank, world_size, config):
    """The most elements of parameters that this rank holds when it has made a module of the model."""
    from loopmem_pretrain.training import pipeline

    made, held, original = [], [], pipeline.layer_list

    def watched(entry):
        def make():
            made.append(entry.make())
            parameters = [parameter for module in made for parameter in module.parameters()]
            held.append(sum(parameter.numel() for parameter in parameters if not parameter.is_meta))
            return made[-1]

        return entry._replace(make=make)

    pipeline.layer_list = lambda *arguments: [watched(entry) for entry in original(*arguments)]
    make_engine(config)
    return max(held)


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2, "memory_placement": "sharded"}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_starts_without_the_whole_model(parallel, precision):
    config = tiny_run(parallel={"zero_stage": 3, **parallel}, training={"precision": precision})
    whole = parameter_counts(config.model).total
    layer = parameter_counts(config.model.model_copy(update={"num_hidden_layers": 1})).total
    for most in run_ranks("tests.parity.test_engines:whole_weights_on_rank", 2, config):
        assert 0 < most <= layer < whole


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize(
    "model",
    [
        {"tie_word_embeddings": True},
        {"max_loops": 1, "ponder_weight": 0.0},
        {"local_slots": 0, "global_slots": 0},
        {"max_loops": 0, "residual_scale": "inverse_depth", "local_slots": 0, "global_slots": 0, "ponder_weight": 0.0},
    ],
    ids=["tied", "one-loop", "no-memory", "plain"],
)
def test_model_kinds(zero_stage, model):
    check(tiny_run(parallel={"zero_stage": zero_stage}, model=model), 2)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_recomputation_changes_nothing(zero_stage):
    check(tiny_run(parallel={"zero_stage": zero_stage}, training={"activation_checkpointing": "loop"}), 2)


def test_ponder_schedule_reaches_the_gradient():
    check(tiny_run(training={"ponder_schedule": "cyclic", "ponder_period": 4}, model={"ponder_weight": 0.5}), 2)


def check(config, world_size):
    losses, norms, expected_loops, parameters, _ = reference(config)
    results = run_ranks("tests.parity.test_engines:train_on_rank", world_size, config)
    for rank_losses, rank_norms, stats, rank_parameters, validation in results:
        torch.testing.assert_close(torch.tensor(rank_losses), torch.tensor(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(rank_norms), torch.tensor(norms), rtol=1e-4, atol=0)
        if config.model.max_loops:
            torch.testing.assert_close(torch.tensor(stats["expected_loops"]), expected_loops, rtol=1e-5, atol=1e-6)
        tied = config.model.tie_word_embeddings
        assert set(rank_parameters) == set(parameters) - ({"lm_head.weight"} if tied else set())
        for name, value in rank_parameters.items():
            # Adam turns a gradient of rounding noise (LN_k's bias: exactly zero in theory) into steps of about lr.
            limit = STEPS * config.optimizer.lr if name.endswith("key_norm.bias") else 2e-4
            torch.testing.assert_close(value, parameters[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
        assert 4 < validation < 6


def working_dtypes(rank, world_size, config):
    engine = make_engine(config)
    losses = [float(engine.train_batch(iter(batches(config, step)[rank::world_size]), step)) for step in range(STEPS)]
    dtypes = {}
    for name, parameter in engine.engine.module.named_parameters():
        dtypes.setdefault(parameter.dtype, set()).add(engine.public_names[name].split("layers.0.")[-1])
    reduced = set() if engine.uses_pipeline else {engine.engine.optimizer._gradient_reduction_buffer_dtype()}
    return losses, dtypes, engine.step_scales(), reduced


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bf16_keeps_step_scales_and_routers_in_float32(zero_stage):
    """A raw step scale near -7 moves in steps of 0.03 in bf16; the optimizer's steps here are 0.001 to 0.01."""
    config = tiny_run(parallel={"zero_stage": zero_stage}, training={"precision": "bf16"})
    losses, dtypes, scales, reduced = run_ranks("tests.parity.test_engines:working_dtypes", 2, config)[0]
    assert reduced <= {torch.bfloat16}, "ZeRO 2 reduces all gradients in the dtype of the first parameter group"
    names = {name for name in dtypes[torch.float32] if "layers" not in name}
    assert names == {"step_scales", "halting.weight", "halting.bias"}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference(config)[0]), rtol=2e-3, atol=0)
    assert all(-7 < s < -6.9 and s * 32 != round(s * 32) for layer in scales for s in layer)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_odd_number_of_parameters(zero_stage):
    """DeepSpeed asserts that its bucket sizes are even."""
    config = tiny_run(parallel={"zero_stage": zero_stage}, model={"num_hidden_layers": 1})
    assert parameter_counts(config.model).total % 2 == 1
    check(config, 2)


def master_gradients(rank, world_size, config):
    """What AdamW is given in one step, and how often DeepSpeed waited for the device in the next three."""
    from deepspeed.accelerator import get_accelerator

    engine = make_engine(config)
    inner, seen, waits = engine.engine.optimizer.optimizer, [], []
    engine.on_update(lambda: seen.extend(p.grad.clone() for g in inner.param_groups for p in g["params"]))
    step = lambda n: engine.train_batch(iter(batches(config, n)[rank::world_size]), n)  # noqa: E731
    step(0)
    gradients = torch.cat([gradient.flatten() for gradient in seen])
    get_accelerator().synchronize = lambda *args: waits.append(args)
    for n in (1, 2, 3):
        step(n)
    return gradients, len(waits)


@pytest.mark.parametrize(("zero_stage", "world_size"), [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_bf16_sums_of_gradients_are_float32_and_nothing_waits(zero_stage, world_size):
    """Over micro-batches, and with ZeRO 1 over ranks; DeepSpeed's defaults would round what AdamW sees to bf16."""
    config = tiny_run(parallel={"zero_stage": zero_stage}, training={"precision": "bf16"})
    for gradients, waits in run_ranks("tests.parity.test_engines:master_gradients", world_size, config):
        gradients = gradients[gradients != 0]
        assert gradients.dtype == torch.float32 and len(gradients) > 1000
        # ZeRO 2 and 3 reduce a micro-batch in bf16; of sums of a few such numbers many are numbers of bf16 again.
        rounded = (gradients == gradients.bfloat16().float()).float().mean()
        assert rounded < (0.5 if zero_stage == 1 else 0.8)
        assert waits == 0
