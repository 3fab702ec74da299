"""How a run is spread over ranks."""

from typing import Literal

from loopmem_pretrain.config.base import Section


class ParallelConfig(Section):
    """Every rank holds the whole model; ZeRO shards the optimizer, gradients and parameters over them."""

    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards optimizer states (pipeline engine), 2 gradients too, 3 parameters too (plain engine).
    Stage 0 is not offered: DeepSpeed 0.19.8 makes a phantom optimizer step with it in bf16."""
