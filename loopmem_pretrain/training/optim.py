"""AdamW with parameter groups by role, and the schedules of learning rate, beta1 and ponder weight.

Schedules are pure functions of the step: nothing to save, nothing to restore, exact after any resume.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from loopmem_pretrain.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig
from loopmem_pretrain.errors import ConfigError

# Role of a parameter by its public name; first match wins and every parameter must match.
ROLES: list[tuple[str, str]] = [
    ("embedding", r"embed_tokens\.weight$"),
    ("bank", r"(local|global)_(keys|subkeys|values)$"),
    ("norm", r"norm\.(weight|bias)$"),
    ("step_scale", r"step_scales$"),
    ("bias", r"\.bias$"),
    ("router", r"halting\.weight$"),
    ("matrix", r"(_proj|_gate|lm_head)\.weight$"),
]
DECAYED = {
    "standard": {"embedding", "router", "matrix"},
    "paper": {
        "bank",
        "norm",
        "step_scale",
        "bias",
        "router",
        "matrix",
    },  # in the paper only the embedding escaped decay
}


GROUP_ORDER = "bf16 first, unaligned last"
"""What `parameter_groups` is sorted by: DeepSpeed's files have groups by number, so checkpoints say so."""
ALIGNMENT = 16
"""Bytes that GPUs load at once, from addresses that are multiples of it."""


def role_of(public_name: str) -> str:
    """The parameter's role.

    Raises:
        ValueError: no rule knows the name; a new parameter needs a decision about its decay.
    """
    for role, pattern in ROLES:
        if re.search(pattern, public_name):
            return role
    raise ValueError(f"no optimizer role for parameter {public_name}; add it to ROLES")


def keeps_float32(public_name: str) -> bool:
    """Whether the parameter stays float32 when the working weights are bf16: step scales and routers."""
    return re.search(r"(step_scales|halting\.(weight|bias))$", public_name) is not None


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Decayed and not, each of one dtype (ZeRO flattens a group); names are the public ones, order is the model's.

    bf16 comes first: in what the first group has ZeRO 2 reduces the gradients of all (GROUP_ORDER). What would leave
    those behind it in the flat buffer at an odd address is at the end of its group: `check_alignment` says why.
    """
    decayed_roles = set(DECAYED[config.weight_decay_rule])
    if config.decay_memory_banks:
        decayed_roles.add("bank")
    groups: dict[tuple[bool, torch.dtype], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        groups.setdefault((role_of(name) in decayed_roles, parameter.dtype), []).append(parameter)
    return [
        {"params": sorted(groups[key], key=_is_odd), "weight_decay": config.weight_decay if key[0] else 0.0}
        for key in sorted(groups, key=lambda key: (key[1] == torch.float32, not key[0]))
    ]


def _is_odd(parameter: nn.Parameter) -> bool:
    return parameter.numel() * parameter.element_size() % ALIGNMENT > 0


def check_alignment(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """For compiled loops on GPUs: all layers run the code that was compiled for the first.

    That code takes the parameters of every layer to be as aligned as the first one's, and torch does not look again
    (parameters are "static inputs" of Inductor): a load of 16 bytes from another address is an illegal memory access.
    What a loop does not read itself may stand anywhere: step scales and routers are copied first.

    Raises:
        ConfigError: a parameter that loops read is not at a multiple of 16 bytes.
    """
    for name, parameter in named_parameters:
        read_in_loops = ".layers." in name and parameter.numel() > 1 and not keeps_float32(name)
        if read_in_loops and parameter.data_ptr() % ALIGNMENT:
            raise ConfigError(
                f"training.compile=loop: {name}, {[*parameter.shape]}, is not at a multiple of {ALIGNMENT} bytes",
                "make hidden_size, intermediate_size and slot counts multiples of 8, or set training.compile=none",
            )


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, on_gpu: bool
) -> torch.optim.Optimizer:
    """torch's AdamW, fused on GPUs. (Named in DeepSpeed's own config, it would compile a kernel for two minutes.)

    `on_gpu`: whether it runs there, that is, on a GPU's run without offloading.
    """
    groups = parameter_groups(named_parameters, config)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=on_gpu or None)


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, train_steps: int) -> float:
    """Learning rate of step `step` (0 is the first)."""
    return SCHEDULES[schedule.type](step, optimizer.lr, schedule, train_steps)


def _cosine_decay(step: int, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    warmup = schedule.warmup_steps
    if step < warmup:
        return _warm_up(step, peak, warmup)
    return _cosine(peak, schedule.min_lr, (step + 1 - warmup) / max(1, train_steps - warmup))


def _warmup_stable_decay(step: int, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    if step < schedule.warmup_steps:
        return _warm_up(step, peak, schedule.warmup_steps)
    progress = max(0.0, (step + 1 - (train_steps - schedule.decay_steps)) / schedule.decay_steps)
    return peak + (schedule.min_lr - peak) * progress


def _one_cycle_of_rates(step: int, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    return _one_cycle(step, schedule.min_lr, peak, schedule.min_lr, schedule.warmup_steps, train_steps)


def _warm_up(step: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup


SCHEDULES: Mapping[str, Callable[[int, float, ScheduleConfig, int], float]] = {
    "cosine": _cosine_decay,
    "wsd": _warmup_stable_decay,
    "one_cycle": _one_cycle_of_rates,
}
"""(step, optimizer.lr, schedule, train_steps) -> learning rate, by `schedule.type`."""


def beta1(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, train_steps: int) -> float:
    """First-moment decay of step `step`: constant, or cycled against the learning rate (one_cycle)."""
    low = schedule.beta1_min
    if low is None:
        return optimizer.beta1
    return _one_cycle(step, optimizer.beta1, low, optimizer.beta1, schedule.warmup_steps, train_steps)


def ponder_weight(step: int, weight: float, training: TrainingConfig) -> float:
    """Weight of the ponder loss at step `step`."""
    return weight * PONDER_SCHEDULES[training.ponder_schedule](step, training)


def _constant(step: int, training: TrainingConfig) -> float:
    return 1.0


def _linear(step: int, training: TrainingConfig) -> float:
    return step / training.train_steps


def _cyclic(step: int, training: TrainingConfig) -> float:
    value = math.cos(2 * math.pi * step / training.ponder_period)
    return value * 0.6 if value < 0 else value


PONDER_SCHEDULES: Mapping[str, Callable[[int, TrainingConfig], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cyclic": _cyclic,
}
"""(step, training) -> share of model.ponder_weight, by `training.ponder_schedule`."""


def _one_cycle(step: int, start: float, top: float, end: float, warmup: int, train_steps: int) -> float:
    """Cosine from start to top over the warm-up and on to end: torch's OneCycleLR, two phases, closed form."""
    turn = max(1, warmup) - 1
    if step <= turn:
        return _cosine(start, top, step / turn if turn else 1.0)
    return _cosine(top, end, (step - turn) / (train_steps - 1 - turn))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
