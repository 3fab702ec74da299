"""A folder of transformers as a source of weights: an exported loopmem model, or a dense model to retrofit.

Only config.json and the headers of the safetensors files are read to judge it; no code of the folder runs.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.errors import ConfigError, ConversionError, EnvironmentFault
from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.retrofit import FAMILIES, NEW, dense_fields, new_weights

LOOPMEM = LoopMemConfig.model_type
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COPY = "copy or download the folder again"
_BUFFER = "rotary_emb.inv_freq"  # old Llama checkpoints store what follows from rope_theta
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREE = ("ponder_weight",)  # of the loss, not of what the weights compute


class Stored(NamedTuple):
    """Where a tensor is, and what its header says."""

    file: Path
    dtype: str
    shape: list[int]


class Source(NamedTuple):
    """A folder whose config.json was understood."""

    folder: Path
    model_type: str
    """`loopmem`, or a family of dense models."""
    fields: dict[str, Any]
    """Of ModelConfig: what a run that begins with these weights must have."""
    tensors: dict[str, Stored]
    exit_threshold: float | None = None
    """Of an exported model's config.json: how it is run, which is no part of a run's model."""

    @property
    def is_retrofit(self) -> bool:
        return self.model_type != LOOPMEM


def open_source(path: str | Path) -> Source:
    """Read config.json and the headers of the weights.

    Raises:
        ConfigError: no folder, no model, or a model of another kind.
        ConversionError: damaged files, or a model that cannot be matched exactly (every reason).
        EnvironmentFault: a file may not be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder", "give a folder with config.json and safetensors files")
    if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} is a run folder", f"export it first: loopmem convert {folder} OUT")
    values = _json(folder / "config.json", "it is no model of transformers")
    kind, file = values.get("model_type"), folder / "config.json"
    if kind == LOOPMEM:
        fields = _loopmem_fields(values, file)
    elif kind in FAMILIES:
        fields = dense_fields(values, str(file))
    else:
        raise ConfigError(
            f"{file}: model_type is {kind!r}, a kind of model that cannot be taken over; valid: {LOOPMEM}, "
            f"{', '.join(FAMILIES)}",
            "give an exported folder, or a dense model of one of these families",
        )
    return Source(folder, kind, fields, _headers(folder), values.get("exit_threshold") if kind == LOOPMEM else None)


def _loopmem_fields(values: dict[str, Any], file: Path) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(LoopMemConfig)} | set(LoopMemConfig().to_dict())
    unknown = sorted(set(values) - known - {"architectures", "auto_map", "dtype", "transformers_version"})
    if unknown:
        raise ConversionError(
            f"{file}: unknown keys {', '.join(unknown)}: this version of the package does not know what they mean",
            "use the version of the package that exported it, or a later one",
        )
    try:
        config: Any = LoopMemConfig(**{key: value for key, value in values.items() if key != "model_type"})
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{file}: {error}", _COPY) from error
    return {name: getattr(config, name) for name in ModelConfig.model_fields if name not in _FREE}


def _json(path: Path, missing: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} holds no {path.name}: {missing}", "give another folder") from None
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise ConversionError(f"{path} is damaged: {error}", _COPY) from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} is damaged: no mapping of keys to values", _COPY)
    return values


def _headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the files that the index names, or of the only file."""
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in found:
                        raise ConversionError(f"{name} is both in {found[name].file} and in {file}", _COPY)
                    part = content.get_slice(name)
                    found[name] = Stored(file, part.get_dtype(), list(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} cannot be read: {error}", _COPY) from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    names = [SINGLE]
    if (folder / INDEX).is_file():
        table = _json(folder / INDEX, "").get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ConversionError(f"{folder / INDEX} is damaged: weight_map is no table of file names", _COPY)
        names = sorted(set(table.values()))
    missing = [name for name in names if "/" in name or not (folder / name).is_file()]
    if missing:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        beside = f"; beside it {', '.join(others)}, which are not read" if others else ""
        raise ConversionError(
            f"{folder} has no {', '.join(missing)}{beside}",
            "load it with transformers and `save_pretrained` writes safetensors" if others else _COPY,
        )
    return [folder / name for name in names]


# ----------------------------------------------------------------------------------------- does it fit the run's model


def check_model(source: Source, model: ModelConfig, where: str) -> None:
    """Compare the run's model with what the weights need.

    Args:
        where: the run's configuration file, for messages.

    Raises:
        ConfigError: naming every field that differs, with the section to write.
    """
    wanted = dict(source.fields)
    if source.is_retrofit:
        wanted["residual_scale"] = "learned" if model.max_loops else "one"
    differing = [
        f"model.{name}: {getattr(model, name)}, the weights need {value}"
        for name, value in wanted.items()
        if getattr(model, name) != value
    ]
    if differing:
        needed = dump_config(model.model_copy(update=wanted)).strip().splitlines()
        choice = "; max_loops, slots and gates are your choice" if source.is_retrofit else ""
        raise ConfigError(
            f"{where}: the model is not that of {source.folder} ({source.model_type}):\n    "
            + "\n    ".join(differing),
            f"write this as the section `model`{choice}:\n    " + "\n    ".join(needed),
        )


def check_tensors(source: Source, shapes: Mapping[str, Iterable[int]]) -> None:
    """Compare the tensors that are there with those that the model needs.

    Raises:
        ConversionError: naming every tensor that is missing, not expected, or of another shape or type.
    """
    needed = {name: list(shape) for name, shape in shapes.items() if not (source.is_retrofit and NEW.search(name))}
    tied = source.fields["tie_word_embeddings"]
    problems = [f"{name}: missing" for name in needed if name not in source.tensors]
    for name, stored in source.tensors.items():
        if name.endswith(_BUFFER) or (tied and name == _HEAD):
            continue
        if name not in needed:
            problems.append(f"{name}: not expected")
        elif stored.shape != needed[name]:
            problems.append(f"{name}: shape {stored.shape}, expected {needed[name]}")
        elif stored.dtype not in _DTYPES:
            problems.append(f"{name}: {stored.dtype}, expected one of {', '.join(_DTYPES)}")
    if problems:
        raise ConversionError(
            f"the tensors in {source.folder} are not those of its config.json:\n    " + "\n    ".join(problems), _COPY
        )


def weights_of(
    source: Source, model: ModelConfig, shapes: Mapping[str, Iterable[int]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(public name, float32 tensor) of every parameter in the order of `shapes`, one at a time.

    `seed` is of the initial weights of what a dense model lacks.

    Raises:
        ConversionError: a number is not finite, or a tied head is not the embedding; with the name.
    """
    for name, shape in shapes.items():
        if name not in source.tensors:
            yield from new_weights(model, {name: shape}, seed)
            continue
        value = _read(source, name)
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ConversionError(f"{name} in {source.folder}: {bad:,} of {value.numel():,} numbers not finite", _COPY)
        if name == _EMBEDDING and model.tie_word_embeddings and _HEAD in source.tensors:
            _check_tied(source, value)
        yield name, value


def _check_tied(source: Source, embedding: Tensor) -> None:
    if not torch.equal(embedding, _read(source, _HEAD)):
        raise ConversionError(
            f"{_HEAD} in {source.folder} is not {_EMBEDDING}, though config.json ties them",
            "set tie_word_embeddings to false in its config.json if the head is meant to be its own",
        )


def _read(source: Source, name: str) -> Tensor:
    with safe_open(source.tensors[name].file, "pt") as content:
        value: Tensor = content.get_tensor(name)
    return value.float()
