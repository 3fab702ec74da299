"""Which keys of a run's configuration may be others at a restart."""

from loopmem_pretrain.config.load import differences
from loopmem_pretrain.config.run import RunConfig

# Keys that say how a run is executed or observed, not what it computes.
MAY_CHANGE = (
    "run_dir",
    "logging.",
    "checkpoint.",
    "faults.",
    "validation.",
    "evaluation.",
    "alarms.",
    "data.num_workers",
    "parallel.",
    "training.micro_batch_size",
    "training.device",
    "training.compile",
    "training.activation_checkpointing",
    "training.deterministic",
)


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """What differs and may not, as `key: before -> now`."""
    lines = differences(_without_paths(before), _without_paths(now))
    return [line for line in lines if not line.startswith(MAY_CHANGE)]


def _without_paths(config: RunConfig) -> RunConfig:
    """Data may move: what it is, not where, is compared by its fingerprint when a checkpoint is resumed."""
    datasets = tuple(dataset.model_copy(update={"path": "-"}) for dataset in config.data.datasets)
    return config.model_copy(update={"data": config.data.model_copy(update={"datasets": datasets})})
