"""How a run is spread over ranks."""

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from loopmem_pretrain.config.base import Section


class ParallelConfig(Section):
    """Ranks = tensor x pipeline x data-parallel size; the last follows from the number of ranks started."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """TP: ranks that share every layer: heads, feed-forward and vocabulary are split over them. Keep it within a
    node."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """PP: stages of whole layers, each on its own ranks; needs zero_stage 1."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks split the residual stream over tokens: norms, halting, gates and reads of
    replicated banks are then computed once, not on every rank. Needs tensor_model_parallel_size > 1."""
    memory_placement: Literal["replicated", "sharded"] = "replicated"
    """How memory banks are placed on tensor-parallel ranks: `replicated`, or `sharded` over slots, whose reads are
    merged exactly."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states (pipeline engine), 2 gradients too, 3 parameters too (plain engine).
    Stage 0 is not offered: DeepSpeed 0.19.8 computes it incorrectly."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where float32 master weights and moments live, and where AdamW runs: on the device, or in host memory."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters live while they are not used; `cpu` needs zero_stage 3."""
    check_replicas_interval: int = Field(default=0, ge=0)
    """Steps between checks that parameters held by several ranks are identical on them; 0 never checks."""
    join_timeout_seconds: int = Field(default=600, gt=0)
    """How long a start waits for ranks that have not joined before it ends and names them."""
    collective_timeout_seconds: int = Field(default=1800, gt=0)
    """How long a rank waits in a collective for ranks that hang; set it longer than any save or validation takes."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _stage_0_has_a_reason(cls, stage: Any) -> Any:
        """A generic "must be 1, 2 or 3" would leave open why the stage that DeepSpeed documents is missing."""
        if stage == 0 and isinstance(stage, int):
            raise PydanticCustomError(
                "zero_stage_0",
                "must be 1, 2 or 3: stage 0 is not offered because DeepSpeed 0.19.8 computes it wrongly (a phantom "
                "optimizer step in bf16; weights tied across pipeline stages counted twice in the gradient norm); "
                "stage 1 trains the same model with less memory",
            )
        return stage
