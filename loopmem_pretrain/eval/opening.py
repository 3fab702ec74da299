"""What `loopmem eval` is pointed at, opened: a model, its tokenizer, and how many tokens it reads at once."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.checkpoint.manifest import MANIFEST, read_manifest
from loopmem_pretrain.checkpoint.store import checkpoint_at
from loopmem_pretrain.data.files import sha256_file
from loopmem_pretrain.errors import ConfigError, DataError
from loopmem_pretrain.eval.scoring import Setting
from loopmem_pretrain.hf.load import device_of
from loopmem_pretrain.inference.generate import codec_of
from loopmem_pretrain.inference.opening import is_exported, open_model
from loopmem_pretrain.model.early_exit import EXIT_RULES


class Opened(NamedTuple):
    """A model ready to be measured."""

    place: Path
    """The checkpoint or exported folder."""
    model: Any
    """LoopMemLM or LoopMemForCausalLM, in evaluation mode."""
    codec: Any
    """Text to token ids and back; has `vocab_size` and `eos_id`."""
    context: int
    """Tokens the model reads at once."""
    batch_size: int
    """Windows in one forward pass."""


def place_of(path: str | Path) -> Path:
    """An exported folder itself, or one checkpoint: named once, since a training beside this may save a newer one.

    Raises:
        ConfigError: no such folder.
        CheckpointError: neither a run folder with a checkpoint nor a checkpoint.
    """
    return Path(path) if is_exported(path) else checkpoint_at(path)


def open_for_scoring(path: str | Path, batch_size: int, device: str = "cpu") -> Opened:
    """Open a run folder (its newest checkpoint), one of its checkpoints, or an exported folder, on a device.

    Raises:
        ConfigError: a batch size below 1, an unknown device, a folder of another kind, or one that does not say its
            context.
        EnvironmentFault: the device is not there.
        DataError: a tokenizer that does not fit the model.
        CheckpointError: no whole checkpoint.
        ConversionError: an exported folder that is damaged.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} is not valid", "give 1 or more")
    to = device_of(device)
    place = place_of(path)
    model, tokenizer, trained_on = open_model(place)
    codec = codec_of(model, tokenizer)
    if codec.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{place}: the tokenizer has ids up to {codec.vocab_size - 1}, the model a vocab_size of "
            f"{model.config.vocab_size}",
            "put the tokenizer beside the model that it was trained with",
        )
    context = trained_on or model.config.max_position_embeddings
    if context is None:
        raise ConfigError(
            f"{place / 'config.json'}: max_position_embeddings is null: nothing says how many tokens to read at once",
            "set it to the length of a training sequence",
        )
    return Opened(place, model.to(to), codec, context, batch_size)


def settings_of(
    model: Any, num_loops: Sequence[str], thresholds: Sequence[float] = (), rule: str = "halting"
) -> list[Setting]:
    """What `--num-loops`, `--exit-threshold` and `--exit-rule` ask for: every threshold with every number of loops.

    With `all` loops, thresholds follow the forced loops, each with the loops that the model was trained with. Without
    thresholds the model leaves as its config says, which it does whoever calls it.

    Raises:
        ConfigError: no number of loops, no threshold, an unknown rule, or a model that does not loop.
    """
    if rule not in EXIT_RULES:
        raise ConfigError(f"--exit-rule {rule} is not known", f"use one of {', '.join(EXIT_RULES)}")
    settings = _settings_of_loops(model, num_loops)
    own = getattr(model.config, "exit_threshold", None)  # a run's config has none
    if not thresholds and own is not None:
        thresholds, rule = [own], model.config.exit_rule
    if not thresholds:
        return settings
    if not model.config.max_loops:
        raise ConfigError("--exit-threshold: this model does not loop (max_loops 0)", "leave --exit-threshold out")
    wrong = [value for value in thresholds if not 0 < value <= 1]
    if wrong:
        raise ConfigError(
            f"--exit-threshold {' '.join(map(str, wrong))} is not valid",
            "give numbers above 0 and at most 1, where all loops run",
        )
    forced, run = (settings, [Setting(model.config.max_loops)]) if list(num_loops) == ["all"] else ([], settings)
    early = [
        setting._replace(exit_threshold=threshold, exit_rule=rule)
        for setting in run
        for threshold in dict.fromkeys(thresholds)
    ]
    return [*forced, *early]


def _settings_of_loops(model: Any, num_loops: Sequence[str]) -> list[Setting]:
    max_loops = model.config.max_loops
    if not num_loops:
        return [Setting(max_loops or None)]
    if not max_loops:
        raise ConfigError("--num-loops: this model does not loop (max_loops 0)", "leave --num-loops out")
    if list(num_loops) == ["all"]:
        closed = [] if model.model.memory is None else [Setting(max_loops, gates_closed=True)]
        return [*(Setting(n) for n in range(1, 2 * max_loops + 1)), *closed]
    wrong = [value for value in num_loops if not value.isdecimal() or int(value) < 1]
    if wrong:
        raise ConfigError(f"--num-loops {' '.join(wrong)} is not valid", "give numbers of 1 or more, or `all` alone")
    return [Setting(n) for n in dict.fromkeys(map(int, num_loops))]


def identity_of(opened: Opened) -> dict[str, Any]:
    """Which weights: for an exported folder the hash of its files' hashes, else that of the checkpoint's manifest."""
    place = opened.place
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    if not is_exported(place):
        step = read_manifest(place)["step"]
        return {"path": str(place), "step": step, "dtype": dtype, "sha256": sha256_file(place / MANIFEST)}
    files = sorted(file for kind in ("config.json", "*.safetensors", "tokenizer*.json") for file in place.glob(kind))
    lines = [f"{sha256_file(file)}  {file.name}\n" for file in files]
    return {"path": str(place), "step": None, "dtype": dtype, "sha256": sha256("".join(lines).encode()).hexdigest()}
