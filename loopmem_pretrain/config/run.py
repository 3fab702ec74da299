"""A whole training run: its sections, the rules between them, and the batch arithmetic."""

from pydantic import Field

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.config.data import DataConfig
from loopmem_pretrain.config.model import ModelConfig, model_problems
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.training import (
    AlarmConfig,
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)
from loopmem_pretrain.errors import ConfigError

Problem = tuple[tuple[str, ...], str]


class RunConfig(Section):
    """Everything `loopmem train` needs to know."""

    run_dir: str = Field(min_length=1)
    """Folder of the run: checkpoints, metrics, status; the same folder resumes."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """Token shards."""
    parallel: ParallelConfig = ParallelConfig()
    """Spread over ranks."""
    training: TrainingConfig
    """Steps, batches, precision."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig
    """Learning rate over steps."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """Logs."""
    alarms: AlarmConfig = AlarmConfig()
    """Alarms."""


def run_problems(config: RunConfig) -> list[Problem]:
    """All rules between fields; each problem is (path of the key to change, what is wrong and what is valid)."""
    problems = model_problems(config.model)
    schedule, training, optimizer = config.schedule, config.training, config.optimizer
    steps = training.train_steps
    if schedule.warmup_steps >= steps:
        problems.append(
            (("schedule", "warmup_steps"), f"{schedule.warmup_steps} leaves no step after it; must be < {steps}")
        )
    room = steps - schedule.warmup_steps
    if schedule.type == "wsd" and schedule.decay_steps > room > 0:
        problems.append((("schedule", "decay_steps"), f"{schedule.decay_steps} does not fit; at most {room}"))
    if schedule.type == "wsd" and schedule.decay_steps == 0:
        problems.append((("schedule", "decay_steps"), "wsd needs a final decay; usual: a tenth of train_steps"))
    if schedule.type != "wsd" and schedule.decay_steps:
        problems.append((("schedule", "decay_steps"), f"belongs to type wsd, not {schedule.type}; leave it out"))
    if schedule.type != "one_cycle" and schedule.beta1_min is not None:
        problems.append((("schedule", "beta1_min"), f"belongs to type one_cycle, not {schedule.type}; leave it out"))
    if schedule.beta1_min is not None and schedule.beta1_min > optimizer.beta1:
        problems.append((("schedule", "beta1_min"), f"{schedule.beta1_min} is above optimizer.beta1 {optimizer.beta1}"))
    if schedule.min_lr > optimizer.lr:
        problems.append((("schedule", "min_lr"), f"{schedule.min_lr} is above the peak optimizer.lr {optimizer.lr}"))
    if training.global_batch_size % training.micro_batch_size:
        problems.append(
            (
                ("training", "micro_batch_size"),
                f"{training.micro_batch_size} does not divide global_batch_size {training.global_batch_size}",
            )
        )
    if training.ponder_schedule != "constant" and config.model.ponder_weight == 0:
        problems.append(
            (
                ("training", "ponder_schedule"),
                f"'{training.ponder_schedule}' modulates model.ponder_weight, which is 0",
            )
        )
    if training.compile == "loop" and config.parallel.zero_stage == 3:
        problems.append(
            (
                ("training", "compile"),
                "'loop' does not work with zero_stage 3, whose parameters come and go while a "
                "compiled loop expects them in place; use zero_stage 1 or 2, or compile: none",
            )
        )
    return problems


def gradient_accumulation_steps(training: TrainingConfig, data_parallel_size: int) -> int:
    """Micro-batches each rank adds up in one step.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    per_pass = training.micro_batch_size * data_parallel_size
    if training.global_batch_size % per_pass:
        below = max(per_pass, training.global_batch_size // per_pass * per_pass)
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks = {per_pass}",
            f"set training.global_batch_size to a multiple of {per_pass}, for example {below}, "
            "or change micro_batch_size or the number of ranks",
        )
    return training.global_batch_size // per_pass
