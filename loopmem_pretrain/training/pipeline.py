"""One list of layers, and the two modules DeepSpeed's engines train it in.

The list is embedding, then for each layer [the shared memory, a pass-through that ties it to every stage] and the
layer, then the final norm and the head. `PipelineStage` gives it to the pipeline engine; `WholeModel` gives the same
list, under the same positional names (`2.self_attn.q_proj.weight`, `tied_modules.memory.global_keys`), to the plain
engine. `parameter_table` translates positional names to the Hugging Face ones; it is built from the same list.

A looped layer returns its LoopStats; here they meet the training step: the ponder gradient is injected on the stage
that owns the layer, and detached means go to the stage's accumulator, outside any recomputed region.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.training import TrainingConfig
from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.model.backend import Backend
from loopmem_pretrain.model.block import RMSNorm
from loopmem_pretrain.model.loopmem import LoopedLayer, PlainLayer, make_layer, ponder_cost
from loopmem_pretrain.model.memory import SharedMemory, SharedRead
from loopmem_pretrain.parallel.placement import padded_size, placement
from loopmem_pretrain.parallel.topology import Topology
from loopmem_pretrain.training.metrics import LoopAccumulator

MEMORY_KEY, EMBEDDING_KEY = "memory", "embedding"


class Entry(NamedTuple):
    """One position of the list."""

    make: Callable[[], nn.Module]
    public_prefix: str
    """What replaces `<position>.` or `tied_modules.<key>.` in the names of its parameters."""
    tied_key: str | None = None
    """Entries of one key share one module, whose gradients are summed over the stages that hold it."""
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    """How this position uses the module, where not by calling it."""


def layer_list(model: ModelConfig, backend: Backend) -> list[Entry]:
    """The whole model as a list of layers, the same for every engine and every pipeline cut."""
    tied_head = EMBEDDING_KEY if model.tie_word_embeddings else None
    embedding = Entry(
        partial(backend.embedding, model.vocab_size, model.hidden_size), "model.embed_tokens.", tied_key=tied_head
    )
    memory = Entry(partial(SharedMemory, model, backend), "model.memory.", tied_key=MEMORY_KEY)
    entries = [embedding]
    for index in range(model.num_hidden_layers):
        if model.local_slots or model.global_slots:
            entries.append(memory)
        entries.append(Entry(partial(make_layer, model, backend, index), f"model.layers.{index}."))
    entries.append(Entry(partial(RMSNorm, model.hidden_size, model.rms_norm_eps), "model.norm."))
    if tied_head:
        entries.append(
            embedding._replace(forward=lambda module, hidden: backend.logits(hidden, cast(Tensor, module.weight)))
        )
    else:
        entries.append(Entry(partial(backend.lm_head, model.hidden_size, model.vocab_size), "lm_head."))
    return entries


class ParameterRow(NamedTuple):
    """One parameter of the whole model, whichever stage holds it."""

    public_name: str
    shape: list[int]
    """Of the part that a tensor-parallel rank holds."""


def parameter_table(model: ModelConfig, backend: Backend) -> dict[str, ParameterRow]:
    """Positional name -> public name and shape, of all parameters in the order of the list; allocates nothing."""
    table = {}
    for position, entry in enumerate(layer_list(model, backend)):
        key = f"tied_modules.{entry.tied_key}." if entry.tied_key else f"{position}."
        with torch.device("meta"):
            module = entry.make()
        for name, parameter in module.named_parameters():
            table[key + name] = ParameterRow(entry.public_prefix + name, list(parameter.shape))
    return table


class StepContext:
    """What the layers of a stage meet in a training step besides the hidden state."""

    def __init__(
        self, model: ModelConfig, accumulator: LoopAccumulator, accumulation_steps: int, token_parts: int = 1
    ) -> None:
        self.model = model
        self.accumulator = accumulator
        self.accumulation_steps = accumulation_steps
        self.token_parts = token_parts
        """Ranks over which sequence parallelism cuts the tokens that a cost is a mean of."""
        self.first_layer = 0
        """Number, in the whole model, of the first layer of this stage."""
        self.ponder_weight = 0.0
        """Weight of the ponder loss in the current step."""


def run_layers(functions: Sequence[Callable[..., Any]], tied: nn.ModuleDict, x: Tensor, step: StepContext) -> Any:
    """Put one micro-batch through a run of the list: tokens or hidden state in, hidden state or logits out."""
    memory = tied[MEMORY_KEY] if MEMORY_KEY in tied else None  # noqa: SIM401 - a ModuleDict has no get()
    shared: SharedRead | None = memory() if memory is not None else None
    index = step.first_layer
    for function in functions:
        if function is memory:
            continue
        if not isinstance(function, PlainLayer | LoopedLayer):
            x = function(x)
            continue
        x, stats = function(x, shared)
        if stats is not None and torch.is_grad_enabled():
            cost = ponder_cost(stats.expected_loops(), step.model.max_loops)
            if step.ponder_weight:
                means = step.model.num_hidden_layers * step.accumulation_steps * step.token_parts
                gradient = step.ponder_weight / means
                x = InjectGradient.apply(x, cost, gradient)  # type: ignore[no-untyped-call]
            step.accumulator.add(index, stats, cost, step.ponder_weight)
        index += 1
    return x


class InjectGradient(torch.autograd.Function):
    """Identity on `hidden`; in the backward pass `cost` receives the constant `gradient`.

    An auxiliary loss then needs no path through later layers and pipeline stages: adding `gradient * cost` to the
    loss at the end has the same gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cost: Tensor, gradient: float) -> Tensor:
        ctx.gradient, ctx.cost = gradient, cost.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_hidden, torch.full_like(ctx.cost, ctx.gradient), None


class PipelineStage(PipelineModule):  # type: ignore[misc]
    """This rank's run of the list, for DeepSpeed's pipeline engine (ZeRO 1)."""

    def __init__(
        self,
        model: ModelConfig,
        backend: Backend,
        loss_fn: Callable[..., Tensor],
        step: StepContext,
        topology: Topology,
        bounds: Sequence[int],
    ) -> None:
        self.bounds = list(bounds)
        self.partial_weights: list[tuple[nn.Parameter, Any]] = []
        """(weight, tensor-parallel group) where each rank sees a part of the gradient."""
        entries = layer_list(model, backend)
        axes = PipeModelDataParallelTopology(
            num_pp=topology.pipeline_size, num_mp=topology.tensor_size, num_dp=topology.data_size
        )
        super().__init__(
            layers=[_spec(entry) for entry in entries], topology=axes, loss_fn=loss_fn, partition_method="ours"
        )
        before = entries[: self.bounds[topology.pipeline_rank]]
        step.first_layer = sum(entry.public_prefix.startswith("model.layers.") for entry in before)
        self.step_context = step

    def _partition_layers(self, method: str = "ours") -> None:
        """Cut the list at `bounds`; DeepSpeed's own cuts know nothing of loops, nor that memory goes with its layer."""
        self.parts = self.bounds
        stage = self.stage_id
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Weights whose gradients DeepSpeed sums over a group once a step: tied ones over their stages, and ours."""
        return [*super().get_tied_weights_and_groups(), *self.partial_weights]

    def ckpt_layer_path(self, ckpt_dir: str, local_layer_idx: int) -> Any:
        """A shared module is saved once a stage; DeepSpeed would write it for every position that uses it."""
        return super().ckpt_layer_path(ckpt_dir, self._first_use(local_layer_idx))

    def ckpt_layer_path_list(self, ckpt_dir: str, local_layer_idx: int) -> Any:
        """Where `ckpt_layer_path` has put it, on all tensor-parallel ranks."""
        return super().ckpt_layer_path_list(ckpt_dir, self._first_use(local_layer_idx))

    def _first_use(self, index: int) -> int:
        return next(first for first, module in enumerate(self.forward_funcs) if module is self.forward_funcs[index])

    def forward(self, inputs: Tensor) -> Any:
        return run_layers(self.forward_funcs, self.tied_modules, inputs, self.step_context)


def _spec(entry: Entry) -> LayerSpec:
    """DeepSpeed's description of an entry; its own constructor takes classes only, ours are factories."""
    if entry.tied_key is None:
        spec = LayerSpec(nn.Module)
    else:
        with torch.device("meta"):
            attributes = [name for name, _ in entry.make().named_parameters()]
        spec = TiedLayerSpec(entry.tied_key, nn.Module, forward_fn=entry.forward, tied_weight_attr=attributes)
    spec.build = lambda log=False: entry.make()
    return spec


class WholeModel(nn.Module):
    """The whole list on every rank, for DeepSpeed's plain engine (ZeRO 2 and 3); names as in PipelineStage.

    `on_made` is given each module when it is made, before the next one is.
    """

    def __init__(
        self,
        model: ModelConfig,
        backend: Backend,
        loss_fn: Callable[..., Tensor],
        step: StepContext,
        on_made: Callable[[Entry, nn.Module], object] = lambda entry, module: None,
    ) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.functions: list[Callable[..., Any]] = []
        for position, entry in enumerate(layer_list(model, backend)):
            if entry.tied_key is not None and entry.tied_key in self.tied_modules:
                module = self.tied_modules[entry.tied_key]
            else:
                module = entry.make()
                on_made(entry, module)
                if entry.tied_key is None:
                    self.add_module(str(position), module)
                else:
                    self.tied_modules[entry.tied_key] = module
            self.functions.append(partial(entry.forward, module) if entry.forward else module)
        self.loss_fn = loss_fn
        self.step_context = step

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, T] and [B, T] -> mean cross-entropy of the micro-batch; logits [B, T, V] without labels."""
        logits = run_layers(self.functions, self.tied_modules, input_ids, self.step_context)
        return cast(Tensor, logits) if labels is None else self.loss_fn(logits, labels)


def universal_checkpoint_info(
    table: Mapping[str, ParameterRow], model: ModelConfig, parallel: ParallelConfig
) -> dict[str, Any]:
    """What DeepSpeed's converter to the universal form asks for: how the parts of each parameter are merged.

    Each parameter is in exactly one list, under its full name: DeepSpeed concatenates silently what no list names.
    """
    lists: dict[str, list[str]] = {}
    for name, row in table.items():
        where = placement(row.public_name, parallel)
        if where.cut is None:
            key = "tp_replicated_parameter_patterns"
        elif where.padded:
            key = "vocabulary_parameter_patterns"
        elif where.cut == 1:
            key = "parameter_with_row_parallelism_patterns"
        else:
            continue  # cut along dimension 0, what DeepSpeed does with the rest
        lists.setdefault(key, []).append(f"{re.escape(name)}$")
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": model.vocab_size,
        "padded_vocab_size": padded_size(model.vocab_size, parallel.tensor_model_parallel_size),
        **lists,
    }


def wrap_loops(module: nn.Module, training: TrainingConfig) -> None:
    """Recompute and compile one loop at a time, as the config asks."""
    for layer in module.modules():
        if not isinstance(layer, PlainLayer | LoopedLayer):
            continue
        if training.compile == "loop":
            layer.run = _compiled(layer.one_loop)
        if training.activation_checkpointing == "loop":
            layer.recompute = _RECOMPUTE


CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def wrap_loss(cross_entropy: CrossEntropy, training: TrainingConfig) -> CrossEntropy:
    """Compile the loss where loops are compiled: eager, it writes the logits anew several times, in float32."""
    return _compiled(cross_entropy) if training.compile == "loop" else cross_entropy


def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    # All layers share the compiled code: two graphs of a looped layer (the first loop, whose mixture so far has no
    # gradient, and the others), one of a plain one. fullgraph makes torch raise where it would otherwise fall back to
    # eager (a graph break, too many recompilations); with static shapes alone, recomputation meets the graph it had.
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(run, fullgraph=True, dynamic=False)

    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except TorchDynamoException as error:
            raise EnvironmentFault(
                f"torch.compile could not compile a part of the model (training.compile: loop): {error}",
                "install what torch.compile needs (a C++ compiler; on GPUs also Triton, which comes with torch), "
                "or set training.compile=none",
            ) from error

    return call


# Non-reentrant only: reentrant recomputation of a reused layer breaks under ZeRO 2 and 3. The model draws no random
# numbers, so there is no generator state to keep.
_RECOMPUTE = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
