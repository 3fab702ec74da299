"""Whole parameters into safetensors files, a piece of one tensor at a time.

safetensors' own writer takes all tensors of a file at once. Its format is simple enough to be written as it comes:

    8 bytes     n, length of the header, little-endian
    n bytes     JSON: name -> {dtype, shape, data_offsets}, ended by spaces to a multiple of 8
    the rest    the tensors, without gaps, at their offsets
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.data.files import disk_faults
from loopmem_pretrain.errors import ConversionError, EnvironmentFault
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.loopmem import LoopMemLM

DType = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODES = {"float32": "F32", "bfloat16": "BF16"}
_PIECE = 2**20  # numbers converted, checked and written at once
_SMALL_FILES = 64 * 2**20  # room for tokenizer, code and card, generously


def check_weights(model_config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of every parameter of the model, in its order, after a look at names, shapes and types of `weights`.

    Raises:
        ConversionError: missing, unexpected, of another shape or type, or a tied head that is not the embedding; the
            names are in the message.
    """
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in LoopMemLM(model_config, TorchBackend()).named_parameters()}
    tied = ["lm_head.weight"] if model_config.tie_word_embeddings and "lm_head.weight" in weights else []
    problems = []
    for name in weights:
        if name not in expected and name not in tied:
            problems.append(f"{name}: unexpected")
            continue
        value, shape = weights[name], expected.get(name, expected["model.embed_tokens.weight"])
        if list(value.shape) != shape:
            problems.append(f"{name}: shape {list(value.shape)}, expected {shape}")
        if value.dtype != torch.float32:
            problems.append(f"{name}: {value.dtype}, expected torch.float32")
    problems += [f"{name}: missing" for name in expected if name not in weights]
    if tied and not problems and not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        problems.append("lm_head.weight: tied (tie_word_embeddings), yet not equal to model.embed_tokens.weight")
    _refuse(problems, "export with the config the checkpoint was trained with")
    return expected


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
    dtype: DType,
    max_shard_size: str = "5GB",
    on_written: Callable[[int], None] = lambda count: None,
) -> tuple[str, ...]:
    """Write model*.safetensors (and an index where there are several); returns their names.

    Tensors are taken from `weights` one by one; of each, a piece at a time is converted.

    Args:
        folder: where to.
        weights: what to write, float32.
        shapes: of the tensors to write.
        dtype: to write them in.
        max_shard_size: of a file, but for one tensor that is larger.
        on_written: is told how many tensors are written.

    Raises:
        ConversionError: values that are not finite; every tensor that has some is named.
        EnvironmentFault: disk full, no permission.
    """
    size = sum(map(math.prod, shapes.values())) * DTYPES[dtype].itemsize
    with disk_faults(folder):
        free = shutil.disk_usage(folder).free
    if free < size + _SMALL_FILES:
        raise EnvironmentFault(
            f"no room to write {folder.parent}: {free:,} bytes are free, {size + _SMALL_FILES:,} are needed",
            "free space, or export to another disk",
        )
    # The cut is planned on tensors without memory, of the type that will be written.
    plan = {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(plan, max_shard_size=max_shard_size)
    problems: list[str] = []
    written = 0
    with disk_faults(folder):
        for file, names in split.filename_to_tensors.items():
            with (folder / file).open("wb") as stream:
                stream.write(_header({name: shapes[name] for name in names}, dtype))
                for name in names:
                    bad = _write_tensor(stream, weights[name], dtype)
                    if bad:
                        problems.append(f"{name}: {bad:,} of {math.prod(shapes[name]):,} values not finite")
                    written += 1
                    on_written(written)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    _refuse(problems, "export a checkpoint of a healthy model")
    return tuple(split.filename_to_tensors)


def check_written(
    folder: Path, files: Iterable[str], weights: Mapping[str, Tensor], shapes: Mapping[str, list[int]], dtype: DType
) -> None:
    """Read every tensor back and compare each number: texts reach few rows of the embedding and of large banks.

    Args: as given to `write_weights`, and the `files` it returned.

    Raises:
        ConversionError: a tensor that is missing, more than written, or not what was to be written, with its name.
    """
    problems, missing = [], set(shapes)
    for file in files:
        try:
            with safe_open(folder / file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - safe_open is no mapping
                    missing.discard(name)
                    if name not in shapes or not _is_written(content.get_tensor(name), weights[name], dtype):
                        problems.append(f"{name}: other numbers, another shape or another type")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: {error}")
    problems += [f"{name}: missing" for name in shapes if name in missing]
    if problems:
        raise ConversionError(
            "what was written is not what was to be written:\n  " + "\n  ".join(problems),
            "nothing was exported; export again, and to another disk if it comes again",
        )


def _is_written(stored: Tensor, value: Tensor, dtype: DType) -> bool:
    if stored.dtype != DTYPES[dtype] or stored.shape != value.shape:
        return False
    pieces = zip(_pieces(value.detach()), torch.split(stored.reshape(-1), _PIECE), strict=True)
    return all(torch.equal(piece.to(DTYPES[dtype]), written) for piece, written in pieces)


def _header(shapes: Mapping[str, list[int]], dtype: DType) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _write_tensor(stream: BinaryIO, value: Tensor, dtype: DType) -> int:
    """Returns how many of its values are not finite, in the type that is written."""
    bad = 0
    for piece in _pieces(value.detach()):
        converted = piece.to(DTYPES[dtype])
        bad += int((~torch.isfinite(converted)).sum())
        stream.write(converted.view(torch.uint8).numpy().tobytes())
    return bad


def _pieces(value: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor on the CPU, [at most _PIECE] at a time."""
    for piece in torch.split(value.reshape(-1), _PIECE):
        yield piece.to("cpu").contiguous()


def _refuse(problems: list[str], fix: str) -> None:
    if problems:
        raise ConversionError("the weights are not those of the model config:\n  " + "\n  ".join(problems), fix)
