"""A whole training run: its sections, the rules between them, and the batch arithmetic."""

from pathlib import Path

from loopmem_pretrain.config.base import FilePath, Problem, Section
from loopmem_pretrain.config.data import DataConfig, data_problems
from loopmem_pretrain.config.model import ModelConfig, model_problems
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.preflight import parallel_problems, tensor_parallel_sizes
from loopmem_pretrain.config.training import (
    AlarmConfig,
    CheckpointConfig,
    EvaluationConfig,
    FaultConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)
from loopmem_pretrain.errors import ConfigError

TASK_FILES = Path(__file__).parents[1] / "eval" / "tasks"
"""A file for each suite and task, named as it is; those with `_` in front are parts of others."""


class RunConfig(Section):
    """Everything `loopmem train` needs to know."""

    run_dir: FilePath
    """Folder of the run: checkpoints, metrics, status; the same folder resumes."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """Token shards."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is spread over ranks."""
    training: TrainingConfig
    """Steps, batches, precision."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig
    """Learning rate over steps."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Task suites while training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    faults: FaultConfig = FaultConfig()
    """What the run survives, and when it stops by itself."""
    logging: LoggingConfig = LoggingConfig()
    """What is written while training."""
    alarms: AlarmConfig = AlarmConfig()
    """Values that are watched and warned about."""


def run_problems(config: RunConfig) -> list[Problem]:
    """All rules between fields; each problem is (path of the key to change, what is wrong and what is valid)."""
    problems = model_problems(config.model) + data_problems(config.data)
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
    if config.faults.spike_action == "rewind" and config.checkpoint.keep_last < 2:
        why = "1 may be of a spike that has just begun; faults.spike_action rewind needs at least 2"
        problems.append((("checkpoint", "keep_last"), why))
    problems += _checkpoint_problems(config)
    problems += _evaluation_problems(config)
    problems += parallel_problems(config.model, config.data, config.parallel, training, optimizer)
    return problems


def _checkpoint_problems(config: RunConfig) -> list[Problem]:
    """A checkpoint can only be kept for a reason that holds at a step where one is written."""
    problems: list[Problem] = []
    checkpoint, every = config.checkpoint, config.checkpoint.interval_steps
    if checkpoint.keep_every_steps % every:
        valid = f"must be 0 or a multiple of checkpoint.interval_steps {every}"
        problems.append((("checkpoint", "keep_every_steps"), f"{checkpoint.keep_every_steps} {valid}"))
    if checkpoint.keep_best and every % config.validation.interval_steps:
        problems.append(
            (
                ("checkpoint", "keep_best"),
                f"{checkpoint.keep_best} needs a validation loss at each checkpoint: checkpoint.interval_steps {every} "
                f"must be a multiple of validation.interval_steps {config.validation.interval_steps}",
            )
        )
    return problems


def _evaluation_problems(config: RunConfig) -> list[Problem]:
    """Tasks are known by their files; scoring them needs the logits of whole prompts on every rank."""
    problems: list[Problem] = []
    known = sorted(path.stem for path in TASK_FILES.glob("[!_]*.yaml"))
    if unknown := [name for name in config.evaluation.tasks if name not in known]:
        problems.append((("evaluation", "tasks"), f"{', '.join(unknown)} not known; valid: {', '.join(known)}"))
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if not config.evaluation.tasks or tp == pp == 1:
        return problems
    name, size = ("tensor_model_parallel_size", tp) if tp > 1 else ("pipeline_model_parallel_size", pp)
    why = "no rank has all logits of a token" if tp > 1 else "only the last stage has logits"
    problems.append(
        (
            ("evaluation", "tasks"),
            f"cannot be scored while training with parallel.{name} {size}: {why}; leave them out and score "
            "checkpoints with `loopmem eval --tasks`, or use data parallelism alone",
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
        nearest = per_pass * max(1, round(training.global_batch_size / per_pass))
        on_each, rest = divmod(training.global_batch_size, data_parallel_size)
        smaller = [size for size in range(1, training.micro_batch_size) if not rest and on_each % size == 0]
        same_batch = f"set training.micro_batch_size to {smaller[-1]}, which keeps the batch, or " if smaller else ""
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks = {per_pass}",
            f"{same_batch}set training.global_batch_size to a multiple of {per_pass}, the nearest is {nearest}, or "
            "change the number of ranks",
        )
    return training.global_batch_size // per_pass


def check_topology(config: RunConfig, world_size: int) -> None:
    """Refuse a number of ranks that the configuration cannot be spread over, before anything is started.

    Raises:
        ConfigError: ranks, batch and pipeline stages do not fit together; says which numbers would.
    """
    parallel, training = config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ConfigError(
            f"{world_size} ranks are not a multiple of parallel.tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} = {tp * pp}, the ranks that hold one copy of the model",
            f"start {tp * pp}, {2 * tp * pp}, {3 * tp * pp}, ... ranks, or with {world_size} ranks take "
            f"{_factorizations(config, world_size)}",
        )
    data_parallel_size = world_size // (tp * pp)
    per_pass = training.micro_batch_size * data_parallel_size
    if pp > 1 and training.global_batch_size < per_pass * pp:
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} makes "
            f"{training.global_batch_size // per_pass} micro-batches of {training.micro_batch_size} on each of "
            f"{data_parallel_size} data-parallel ranks, fewer than the {pp} pipeline stages, which would never all "
            "work at once",
            f"set training.global_batch_size to {per_pass * pp} or a larger multiple of {per_pass}, or lower "
            "micro_batch_size",
        )
    gradient_accumulation_steps(training, data_parallel_size)


def _factorizations(config: RunConfig, world_size: int) -> str:
    """Every (TP, PP) that this configuration and number of ranks allow, in words."""
    each = []
    for tp in tensor_parallel_sizes(config.model):
        pps = [pp for pp in range(1, config.model.num_hidden_layers + 1) if _fits(config, world_size, tp, pp)]
        if pps:
            each.append(f"TP {tp} with PP {', '.join(map(str, pps))}")
    return "; ".join(each) or "no sizes: none fit; change zero_stage, sequence_parallel, memory_placement or the ranks"


def _fits(config: RunConfig, world_size: int, tp: int, pp: int) -> bool:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    parallel = config.parallel.model_copy(update=sizes)
    problems = parallel_problems(config.model, config.data, parallel, config.training, config.optimizer)
    return world_size % (tp * pp) == 0 and not problems
