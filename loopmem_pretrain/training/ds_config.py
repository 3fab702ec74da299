"""The DeepSpeed configuration of a run, derived whole from the run's own configuration."""

from typing import Any

import torch

from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.model.flops import parameter_counts


def deepspeed_config(config: RunConfig, accumulation_steps: int) -> dict[str, Any]:
    """Everything DeepSpeed is told. What is set here and why:

    - the optimizer is torch's, handed over as an object, hence `zero_allow_untested_optimizer`; also with offloading,
      where DeepSpeed would insist on its own, which it compiles;
    - gradients are summed in float32 also under bf16: over micro-batches, and with ZeRO 1, which does so once a step,
      over ranks (DeepSpeed would round them to bf16 even where there is one rank); ZeRO 2 and 3 reduce the bf16
      gradients of each micro-batch over ranks, at half the traffic, before they are added up;
    - its throughput timer waits for the device twice a micro-batch, for figures that nobody reads: off;
    - pipe and gradient partitioning between stages corrupt losses silently with sequence parallelism: off;
    - recomputation is ours, per loop and non-reentrant, so DeepSpeed's own is off.
    """
    training, stage = config.training, config.parallel.zero_stage
    bucket = min(500_000_000, parameter_counts(config.model).total)  # DeepSpeed's default, or all there is
    bucket += bucket % 2  # which DeepSpeed wants even
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        # Norms, routers and step scales stay whole: gathering a few numbers costs more than keeping them.
        zero["stage3_param_persistence_threshold"] = max(10_000, 4 * config.model.hidden_size)
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.parallel.offload_optimizer == "cpu":
        zero["offload_optimizer"] = pinned
    if config.parallel.offload_parameters == "cpu":
        zero["offload_param"] = pinned
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        **({"communication_data_type": "fp32"} if stage == 1 else {}),
        "timers": {"throughput": {"enabled": False}},
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
