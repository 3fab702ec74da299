"""How a run is spread over ranks."""

from typing import Literal

from pydantic import Field

from loopmem_pretrain.config.base import Section


class ParallelConfig(Section):
    """Ranks = tensor x pipeline x data-parallel size; the last follows from the number of ranks started."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """TP: ranks that share every layer: heads, feed-forward and vocabulary are cut over them. Keep it within a node."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """PP: stages of whole layers, each on its own ranks; needs zero_stage 1."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks cut the residual stream over tokens: norms, halting, gates and reads of replicated
    banks are then computed once, not on every rank. Needs tensor_model_parallel_size > 1."""
    memory_placement: Literal["replicated", "sharded"] = "replicated"
    """How memory banks lie on tensor-parallel ranks: `replicated`, or `sharded` over slots, reads merged exactly."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states (pipeline engine), 2 gradients too, 3 parameters too (plain engine).
    Stage 0 is not offered: DeepSpeed 0.19.8 makes a phantom optimizer step with it in bf16."""
    check_replicas_interval: int = Field(default=0, ge=0)
    """Steps between checks that parameters held by several ranks are identical on them; 0 never checks."""
