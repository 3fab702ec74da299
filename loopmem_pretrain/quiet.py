"""Keeps advice of libraries about optional packages out of our output; our own messages and errors stay."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


def prepare_imports(device: str = "auto") -> None:
    """Call before DeepSpeed or megatron-core is imported: names the accelerator, drops their import-time advice."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for module in ("megatron", "deepspeed", "torch.distributed.c10d_logger"):
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def _said_by_us(record: logging.LogRecord) -> bool:
    """Skipped steps are reported by the run itself, with what to do (training/faults.py)."""
    return "OVERFLOW! " not in record.getMessage()


@contextlib.contextmanager
def deepspeed_chatter_held_back() -> Iterator[None]:
    """Drop what DeepSpeed prints while it sets up; show it after all when that fails."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if _said_by_us not in logger.filters:
        logger.addFilter(_said_by_us)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        print(printed.getvalue(), file=sys.stderr)
        raise
