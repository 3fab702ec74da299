"""DeepSpeed's two engines behind one small interface.

ZeRO 1 runs in the pipeline engine (one path from one GPU to pipelines, universal checkpoints reshape exactly);
ZeRO 2 and 3 run in the plain engine. The trainer sees `train_batch`, `evaluate`, `save` and `load`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from torch import Tensor

from loopmem_pretrain.checkpoint.safe_load import weights_only
from loopmem_pretrain.checkpoint.universal import STATES, Merged
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.run import RunConfig, gradient_accumulation_steps
from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.model.backend import Backend, TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopedLayer, PlainLayer
from loopmem_pretrain.model.memory import SharedMemory, SharedRead
from loopmem_pretrain.parallel.checks import are_finite, replica_differences
from loopmem_pretrain.parallel.collectives import all_reduced
from loopmem_pretrain.parallel.placement import Part, part_of, placement, whole_shape
from loopmem_pretrain.parallel.stages import stage_bounds
from loopmem_pretrain.parallel.start import join_process_group
from loopmem_pretrain.parallel.topology import Topology
from loopmem_pretrain.quiet import deepspeed_chatter_held_back
from loopmem_pretrain.training import pipeline, pipeline_engine
from loopmem_pretrain.training.ds_config import deepspeed_config
from loopmem_pretrain.training.first_loss import FirstLoss
from loopmem_pretrain.training.master_state import make_moments, place_step_counts, set_state
from loopmem_pretrain.training.metrics import LoopAccumulator
from loopmem_pretrain.training.optim import (
    GROUP_ORDER,
    beta1,
    check_alignment,
    keeps_float32,
    learning_rate,
    make_optimizer,
    ponder_weight,
)
from loopmem_pretrain.training.state_files import StateCollector

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor]]


def init_distributed(device: torch.device, parallel: ParallelConfig) -> None:
    """Join the process group, DeepSpeed's view of it included; a process started alone becomes a group of one.

    Raises:
        EnvironmentFault: ranks are missing (see parallel/start.py).
    """
    if device.type == "cpu":
        # DeepSpeed would compile its shared-memory communication here (70 s) although gloo does the work.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    join_process_group("nccl" if device.type == "cuda" else "gloo", parallel)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class TrainingEngine:
    """A model being trained by DeepSpeed on this rank."""

    def __init__(self, config: RunConfig, device: torch.device, topology: Topology) -> None:
        self.config, self.device, self.topology = config, device, topology
        self.accumulation_steps = gradient_accumulation_steps(config.training, topology.data_size)
        self.uses_pipeline = config.parallel.zero_stage == 1

        model, parallel = config.model, config.parallel
        backend = make_backend(model, parallel, topology)
        self.first_loss = FirstLoss(pipeline.wrap_loss(backend.cross_entropy, config.training))
        layers = model.num_hidden_layers
        self.step_context = pipeline.StepContext(
            model,
            LoopAccumulator(model, layers, device),
            self.accumulation_steps,
            token_parts=topology.tensor_size if parallel.sequence_parallel else 1,
        )
        table = pipeline.parameter_table(model, backend)
        self.public_names = {name: row.public_name for name, row in table.items()}
        self.whole_shapes = {
            row.public_name: whole_shape(row.public_name, row.shape, parallel, model.vocab_size)
            for row in table.values()
        }
        self.bounds = stage_bounds(model, config.data.seq_length, topology.pipeline_size)
        self.group_order = GROUP_ORDER
        self.ds_config = deepspeed_config(config, self.accumulation_steps)
        self.mpu = None if self.uses_pipeline or topology.tensor_size == 1 else topology
        arguments = (model, backend, self.first_loss.cross_entropy, self.step_context)
        with deepspeed_chatter_held_back():
            if self.uses_pipeline:
                module: Any = pipeline.PipelineStage(*arguments, topology, self.bounds)
            elif parallel.zero_stage == 3:
                module = pipeline.WholeModel(*arguments, self._fill_and_cut)
            else:
                module = pipeline.WholeModel(*arguments)
        module.universal_checkpoint_info = pipeline.universal_checkpoint_info(table, model, parallel)
        named = [(self.public_names[name], parameter) for name, parameter in module.named_parameters()]
        if parallel.zero_stage < 3:
            initialize(named, model, config.training.seed, self._part_of)
            module.to(device)
        pipeline.wrap_loops(module, config.training)
        prepare_parameters(module, self.public_names, parallel, topology.groups["tensor"])
        if parallel.zero_stage == 3:
            _prepare_for_zero3(module)
        with deepspeed_chatter_held_back():
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._make_optimizer(named),
                config=self.ds_config,
                mpu=self.mpu,
            )

        if config.training.compile == "loop" and device.type == "cuda":
            check_alignment(named)
        if self.uses_pipeline:
            pipeline_engine.adapt(self.engine)
        elif parallel.zero_stage == 2 and parallel.offload_optimizer == "cpu":
            _forget_skipped_gradients(self.engine.optimizer)
        self.engine.checkpoint_engine = StateCollector()
        self.engine._copy_recovery_script = lambda folder: None  # they cannot read the pipeline engine's files

    def _fill_and_cut(self, entry: pipeline.Entry, module: torch.nn.Module) -> None:
        """ZeRO 3: draw the weights of one entry of the list and leave each rank its share, before the next is made."""
        named = [(entry.public_prefix + name, parameter) for name, parameter in module.named_parameters()]
        initialize(named, self.config.model, self.config.training.seed, self._part_of)
        module.to(self.device, torch.bfloat16 if self.config.training.precision == "bf16" else None)
        group = None if self.mpu is None else self.mpu.get_data_parallel_group()
        deepspeed.zero.Init(module, data_parallel_group=group, config_dict_or_path=self.ds_config, mpu=self.mpu)

    def _part_of(self, public_name: str, parameter: Tensor) -> Part | None:
        config = self.config
        return part_of(
            public_name, parameter.shape, config.parallel, self.topology.tensor_rank, config.model.vocab_size
        )

    def _make_optimizer(self, named: list[tuple[str, torch.nn.Parameter]]) -> Callable[[Any], torch.optim.Optimizer]:
        """A factory: DeepSpeed calls it after it has cast every parameter to bf16.

        That is the moment to give step scales and routers their float32 values back: in bf16 a raw step scale near -7
        would move in steps of 0.03, and halting is decided in float32. ZeRO 3 holds one dtype only.
        """
        originals = {}
        if self.config.parallel.zero_stage < 3:
            originals = {name: parameter.detach().clone() for name, parameter in named if keeps_float32(name)}
        elif self.config.training.precision == "bf16":
            log.warning(
                "zero_stage 3 holds step scales and routers in bf16 between steps (their master copies are float32); "
                "zero_stage 1 and 2 hold them in float32"
            )

        def make(parameters: Any) -> torch.optim.Optimizer:
            for name, parameter in named:
                if name in originals:
                    parameter.data = originals[name]
            on_gpu = self.device.type == "cuda" and self.config.parallel.offload_optimizer == "none"
            return make_optimizer(named, self.config.optimizer, on_gpu)

        return make

    def on_micro_batch(self, call: Callable[[], None]) -> None:
        """Call `call` whenever this rank begins the forward pass of a micro-batch, in training and validation."""
        self.engine.module.register_forward_pre_hook(lambda module, inputs: call())

    def on_update(self, call: Callable[[], None]) -> None:
        """Call `call` before each update of the weights: all gradients are there, nothing has changed yet."""
        self.engine.basic_optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: call())

    def on_next_loss(self, call: Callable[[tuple[Tensor, Tensor], Tensor], None]) -> None:
        """Call `call(micro_batch, loss)` for the first micro-batch of the next step; where `has_loss`."""
        self.first_loss.on_next(call)

    @property
    def has_loss(self) -> bool:
        """Whether this rank is the first of those that compute the loss."""
        place = self.topology
        return place.pipeline_rank == place.pipeline_size - 1 and place.data_rank == place.tensor_rank == 0

    def train_batch(self, batches: Batches, step: int) -> Tensor:
        """One optimizer step (`accumulation_steps` micro-batches); mean cross-entropy of all ranks, on the device."""
        self._set_schedules(step)
        batches = map(self._to_device, self.first_loss.step(batches))
        if self.uses_pipeline:
            return cast(Tensor, self.engine.train_batch(data_iter=batches)).detach().reshape(())
        self.engine.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.accumulation_steps):
            loss = self.engine(*next(batches))
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return self._mean_over_ranks(total / self.accumulation_steps)

    def evaluate(self, batches: Batches, micro_batches: int) -> Tensor:
        """Mean cross-entropy over `micro_batches` micro-batches of every rank, without gradients, on the device."""
        batches = map(self._to_device, batches)
        if self.uses_pipeline:
            # DeepSpeed's pipeline takes one group of micro-batches at a time through its buffers.
            loss = self.engine.eval_batch(batches, num_micro_batches=micro_batches)
            return cast(Tensor, loss).detach().reshape(())
        self.engine.eval()
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for _ in range(micro_batches):
                total += self.engine(*next(batches))
        return self._mean_over_ranks(total / micro_batches)

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], without gradients, where neither tensor nor pipeline parallelism cuts the model.

        Under ZeRO 3 a collective: every rank calls it equally often, with a batch of its own.
        """
        self.engine.eval()
        with torch.no_grad():
            return cast(Tensor, (self.engine.module if self.uses_pipeline else self.engine)(input_ids))

    def collect_states(self, folder: Path, tag: str) -> dict[str, Any]:
        """What this rank has to write to `folder/tag`, by file name: DeepSpeed's states, with the live tensors."""
        collector = self.engine.checkpoint_engine
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        states, collector.states = collector.states, {}
        return cast(dict[str, Any], states)

    def load(self, folder: Path, tag: str) -> None:
        """Restore model, optimizer and engine counters from `folder/tag`."""
        fused = [group.get("fused") for group in self.engine.optimizer.param_groups]
        with weights_only(folder / tag):
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise CheckpointError(
                f"DeepSpeed found nothing to load in {folder / tag}", "remove that folder or restore it"
            )
        for group, value in zip(self.engine.optimizer.param_groups, fused, strict=True):
            group["fused"] = value  # of this start's device, not of the one that saved
        place_step_counts(self.engine.optimizer)

    def load_merged(self, merged: Merged, step: int, skipped_steps: int) -> None:
        """Restore model, optimizer and engine counters from a checkpoint that other ranks wrote.

        Every rank reads its part of each parameter and its share of the moments; one parameter at a time.
        """
        optimizer = self.engine.optimizer
        make_moments(optimizer, step - skipped_steps)
        for name, parameter in self.engine.module.named_parameters():
            public_name = self.public_names[name]
            for state in STATES if step > skipped_steps else STATES[:1]:  # moments are zero before the first step
                value = self._own_part(public_name, parameter, merged.read(public_name, state))
                set_state(parameter, state, value.to(self.device))
        engine = self.engine
        engine.global_steps, engine.skipped_steps = step, skipped_steps
        engine.micro_steps = step * self.accumulation_steps
        engine.global_samples = step * self.config.training.global_batch_size

    def _own_part(self, public_name: str, parameter: Any, whole: Tensor) -> Tensor:
        """What this rank holds of a whole parameter, padded with zeros where the vocabulary is."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        config = self.config
        part = part_of(public_name, shape, config.parallel, self.topology.tensor_rank, config.model.vocab_size)
        if part is None:
            return whole
        size = max(0, min(shape[part.dimension], part.whole - part.first))
        value = whole.new_zeros(shape)
        value.narrow(part.dimension, 0, size).copy_(whole.narrow(part.dimension, min(part.first, part.whole), size))
        return value

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def skipped_steps(self) -> int:
        """Steps DeepSpeed did not apply because a gradient was not finite."""
        return int(self.engine.skipped_steps)

    def weights_are_finite(self) -> bool:
        """Whether every weight on every rank is a finite number; a collective."""
        return are_finite(self.engine.module.parameters(), self.device)

    def forget_timers(self) -> None:
        """DeepSpeed's pipeline keeps two device events a step until somebody reads them; nobody does."""
        if self.uses_pipeline:
            self.engine.timers(TRAIN_BATCH_TIMER).reset()

    def step_scales(self) -> list[list[float]]:
        """Raw s_n of every looped layer of the model, [layers][N]; a collective."""
        model = self.config.model
        if not model.max_loops:
            return []
        scales = torch.zeros(model.num_hidden_layers, model.max_loops, device=self.device)
        partitioned = self.config.parallel.zero_stage == 3
        local = [layer for layer in self.engine.module.modules() if isinstance(layer, LoopedLayer)]
        for index, layer in enumerate(local, self.step_context.first_layer):
            with deepspeed.zero.GatheredParameters([layer.step_scales], enabled=partitioned):
                scales[index] = layer.step_scales.detach().float()
        if self.topology.pipeline_size > 1:
            dist.all_reduce(scales, group=self.topology.groups["pipeline"])
        return cast(list[list[float]], scales.tolist())

    def replica_differences(self) -> list[str]:
        """Working weights that should be the same bits on several ranks and are not, in words; a collective.

        Compared over data-parallel ranks (below ZeRO 3, which shards them), over tensor-parallel ranks where they are
        whole on each, and over the pipeline stages that share a tied module.
        """
        parallel, topology = self.config.parallel, self.topology
        named = [(self.public_names[name], weight) for name, weight in self.engine.module.named_parameters()]
        found: list[str] = []
        if parallel.zero_stage < 3:
            found += replica_differences(named, topology.groups["data"], "data-parallel")
            whole = [(name, weight) for name, weight in named if placement(name, parallel).cut is None]
            found += replica_differences(whole, topology.groups["tensor"], "tensor-parallel")
        if topology.pipeline_size > 1:
            for key, tied in self.engine.module.tied_comms.items():
                prefix = f"tied_modules.{key}."
                weights = [
                    (self.public_names[prefix + name], weight) for name, weight in tied["module"].named_parameters()
                ]
                found += replica_differences(weights, tied["group"], "pipeline")
        everywhere: list[Any] = [None] * topology.world_size
        dist.all_gather_object(everywhere, found)
        return sorted({line for lines in everywhere for line in lines})

    def _set_schedules(self, step: int) -> None:
        config = self.config
        steps = config.training.train_steps
        rate = learning_rate(step, config.optimizer, config.schedule, steps)
        betas = (beta1(step, config.optimizer, config.schedule, steps), config.optimizer.beta2)
        for group in self.engine.optimizer.param_groups:
            group["lr"], group["betas"] = rate, betas
        self.step_context.ponder_weight = ponder_weight(step, config.model.ponder_weight, config.training)

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Without waiting for what the device still has to do, as DeepSpeed's pipeline would for each micro-batch."""
        tokens, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        return tokens, labels

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value / dist.get_world_size()


def make_backend(model: ModelConfig, parallel: ParallelConfig, topology: Topology) -> Backend:
    """One device's layers, or megatron-core's where tensor-parallel ranks share them."""
    if topology.tensor_size == 1:
        return TorchBackend()
    from loopmem_pretrain.parallel.megatron import MegatronBackend  # the import takes seconds

    return MegatronBackend(parallel, topology, model.vocab_size)


def prepare_parameters(module: torch.nn.Module, names: Mapping[str, str], config: ParallelConfig, group: Any) -> None:
    """Tell DeepSpeed which parameters are cut, for the gradient norm, and see to gradients that are partial on a rank.

    The pipeline engine adds them up once a step. Elsewhere a hook on the parameter does, which sees the sum over all
    its uses: once a backward pass, however many loops.
    """
    for name, parameter in module.named_parameters():
        where = placement(names[name], config)
        parameter.tensor_model_parallel = where.cut is not None  # type: ignore[attr-defined]
        if not where.partial:
            continue
        if isinstance(module, pipeline.PipelineStage):
            module.partial_weights.append((parameter, group))
        else:
            parameter.register_hook(partial(all_reduced, group=group))  # type: ignore[no-untyped-call]


def _forget_skipped_gradients(optimizer: Any) -> None:
    """With ZeRO 2 and an offloaded optimizer DeepSpeed 0.19.8 keeps the sums of a step that it has skipped.

    Under bf16 it adds the next step's gradients to them, so that one NaN would never go away.
    """
    reset = optimizer.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None

    optimizer.reset_cpu_buffers = reset_all


def _prepare_for_zero3(module: torch.nn.Module) -> None:
    """Gather a looped layer once a visit, not once a loop and weight; let shared memory leave its owner as copies.

    Under ZeRO 3 a parameter is whole only while its module runs, but the layers read LN_q, LN_k and the global bank
    after SharedMemory has returned. The hook below runs before DeepSpeed's own, which empties the parameters.
    SharedMemory is no leaf module: DeepSpeed reduces a leaf's gradients when those of its inputs are known, and it has
    none. Its norms are named to it as external parameters instead.
    """
    deepspeed.utils.set_z3_leaf_modules(module, [LoopedLayer, PlainLayer], raise_if_not_found=False)
    for child in module.modules():
        if isinstance(child, SharedMemory):
            child.register_forward_hook(lambda memory, inputs, read: _copies(read))
            for norm in (child.query_norm, child.key_norm):
                for parameter in norm.parameters():
                    deepspeed.zero.register_external_parameter(child, parameter)


def _copies(value: Any) -> Any:
    if isinstance(value, SharedRead):
        return SharedRead(*(_copies(item) for item in value))
    if isinstance(value, tuple):
        return tuple(_copies(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value
