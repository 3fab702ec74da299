"""Keeps advice of libraries about optional packages out of our output; our own messages and errors stay."""

import os
import warnings


def prepare_imports(device: str = "auto") -> None:
    """Call before DeepSpeed or megatron-core is imported: names the accelerator, drops their import-time advice."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module in ("megatron", "deepspeed", "torch.distributed.c10d_logger"):
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
