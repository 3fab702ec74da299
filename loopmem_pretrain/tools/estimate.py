"""What a run costs, as text, without torch: parameters, FLOPs, memory and traffic of a rank, plans, step times."""

import math

from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.model.flops import forward_flops_per_token, parameter_counts, training_flops_per_token
from loopmem_pretrain.parallel.stages import layers_of_stage
from loopmem_pretrain.tools.communication import traffic
from loopmem_pretrain.tools.memory_plan import Layout, RankMemory, bank_bytes, stage_memory
from loopmem_pretrain.tools.plans import USABLE, best_of_each_cut, plans
from loopmem_pretrain.tools.scaling import describe_cluster
from loopmem_pretrain.tools.step_time import mfu
from loopmem_pretrain.tools.tables import human_bytes, human_seconds, table
from loopmem_pretrain.words import counted

STAGES_SHOWN = 5
PLANS_SHOWN = 5


def describe(
    config: RunConfig,
    ranks: int | None = None,
    gpu_memory_gb: float | None = None,
    cluster: ClusterConfig | None = None,
) -> str:
    """The whole print-out. Plans are looked for where `ranks` is given, step times where `cluster` is.

    `ranks` is the number of GPUs (default: the fewest that TP and PP need); `gpu_memory_gb` the memory of one in 1e9
    bytes (default: the cluster's, else 80).

    Where the configuration cannot be spread over the `ranks` given, it says why and goes on to the plans that fit.

    Raises:
        ConfigError: batch and parallel sizes do not fit together, or nothing could be meant by a number.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks {ranks} is not valid", "give 1 or more")
    if gpu_memory_gb is not None and not 0 < gpu_memory_gb < math.inf:
        raise ConfigError(
            f"--gpu-memory {gpu_memory_gb:g} is not valid", "give the memory of one GPU in GB, such as 80"
        )
    parallel = config.parallel
    fewest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    gpu_bytes = 1e9 * (gpu_memory_gb or (cluster.gpu_memory_gb if cluster else 80.0))
    parts = [_model(config)]
    try:
        layout = Layout.of(config, ranks or fewest)
    except ConfigError as error:
        if ranks is None:
            raise
        parts.append([f"This configuration does not fit {counted(ranks, 'rank')}:", f"  {error}"])
    else:
        parts += [_memory(layout, gpu_bytes), _traffic(layout)]
        if cluster:
            parts.append(describe_cluster(layout, cluster))
    if ranks:
        parts.append(_plans(config, ranks, gpu_bytes, cluster))
    return "\n\n".join("\n".join(part) for part in parts)


def _model(config: RunConfig) -> list[str]:
    """Every line can be checked by hand against model/flops.py."""
    model, training, data = config.model, config.training, config.data
    counts = parameter_counts(model)
    samples = training.micro_batch_size
    forward = forward_flops_per_token(model, data.seq_length, tokens=samples * data.seq_length)
    alone = forward_flops_per_token(model, data.seq_length).total
    per_token = training_flops_per_token(model, data.seq_length, samples)
    tokens_per_step = training.global_batch_size * data.seq_length
    tokens = tokens_per_step * training.train_steps
    rows = [
        ("parameters", counts.total, ""),
        *((f"  {name}", value, _share(value, counts.total)) for name, value in counts._asdict().items() if value),
        ("forward FLOPs per token", forward.total, f"{model.max_loops or 1} loops a layer, T = {data.seq_length}"),
        *((f"  {name}", value, _share(value, forward.total)) for name, value in forward._asdict().items() if value),
        *(
            [("  token by token", alone, "where each read is projected, not the slots")]
            if alone != forward.total
            else []
        ),
        ("training FLOPs per token", per_token, "3 x forward, recomputation not counted"),
        ("tokens per step", tokens_per_step, f"{training.global_batch_size} samples of {data.seq_length}"),
        ("tokens", tokens, f"{training.train_steps:,} steps"),
        ("training FLOPs", tokens * per_token, f"{tokens * per_token:.3g}"),
    ]
    width = max(len(name) for name, _, _ in rows)
    digits = max(len(f"{value:,}") for _, value, _ in rows)
    return [f"{name:<{width}}  {value:>{digits},}  {note}".rstrip() for name, value, note in rows]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _memory(layout: Layout, gpu_bytes: float) -> list[str]:
    """Peak of each stage's ranks, the worst stage in the first column, the largest item in the first row."""
    each = [stage_memory(layout, stage) for stage in range(layout.stages)]
    order = sorted(range(layout.stages), key=lambda stage: -each[stage].total)
    shown, worst = order[:STAGES_SHOWN], each[order[0]]
    items = sorted(RankMemory._fields, key=lambda name: -getattr(worst, name))
    items = [name for name in items if any(getattr(memory, name) for memory in each)]
    heads = [f"stage {stage}" + (" (worst)" if stage == order[0] else "") for stage in shown]
    rows = [["", *(heads if layout.stages > 1 else ["every rank"])]]
    rows.append(["layers", *(_layers(layout, stage) for stage in shown)])
    rows.append(["parameters", *(f"{layout.parameters(stage):,}" for stage in shown)])
    rows.append(["peak memory", *(human_bytes(each[stage].total) for stage in shown)])
    rows += [[f"  {LABELS[name]}", *(_bytes(getattr(each[stage], name)) for stage in shown)] for name in items]
    if any(bank_bytes(layout, stage) for stage in shown):
        rows.append(["states of memory banks", *(human_bytes(bank_bytes(layout, stage)) for stage in shown)])
    verdict = "fits" if worst.total <= USABLE * gpu_bytes else "DOES NOT FIT"
    title = [f"{layout.describe()}: {_switches(layout)}"]
    if layout.stages > len(shown):
        title.append(f"  of {layout.stages} stages the {len(shown)} that need most memory")
    return [
        *title,
        *table(rows),
        f"  {verdict}: {human_bytes(worst.total)} of {human_bytes(USABLE * gpu_bytes)}, "
        f"{USABLE:.0%} of a GPU with {human_bytes(gpu_bytes)}",
    ]


def _bytes(size: int) -> str:
    return human_bytes(size) if size else "-"


LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer: masters, moments",
    "zero_buckets": "ZeRO: gradient bucket",
    "zero3_gathered": "ZeRO 3: gathered weights",
    "activations": "activations",
    "logits": "logits and cross-entropy",
    "backward": "more in the backward pass",
}


def _layers(layout: Layout, stage: int) -> str:
    layers = layers_of_stage(layout.config.model, layout.bounds, stage)
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def _switches(layout: Layout) -> str:
    parallel, training = layout.config.parallel, layout.config.training
    parts = [f"ZeRO {parallel.zero_stage}", training.precision]
    parts += ["sequence parallel"] * parallel.sequence_parallel
    parts += ["sharded banks"] * (parallel.memory_placement == "sharded")
    parts += ["loops recomputed" if training.activation_checkpointing == "loop" else "no recomputation"]
    passes, samples = layout.micro_batches, counted(training.micro_batch_size, "sample")
    parts.append(f"{passes:,} micro-batch{'es' * (passes > 1)} of {samples} a step")
    return ", ".join(parts)


def _traffic(layout: Layout) -> list[str]:
    """What the stage that sends most sends, by kind."""
    each = [traffic(layout, stage) for stage in range(layout.stages)]
    most = max(range(layout.stages), key=lambda stage: sum(kind.bytes for kind in each[stage].values()))
    kinds = sorted(each[most].items(), key=lambda item: -item[1].bytes)
    rows = [[name, human_bytes(sent.bytes), f"{sent.messages:,}"] for name, sent in kinds if sent.messages]
    if not rows:
        return ["Sent by a rank in a step: nothing, it is alone"]
    where = f" of stage {most}, which sends most" if layout.stages > 1 else ""
    return [f"Sent by a rank{where} in a step", *table([["", "bytes", "messages"], *rows])]


def _plans(config: RunConfig, ranks: int, gpu_bytes: float, cluster: ClusterConfig | None) -> list[str]:
    found = plans(config, ranks, gpu_bytes, cluster)
    gpus = f"{counted(ranks, 'GPU')} of {human_bytes(gpu_bytes)}"
    if not found and not plans(config, ranks, math.inf, cluster):
        return [
            f"{gpus} cannot share training.global_batch_size {config.training.global_batch_size}:",
            f"  take a number of GPUs, or a batch, of which one divides the other; also by parts of the model "
            f"({config.model.num_hidden_layers} layers, {config.model.num_attention_heads} heads)",
        ]
    if not found:
        return [
            f"No plan fits {gpus} with training.global_batch_size {config.training.global_batch_size}:",
            "  take more GPUs, a shorter data.seq_length, or a batch with more divisors",
        ]
    shown = best_of_each_cut(found)[:PLANS_SHOWN]
    order = "fastest first" if cluster else "least parallelism first; --cluster FILE orders them by time"
    title = f"Plans for {gpus}: {len(found)} fit, here the best of each TP x PP, {order}"
    rows = [
        ["", *(["step", "MFU"] if cluster else []), "memory", "TP", "PP", "DP", "ZeRO", "recompute", "micro-batches"]
    ]
    for number, plan in enumerate(shown, start=1):
        layout, run = plan.layout, plan.layout.config
        timed = []
        if cluster and plan.seconds:
            timed = [human_seconds(plan.seconds), f"{mfu(layout, plan.seconds, cluster):.0%}"]
        sizes = (run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size, layout.data_ranks)
        rows.append(
            [
                f"{number}",
                *timed,
                human_bytes(plan.bytes),
                *(f"{size:,}" for size in sizes),
                f"{run.parallel.zero_stage}",
                "loops" if run.training.activation_checkpointing == "loop" else "-",
                f"{layout.micro_batches} x {run.training.micro_batch_size}",
            ]
        )
    overrides = [f"  {n}: {' '.join(plan.overrides(config)) or 'as it is'}" for n, plan in enumerate(shown, start=1)]
    return [title, *table(rows), "  add to the command line:", *overrides]
