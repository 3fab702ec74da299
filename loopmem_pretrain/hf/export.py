"""Export: weights, config, code and tokenizer as one Hugging Face folder that is known to compute the same.

The folder is written beside its destination, loaded afresh by transformers in a process that cannot import this
package, compared with the model it came from, and only then gets its name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.data.files import disk_faults
from loopmem_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from loopmem_pretrain.errors import ConfigError, ConversionError
from loopmem_pretrain.hf.card import History, model_card
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.staging import check_destination, staged
from loopmem_pretrain.hf.tokenizer import check_parity, to_huggingface
from loopmem_pretrain.hf.unrolled import UnrolledWeights, check_unrolled, dense_config
from loopmem_pretrain.hf.verify import Comparison, rounding, verify_folder
from loopmem_pretrain.hf.weights import DTYPES, DType, check_weights, check_written, write_weights


class ExportReport(NamedTuple):
    """What was written and how it compares."""

    folder: Path
    """The exported folder."""
    dtype: DType
    """Of the weights in it."""
    parameters: int
    """Numbers in it; a tied head is not counted twice."""
    weight_bytes: int
    """Bytes of all weights."""
    weight_files: tuple[str, ...]
    """Their files."""
    comparison: Comparison
    """Measured in float32 on the CPU; a bfloat16 export is compared with the weights rounded to bfloat16."""


def export(
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_path: str | Path,
    out_dir: str | Path,
    *,
    sample_texts: Sequence[str],
    dtype: DType = "float32",
    seq_length: int,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    history: History | None = None,
    unrolled: int | None = None,
    on_written: Callable[[int], None] = lambda count: None,
) -> ExportReport:
    """Write `out_dir` for `AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True)`.

    Args:
        model_config: the model's sizes.
        weights: public name -> float32 tensor; a tied head may be left out. Each is asked for when it is needed, so it
            may be mapped from the disk; of every other memory, this takes that of the largest part.
        tokenizer_path: the training tokenizer.
        out_dir: a folder that does not exist or is empty, or, with `overwrite`, an earlier export.
        sample_texts: real text, on which tokenizers, logits and loss are compared; logits and loss on the first
            `seq_length` tokens of each.
        dtype: of the exported weights.
        seq_length: tokens of a training sequence; becomes `max_position_embeddings`.
        overwrite: replace an earlier export.
        max_shard_size: weights are cut into files no larger than this.
        history: what the model card says of data and training.
        unrolled: write a dense model that is this one with so many loops, where that is exact (hf/unrolled.py).
        on_written: is told how many tensors are written.

    Raises:
        ConfigError: the destination, the dtype or the sample texts cannot be meant.
        DataError: the tokenizer cannot be read.
        ConversionError: weights do not fit the config, or the exported model computes something else
            (hf/verify.py:verify_folder); nothing is left at `out_dir`.
        EnvironmentFault: disk full, no permission.
    """
    check_destination(out_dir, overwrite)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not valid", f"use one of {', '.join(DTYPES)}")
    if seq_length < 2:
        raise ConfigError(f"seq_length {seq_length} is not valid", "give the length of a training sequence")
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ConversionError(
            f"{tokenizer.file} has {tokenizer.vocab_size:,} tokens, the model's vocab_size is "
            f"{model_config.vocab_size:,}",
            "export with the tokenizer the model was trained with",
        )
    tokens = tokenize_samples(tokenizer, sample_texts)
    shapes = check_weights(model_config, weights)
    dense = None
    if unrolled is not None:
        check_unrolled(model_config, unrolled)
        dense = UnrolledWeights(model_config, weights, shapes)
        shapes = {name: shapes[source] for name, source in dense.sources.items()}
    rounded = rounding(DTYPES[dtype]) if dense is None else dense.rounding(DTYPES[dtype])
    parameters = sum(map(math.prod, shapes.values()))
    with staged(out_dir, overwrite) as folder:
        write_tokenizer(folder, tokenizer_path, sample_texts, seq_length)
        content = weights if dense is None else dense
        files = write_weights(folder, content, shapes, dtype, max_shard_size, on_written)
        check_written(folder, files, content, shapes, dtype)
        with disk_faults(folder):
            settings: Any = huggingface_config(model_config, tokenizer, seq_length, dtype)
            if unrolled is not None:
                settings = dense_config(model_config, _common(tokenizer, seq_length, dtype))
            write_settings(folder, settings, tokenizer.vocab_size)
        comparison = verify_folder(
            folder,
            model_config,
            weights,
            list(sample_texts),
            tokens,
            seq_length,
            None if dtype == "float32" else rounded,
            unrolled,
        )
        with disk_faults(folder):
            card = model_card(model_config, dtype, seq_length, comparison, history, unrolled is not None)
            (folder / "README.md").write_text(card, encoding="utf-8")
    size = parameters * DTYPES[dtype].itemsize
    return ExportReport(Path(out_dir).expanduser().resolve(), dtype, parameters, size, files, comparison)


def tokenize_samples(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts.

    Raises:
        ConfigError: no text, an empty one, or none with two tokens to predict one from the other.
    """
    fix = "give a few real texts of some hundred characters"
    tokens = [tokenizer.encode(text) for text in texts]
    if not tokens:
        raise ConfigError("there is no sample text to compare models on", fix)
    if [] in tokens:
        raise ConfigError(f"sample text {tokens.index([])} is empty", fix)
    if max(len(ids) for ids in tokens) < 2:
        raise ConfigError("no sample text has more than one token", fix)
    return tokens


def write_tokenizer(folder: Path, tokenizer_path: str | Path, texts: Sequence[str], context: int | None = None) -> None:
    """Write the tokenizer's files; first of all, since transformers asks about code as soon as there is a config.json.

    Raises:
        ConversionError: it has no exact Hugging Face form, or gives other tokens for some of the texts.
    """
    with disk_faults(folder):
        to_huggingface(tokenizer_path, folder, context)
    differing = check_parity(tokenizer_path, folder, list(texts))
    if differing:
        raise ConversionError(
            f"the exported tokenizer gives other tokens or another text for {len(differing)} of {len(texts)} sample "
            f"texts, first {differing[0][:80]!r}",
            "nothing was exported; report this together with the text",
        )


def huggingface_config(config: ModelConfig, tokenizer: Tokenizer, seq_length: int, dtype: DType) -> LoopMemConfig:
    """config.json of an exported folder."""
    settings = {
        **config.model_dump(),
        **_common(tokenizer, seq_length, dtype),
        "architectures": ["LoopMemForCausalLM"],
    }
    return LoopMemConfig(**settings)


def _common(tokenizer: Tokenizer, seq_length: int, dtype: DType) -> dict[str, Any]:
    """What config.json says of every exported model."""
    return {
        "max_position_embeddings": seq_length,
        "bos_token_id": tokenizer.eos_id,  # what stands before a text in training
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": dtype,
    }


def write_settings(folder: Path, config: Any, tokens: int | None = None) -> None:
    """Write config.json, generation_config.json and, of a LoopMemConfig, the two code files.

    Of a vocabulary larger than the tokenizer's number of `tokens`, generation leaves the ids out that are no tokens.
    Tokens that are added later get just these ids; docs/huggingface.md and the card say what to do then.
    """
    config.save_pretrained(folder)
    pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    generation: Any = GenerationConfig  # untyped
    generation(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=pad,
        suppress_tokens=list(range(tokens or config.vocab_size, config.vocab_size)) or None,
    ).save_pretrained(folder)
