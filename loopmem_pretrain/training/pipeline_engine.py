"""What DeepSpeed's pipeline engine is made to do otherwise: the order of sums over ranks, and when logits go.

DeepSpeed adds the gradients of tied modules up over their stages first, and then everything over data-parallel ranks,
in one buffer whose layout differs from stage to stage. What lies at another place of a buffer is added in another order
(from three ranks on), so the copies of a tied weight would drift apart in their last bits, for ever. Here
data-parallel ranks come first, then stages: copies get the same bits.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine


def adapt(engine: PipelineEngine) -> None:
    """Replace what this module's functions do better, in one engine."""
    if engine.using_bf16_optimizer:
        ours = {schedule.ReduceTiedGrads: _later, schedule.ReduceGrads: _over_data_then_stages}
    else:
        ours = {schedule.ReduceTiedGrads: _over_stages_on_first_data_rank}
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **ours}
    if engine.is_last_stage():
        engine.module.register_forward_pre_hook(lambda module, inputs: _forget_logits(engine))


def _later(engine: Any) -> None:
    """Nothing at this point of the schedule: `_over_data_then_stages` does it, after the data-parallel ranks."""


def _over_data_then_stages(engine: Any) -> None:
    """bf16: gradients lie in float32 buffers that stay where they are when they have been averaged."""
    # One group a call: DeepSpeed copies all that are in one call into a buffer, four bytes a parameter.
    for gradients in engine.optimizer.fp32_groups_gradients_flat:
        engine.buffered_allreduce_fallback(grads=[gradients])
    engine._exec_reduce_tied_grads()


def _over_stages_on_first_data_rank(engine: Any) -> None:
    """fp32: averaging, which comes next, leaves each rank a part of the gradients, so tied ones are summed before it.

    The sum over all data-parallel ranks and stages goes to the first data-parallel rank of each stage, zeros to the
    others: whatever the order, they average to the same bits.
    """
    data = engine.grid.get_data_parallel_group()
    first = dist.get_process_group_ranks(data)[0]
    for weight, stages in PipelineModule.get_tied_weights_and_groups(engine.module):
        dist.reduce(weight.grad, first, group=data)
        if dist.get_rank() == first:
            dist.all_reduce(weight.grad, group=stages)
        else:
            weight.grad.zero_()
    for weight, group in engine.module.partial_weights:
        dist.all_reduce(weight.grad, group=group)


def _forget_logits(engine: Any) -> None:
    """The last stage would keep the logits of the micro-batch before while it makes those of this one."""
    outputs = engine.pipe_buffers["outputs"]
    outputs[:] = [None] * len(outputs)
