"""Step times of a layout on a cluster, and what becomes of them on up to 16,384 GPUs, as text."""

from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.tools.memory_plan import Layout
from loopmem_pretrain.tools.step_time import ASSUMPTIONS, StepTime, mfu, step_time, tokens_per_step
from loopmem_pretrain.tools.tables import human, human_seconds, table

LARGEST = 16_384


def describe_cluster(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """Assumptions, the parts of a step, and the scaling table."""
    time = step_time(layout, cluster)
    parts = sorted(time._asdict().items(), key=lambda item: -item[1])
    rows = [["step", human_seconds(time.total), f"MFU {mfu(layout, time.total, cluster):.1%}"]]
    rows += [[f"  {LABELS[name]}", human_seconds(value), f"{value / time.total:.1%}"] for name, value in parts if value]
    return [
        f"Simulated on {cluster.name}; nothing here was measured. Assumed:",
        f"  kernels reach {cluster.achievable_fraction:.0%} of {cluster.peak_tflops:g} TFLOP/s; links "
        f"{cluster.bandwidth_fraction:.0%} of {cluster.intra_node_gb_per_s:g} GB/s within a node of "
        f"{cluster.gpus_per_node}, of {cluster.inter_node_gb_per_s:g} GB/s between nodes",
        f"  a message starts in {cluster.intra_node_latency_us:g} us within a node, in "
        f"{cluster.inter_node_latency_us:g} us between nodes",
        *(f"  {line}" for line in ASSUMPTIONS),
        *table(rows),
        "",
        *_scaling(layout, cluster),
    ]


LABELS = {
    "compute": "computing",
    "tensor": "tensor parallel",
    "pipeline": "pipeline: passing on",
    "bubble": "pipeline: filling, draining",
    "data": "data parallel, tied weights",
    "optimizer": "optimizer",
}


def _scaling(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """More and more ranks with the same TP and PP: the batch grows with them, or stays."""
    titles = ["GPUs", "DP", "samples", "step", "tokens/s", "MFU", "computing", "in TP", "in PP", "in DP", "step", "MFU"]
    rows = [titles]
    ranks = layout.ranks
    while ranks <= LARGEST:
        grown = _grown(layout, ranks)
        time = step_time(grown, cluster)
        total = time.total
        rows.append(
            [
                f"{ranks:,}",
                f"{grown.data_ranks:,}",
                f"{grown.config.training.global_batch_size:,}",
                human_seconds(total),
                human(tokens_per_step(grown) / total),
                f"{mfu(grown, total, cluster):.1%}",
                *(f"{share / total:.0%}" for share in _groups(time)),
                *_fixed_batch(layout.config, ranks, cluster),
            ]
        )
        ranks *= 2
    lines = table(rows)
    left = lines[0].rindex("step")  # of the two columns for a batch that stays
    return [
        "Scaling of this plan, by its data-parallel size; shares of the step while the batch grows with the GPUs",
        f"{'  batch grows with the GPUs':<{left}}batch stays",
        *lines,
    ]


def _grown(layout: Layout, ranks: int) -> Layout:
    """The layout over `ranks`, with a batch that has grown with them."""
    training = layout.config.training
    batch = training.global_batch_size * ranks // layout.ranks
    changed = {"training": training.model_copy(update={"global_batch_size": batch})}
    return Layout.of(layout.config.model_copy(update=changed), ranks)


def _groups(time: StepTime) -> tuple[float, float, float, float]:
    """Computing, tensor, pipeline and data parallelism."""
    return time.compute + time.optimizer, time.tensor, time.pipeline + time.bubble, time.data


def _fixed_batch(config: RunConfig, ranks: int, cluster: ClusterConfig) -> list[str]:
    try:
        layout = Layout.of(config, ranks)
    except ConfigError:  # too few samples for so many ranks
        return ["-", "-"]
    total = step_time(layout, cluster).total
    return [human_seconds(total), f"{mfu(layout, total, cluster):.1%}"]
