"""How a run is spread over ranks."""

from typing import Literal

from loopmem_pretrain.config.base import Section


class ParallelConfig(Section):
    """Every rank computes the whole model; ZeRO shards optimizer states, gradients and parameters over the ranks."""

    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states (pipeline engine), 2 gradients too, 3 parameters too (plain engine).
    Stage 0 is not offered: DeepSpeed 0.19.8 makes a phantom optimizer step with it in bf16."""
