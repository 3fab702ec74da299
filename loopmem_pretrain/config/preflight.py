"""What parallel sizes a model, its data and its training allow: rules between sections, each with its reason.

`config/run.py:run_problems` adds these to the rules of the other sections, so that all are reported at once. What also
depends on the number of ranks is `config/run.py:check_topology`.
"""

import math

from loopmem_pretrain.config.base import Problem
from loopmem_pretrain.config.data import DataConfig
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.config.training import OptimizerConfig, TrainingConfig


def parallel_problems(
    model: ModelConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
) -> list[Problem]:
    """Rules about parallel sizes; each problem is (path of the key to change, what is wrong and what is valid)."""
    return [
        *_tensor_parallel_problems(model, data, parallel),
        *_placement_problems(model, parallel),
        *_pipeline_problems(model, parallel),
        *_weight_decay_problems(parallel, training, optimizer),
        *_offload_problems(parallel),
        *_compile_problems(parallel, training),
    ]


def tensor_parallel_sizes(model: ModelConfig) -> list[int]:
    """Every TP over which query heads, key/value heads and feed-forward can be cut evenly."""
    common = math.gcd(model.num_attention_heads, model.num_key_value_heads, model.intermediate_size)
    return [size for size in range(1, common + 1) if common % size == 0]


def _tensor_parallel_problems(model: ModelConfig, data: DataConfig, parallel: ParallelConfig) -> list[Problem]:
    tp = parallel.tensor_model_parallel_size
    key = ("parallel", "tensor_model_parallel_size")
    valid = f"valid for this model: {_words(tensor_parallel_sizes(model))}"
    problems: list[Problem] = []
    if model.num_key_value_heads < tp:
        problems.append(
            (
                key,
                f"{tp} ranks for {model.num_key_value_heads} key/value heads (model.num_key_value_heads): key/value "
                f"heads are cut over the ranks and not replicated, so each rank needs one of its own; {valid}",
            )
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(model, name)
        if size % tp and not (name == "num_key_value_heads" and size < tp):
            problems.append((key, f"{tp} does not divide model.{name} {size}; {valid}"))
    if parallel.sequence_parallel and tp == 1:
        problems.append(
            (
                ("parallel", "sequence_parallel"),
                "true cuts the tokens over tensor-parallel ranks, but tensor_model_parallel_size is 1; "
                "raise that to 2 or more, or leave sequence_parallel false",
            )
        )
    if parallel.sequence_parallel and data.seq_length % tp:
        problems.append(
            (
                ("data", "seq_length"),
                f"{data.seq_length} tokens cannot be cut evenly over {tp} tensor-parallel ranks "
                f"(parallel.sequence_parallel); nearest valid: {_nearest_multiples(data.seq_length, tp)}",
            )
        )
    return problems


def _placement_problems(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    if parallel.memory_placement != "sharded":
        return []
    tp = parallel.tensor_model_parallel_size
    key = ("parallel", "memory_placement")
    problems: list[Problem] = []
    if tp == 1:
        problems.append(
            (
                key,
                "'sharded' cuts the slots over tensor-parallel ranks, but tensor_model_parallel_size is 1; "
                "raise that to 2 or more, or take 'replicated'",
            )
        )
    if not (model.local_slots or model.global_slots):
        problems.append(
            (
                key,
                "'sharded' is about memory banks, but model.local_slots and model.global_slots are both 0; "
                "give the model a bank, or take 'replicated'",
            )
        )
    for name in ("local_slots", "global_slots"):
        slots = getattr(model, name)
        if slots % tp:
            problems.append(
                (
                    ("model", name),
                    f"{slots} slots cannot be cut evenly over {tp} tensor-parallel ranks "
                    f"(parallel.memory_placement 'sharded'); nearest valid: {_nearest_multiples(slots, tp)}",
                )
            )
    return problems


def _pipeline_problems(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    pp = parallel.pipeline_model_parallel_size
    problems: list[Problem] = []
    if pp > model.num_hidden_layers:
        problems.append(
            (
                ("parallel", "pipeline_model_parallel_size"),
                f"{pp} stages for {model.num_hidden_layers} layers (model.num_hidden_layers): every stage holds at "
                f"least one whole layer; at most {model.num_hidden_layers}",
            )
        )
    if pp > 1 and parallel.zero_stage > 1:
        problems.append(
            (
                ("parallel", "zero_stage"),
                f"{parallel.zero_stage} does not work with pipeline_model_parallel_size {pp}: the pipeline adds up a "
                "step's gradients over its micro-batches, so they must stay whole on every rank until the step ends; "
                "take zero_stage 1, or pipeline_model_parallel_size 1",
            )
        )
    return problems


def _weight_decay_problems(
    parallel: ParallelConfig, training: TrainingConfig, optimizer: OptimizerConfig
) -> list[Problem]:
    if (
        optimizer.weight_decay_rule != "paper"
        or parallel.pipeline_model_parallel_size == 1
        or training.precision != "fp32"
    ):
        return []
    return [
        (
            ("optimizer", "weight_decay_rule"),
            "'paper' hangs with pipeline_model_parallel_size above 1 in fp32: only the stage of the embedding then has "
            "weights that do not decay, and DeepSpeed waits for a norm of them on all stages; use precision bf16, one "
            "stage, or weight_decay_rule: standard",
        )
    ]


def _offload_problems(parallel: ParallelConfig) -> list[Problem]:
    problems: list[Problem] = []
    if parallel.offload_optimizer == "cpu" and parallel.zero_stage == 1:
        problems.append(
            (
                ("parallel", "offload_optimizer"),
                "'cpu' does not work with zero_stage 1: under bf16 DeepSpeed's pipeline engine then looks for the "
                "gradients of shared weights where they are not, and skips them silently; take zero_stage 2 or 3",
            )
        )
    if parallel.offload_parameters == "cpu" and parallel.zero_stage != 3:
        problems.append(
            (
                ("parallel", "offload_parameters"),
                f"'cpu' needs zero_stage 3, which alone lets parameters come and go; it is {parallel.zero_stage} here",
            )
        )
    return problems


def _compile_problems(parallel: ParallelConfig, training: TrainingConfig) -> list[Problem]:
    key = ("training", "compile")
    problems: list[Problem] = []
    if training.compile != "loop":
        return problems
    if parallel.zero_stage == 3:
        problems.append(
            (
                key,
                "'loop' does not work with zero_stage 3, whose parameters come and go while a "
                "compiled loop expects them in place; use zero_stage 1 or 2, or compile: none",
            )
        )
    if parallel.tensor_model_parallel_size > 1:
        problems.append(
            (
                key,
                f"'loop' does not work with tensor_model_parallel_size {parallel.tensor_model_parallel_size}: every "
                "loop then holds collectives, which are not compiled; use tensor_model_parallel_size 1, or "
                "compile: none",
            )
        )
    return problems


def _words(numbers: list[int]) -> str:
    """[1, 2, 4] -> 1, 2 or 4."""
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} or {last}" if first else f"only {last}"


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)
