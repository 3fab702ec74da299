"""Writing float32 master weights and Adam's moments into DeepSpeed's optimizers, a parameter at a time.

DeepSpeed flattens parameters into groups and cuts those over data-parallel ranks, differently for each ZeRO stage. Its
own functions for single parameters do the arithmetic; they expect the moments to be there, which before the first step
they are not.
"""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from loopmem_pretrain.checkpoint.universal import State


def make_moments(optimizer: Any, applied_steps: int) -> None:
    """Give every flat group zero moments and the number of steps that AdamW has applied."""
    inner = optimizer.optimizer
    is_stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flat = (
        optimizer.fp32_partitioned_groups_flat
        if is_stage3
        else [parameter for group in inner.param_groups for parameter in group["params"]]
    )
    fused = bool(inner.defaults.get("fused"))
    for parameter in flat:
        inner.state[parameter] = {
            "step": torch.tensor(float(applied_steps), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }
    if not is_stage3:
        optimizer._hp_optimizer_states_linked = False  # after a step they are, with the moments just replaced
        optimizer._lazy_init_hp_params_optimizer_state()  # tells each parameter where in the flat moments it lies


def place_step_counts(optimizer: Any) -> None:
    """Put AdamW's counts of steps where its kernel reads them: the fused one on the parameters' device, else the host.

    Loading leaves them where the start that saved had them, and that may have kept its optimizer elsewhere.
    """
    inner = optimizer.optimizer
    fused = any(group.get("fused") for group in inner.param_groups)
    for parameter, state in inner.state.items():  # not those of the groups: ZeRO 3 keeps them empty between steps
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if fused else "cpu")


def set_state(parameter: Any, state: State, value: Tensor) -> None:
    """Set what this rank holds of the master weight or of a moment; with the weight, the working copy too.

    `value` is the tensor-parallel rank's whole parameter, float32, on the parameter's device. Under ZeRO 3 a collective
    of its data-parallel ranks.
    """
    if hasattr(parameter, "ds_id"):
        _set_stage3(parameter, state, value)
    elif state == "fp32":
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, state)


def _set_stage3(parameter: Any, state: State, value: Tensor) -> None:
    own = parameter.ds_tensor.ds_numel  # of the partition, padded to the same size on each rank
    group = parameter.ds_process_group
    padded = torch.zeros(own * torch.distributed.get_world_size(group), device=value.device)
    padded[: value.numel()] = value.flatten()
    local = padded.narrow(0, own * torch.distributed.get_rank(group), own)
    if state != "fp32":
        safe_set_local_optimizer_state(parameter, local, state)
        return
    safe_set_local_fp32_param(parameter, local)
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # of the parameter's group, not of the world
        if torch.distributed.get_rank(group) == 0:
            parameter.data.copy_(value)
