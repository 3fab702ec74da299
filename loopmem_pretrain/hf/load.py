"""Load an exported folder with this package's own classes: no code of the folder runs, nobody is asked for trust."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from loopmem_pretrain.errors import ConfigError, ConversionError, EnvironmentFault
from loopmem_pretrain.hf.configuration_loopmem import FORMAT_VERSION, LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.hf.staging import UNROLLED_MARK

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_AGAIN = "export the checkpoint again with `loopmem convert`, or copy the folder again"


def load_hf(
    folder: str | Path, device: str = "cpu", dtype: DTypeName = "auto"
) -> tuple[LoopMemForCausalLM, PreTrainedTokenizerFast]:
    """The model, in evaluation mode on `device`, and the tokenizer of an exported folder.

    Args:
        folder: what `export` wrote, or `save_pretrained` of such a model.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: of the weights in memory; `auto` is what the folder holds.

    Raises:
        ConfigError: no folder, no loopmem model, an unknown dtype or device.
        ConversionError: files are missing or damaged, or weights do not fit the config.
        EnvironmentFault: the device is not there.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not valid", f"use one of {', '.join(_DTYPES)}")
    place = device_of(device)
    path = Path(folder).expanduser()
    config = _config(path)
    _require_files(path)
    try:
        loaded: Any = LoopMemForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=_DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name; transformers' own error names none
            local_files_only=True,
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own for a damaged file
        raise ConversionError(
            f"{path}: the weights cannot be loaded: {type(error).__name__}: {error}", _AGAIN
        ) from error
    model, info = loaded
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise ConversionError(f"{path}: the weights do not fit config.json: {wrong}", _AGAIN)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for what it cannot parse
        raise ConversionError(f"{path}: the tokenizer cannot be loaded: {error}", _AGAIN) from error
    _check_tokenizer(path, config, tokenizer)
    return model.to(place).eval(), tokenizer


def _check_tokenizer(path: Path, config: LoopMemConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    problems = []
    if len(tokenizer) > config.vocab_size:
        problems.append(f"it has {len(tokenizer):,} tokens, the model's vocab_size is {config.vocab_size:,}")
    for name in ("bos_token_id", "eos_token_id"):
        its, ids = getattr(tokenizer, name), getattr(config, name)
        if its is not None and ids is not None and its not in (ids if isinstance(ids, list) else [ids]):
            problems.append(f"its {name} is {its}, the model's {ids}")
    if problems:
        raise ConversionError(
            f"{path}: the tokenizer is not the model's: {'; '.join(problems)}",
            "take tokenizer.json and tokenizer_config.json of the folder that `loopmem convert` wrote",
        )


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: no such name.
        EnvironmentFault: the device is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known", "use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise EnvironmentFault(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible",
            "use device cpu, or run where the GPU is",
        )
    return device


def _config(path: Path) -> LoopMemConfig:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder", "give the path of an exported folder")
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} holds no config.json: it is no exported model", "give the path of an exported folder"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFault(f"cannot read {file}: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise ConversionError(f"{file} is damaged: {error}", _AGAIN) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(values, dict) and UNROLLED_MARK in values:
        raise ConfigError(
            f"{file}: an export by `loopmem convert --unrolled`, a dense model ({kind}) for transformers itself",
            "load it with transformers, evaluate it by the `hf` model of lm-evaluation-harness, or give the run, or an "
            "export of it without --unrolled",
        )
    if kind != LoopMemConfig.model_type:
        raise ConfigError(
            f"{file}: model_type is {kind!r}, not {LoopMemConfig.model_type!r}: the model is of another kind",
            "give the path of a folder that `loopmem convert` wrote, or load it with transformers",
        )
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConversionError(
            f"{file}: format_version: {version} is newer than {FORMAT_VERSION}, the newest this package reads",
            "use a newer version of the package, or load the folder with transformers and its own code "
            "(trust_remote_code=True)",
        )
    try:
        return LoopMemConfig.from_dict(values)  # type: ignore[no-any-return, no-untyped-call]
    except ValueError as error:
        raise ConversionError(f"{file}: {error}", _AGAIN) from error


def _require_files(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    needed = ["tokenizer.json", "tokenizer_config.json"]
    if index.is_file():
        try:
            needed += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConversionError(f"{index} is damaged: {error}", _AGAIN) from error
    else:
        needed.append("model.safetensors")
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        raise ConversionError(f"{path} is incomplete, missing: {', '.join(missing)}", _AGAIN)
