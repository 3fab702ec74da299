"""What bench_parallel.py runs on the ranks it starts: contestants that take turns, and the clocks on them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopedLayer, LoopMemLM
from loopmem_pretrain.parallel.megatron import MegatronBackend
from loopmem_pretrain.parallel.topology import Topology
from loopmem_pretrain.training import engine as training_engine
from loopmem_pretrain.training.engine import TrainingEngine, init_distributed
from loopmem_pretrain.training.metrics import LoopAccumulator

CPU = torch.device("cpu")


class BackendStep(NamedTuple):
    """Seconds of one training step of a bare model."""

    passes: float
    """forward and backward"""
    total: float
    """AdamW included"""
    loss: float


def backend_steps(
    rank: int, world_size: int, models: dict[str, ModelConfig], tokens: Tensor, rounds: int, clock_name: str
) -> dict[tuple[str, str], list[BackendStep]]:
    """(model, backend) -> its steps; one rank, whose tensor-parallel group is itself."""
    from megatron.core import parallel_state

    init_distributed(CPU, ParallelConfig())
    topology = Topology.join(ParallelConfig())
    parallel_state.initialize_model_parallel(1, 1)  # Topology leaves it out where nothing is cut
    steps: dict[tuple[str, str], Callable[[], BackendStep]] = {}
    for name, model in models.items():
        megatron = MegatronBackend(ParallelConfig(), topology, model.vocab_size)
        for kind, backend in (("torch", TorchBackend()), ("megatron", megatron)):
            steps[name, kind] = _bare_step(LoopMemLM(model, backend), model, tokens, getattr(time, clock_name))
    return _race(steps, rounds)


def _bare_step(net: LoopMemLM, model: ModelConfig, tokens: Tensor, clock: Callable[[], float]) -> Any:
    initialize(net.named_parameters(), model, seed=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step() -> BackendStep:
        start = clock()
        loss: Any = net(tokens[:, :-1], labels=tokens[:, 1:]).loss
        loss.backward()
        passed = clock()
        optimizer.step()
        optimizer.zero_grad()
        return BackendStep(passed - start, clock() - start, float(loss))

    return step


class Job(NamedTuple):
    """A contestant among pipelines."""

    config: RunConfig
    bounds: list[int]
    """where its list of layers is cut"""
    loops: list[int] | None = None
    """loops that each layer is made to run; None: max_loops"""


class StageStep(NamedTuple):
    """One training step as a rank saw it; points in time on the clock that all processes of a machine share."""

    first: float
    """when its first forward pass began"""
    last: float
    """when its last backward pass ended"""
    busy: float
    """seconds in forward and backward passes"""
    processor: float
    """seconds that the processor spent on them: neighbours hardly change it"""
    total: float
    """seconds of the whole step, from a barrier on"""


def pipeline_steps(rank: int, world_size: int, jobs: dict[str, Job], rounds: int) -> dict[str, list[StageStep]]:
    """Training steps through DeepSpeed's pipeline engine, one stage a rank."""
    init_distributed(CPU, next(iter(jobs.values())).config.parallel)
    return _race({name: _pipeline_step(job) for name, job in jobs.items()}, rounds)


class NoStatistics(LoopAccumulator):
    """The table of statistics has the same number of loops for every layer."""

    def add(self, *args: Any, **options: Any) -> None:
        pass


def _pipeline_step(job: Job) -> Callable[[], StageStep]:
    config, model = job.config, job.config.model
    with patch.object(training_engine, "stage_bounds", return_value=job.bounds):
        engine = TrainingEngine(config, CPU, Topology.join(config.parallel))
    if job.loops:
        engine.step_context.accumulator = NoStatistics(model, model.num_hidden_layers, CPU)
        local = [layer for layer in engine.engine.module.modules() if isinstance(layer, LoopedLayer)]
        for index, layer in enumerate(local, engine.step_context.first_layer):
            layer.max_loops = job.loops[index]
    passes = _record_passes(engine.engine)
    generator = torch.Generator().manual_seed(0)
    shape = (config.training.global_batch_size, config.data.seq_length + 1)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator)
    batches = [(part[:, :-1], part[:, 1:]) for part in tokens.split(config.training.micro_batch_size)]
    done = 0

    def step() -> StageStep:
        nonlocal done
        passes.clear()
        dist.barrier()
        start = time.perf_counter()
        engine.train_batch(iter(batches), done)
        total = time.perf_counter() - start
        done += 1
        busy = sum(timed.end - timed.begin for timed in passes)
        return StageStep(passes[0].begin, passes[-1].end, busy, sum(timed.processor for timed in passes), total)

    return step


class Pass(NamedTuple):
    """One forward or backward pass of one micro-batch through a stage."""

    begin: float
    end: float
    processor: float
    """seconds that the processor spent on it"""


def _record_passes(pipeline_engine: Any) -> list[Pass]:
    """A list that the engine's forward and backward passes are from now on entered in."""
    passes: list[Pass] = []

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            begin, processor = time.perf_counter(), time.process_time()
            method(*args, **options)
            passes.append(Pass(begin, time.perf_counter(), time.process_time() - processor))

        return run

    methods = dict(pipeline_engine._INSTRUCTION_MAP)
    methods |= {kind: timed(methods[kind]) for kind in (schedule.ForwardPass, schedule.BackwardPass)}
    pipeline_engine._INSTRUCTION_MAP = methods
    return passes


def _race(steps: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    """Let them take turns, the order reversed every other round; the first step of each is not counted."""
    for step in steps.values():
        step()
    seen: dict[Any, list[Any]] = {name: [] for name in steps}
    for turn in range(rounds):
        names = list(steps)
        for name in names if turn % 2 == 0 else reversed(names):
            seen[name].append(steps[name]())
    return seen
