"""What `loopmem generate` is pointed at, opened: a run folder, a checkpoint, or an exported Hugging Face folder."""

from pathlib import Path
from typing import Any

from loopmem_pretrain.quiet import prepare_imports


def is_exported(path: str | Path) -> bool:
    """Whether the folder is a model in Hugging Face format, not a run or one of its checkpoints."""
    return (Path(path) / "config.json").exists()


def open_model(path: str | Path) -> tuple[Any, Any, int | None]:
    """(model in evaluation mode, its tokenizer, context length or None where the model knows it)."""
    if is_exported(path):
        from transformers.utils import logging

        from loopmem_pretrain.hf.load import load_hf

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return (*load_hf(path), None)
    prepare_imports("cpu")
    from loopmem_pretrain.checkpoint.universal import fp32_weights
    from loopmem_pretrain.data.tokenizer import load_tokenizer
    from loopmem_pretrain.hf.convert import open_checkpoint
    from loopmem_pretrain.hf.verify import reference_model

    opened = open_checkpoint(path)
    model = reference_model(opened.config.model, dict(fp32_weights(opened.checkpoint)))
    return model, load_tokenizer(opened.tokenizer_path), opened.config.data.seq_length
