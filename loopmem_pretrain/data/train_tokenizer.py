"""Trains the tokenizer a recipe asks for, on a bounded sample of its sources."""

from collections.abc import Iterator
from pathlib import Path

from loopmem_pretrain.config.prepare import PrepareConfig, TrainTokenizerConfig
from loopmem_pretrain.data.corpus import Tally, iter_documents, quoted
from loopmem_pretrain.data.files import Progress, silent
from loopmem_pretrain.data.recipe import source_files
from loopmem_pretrain.data.tokenizer import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    record_of,
    train_sentencepiece,
    trained_differently,
)
from loopmem_pretrain.data.workers import is_validation
from loopmem_pretrain.errors import ConfigError, DataError


def train_tokenizer(config: PrepareConfig, progress: Progress = silent) -> Path:
    """Train `config.tokenizer.train` into `config.tokenizer.path`, or find that this was done before.

    Args:
        config: a validated recipe.
        progress: called as (bytes read, bytes wanted, info) with info["stage"] `train tokenizer`, and `already` when
            the tokenizer was there.

    Returns:
        Path of the tokenizer's file.

    Raises:
        ConfigError: the recipe has no `tokenizer.train`.
        DataError: another tokenizer is there already; the sources cannot be read or give too little text.
        EnvironmentFault: disk full, no permission.
    """
    if config.tokenizer.train is None:
        raise ConfigError(
            "tokenizer.train: required to train a tokenizer, and written nowhere",
            "add `train: {vocab_size: 32000}` below tokenizer:",
        )
    return ensure_tokenizer(config, progress).file


def ensure_tokenizer(config: PrepareConfig, progress: Progress) -> Tokenizer:
    """Load the recipe's tokenizer, after training it where it is not there yet. Raises as `train_tokenizer`."""
    settings = config.tokenizer
    if settings.train is None:
        return load_tokenizer(settings.path, settings.eos_token)
    found = find_tokenizer(settings.path)
    if found is not None:
        _check_trained(found, settings.train)
        progress(0, 0, {"stage": "train tokenizer", "already": True})
        return load_tokenizer(found)
    target = Path(settings.path).expanduser()
    return load_tokenizer(train_sentencepiece(sample_texts(config, settings.train, progress), target, settings.train))


def sample_texts(config: PrepareConfig, train: TrainTokenizerConfig, progress: Progress = silent) -> Iterator[str]:
    """Texts to train on: the head of every file, in proportion to its size; an equal share of each hub data set.

    Documents that are held out, or come after a source's max_documents, are not among them.

    Raises:
        DataError: the sources cannot be read, or hold no text where the recipe looks for it.
    """
    files = source_files(config)
    stored = sum(path.stat().st_size for paths in files for path in paths)
    hub_share = train.sample_bytes // len(config.sources)
    for_files = train.sample_bytes - hub_share * sum(source.kind == "hub" for source in config.sources)
    total = min(train.sample_bytes, stored) if for_files == train.sample_bytes else None
    tally, taken = Tally(config.max_broken_lines), 0
    for source, paths in zip(config.sources, files, strict=True):
        sizes = [path.stat().st_size for path in paths]
        parts: list[tuple[list[Path], int]] = [
            ([path], for_files * size // stored) for path, size in zip(paths, sizes, strict=True)
        ]
        if source.max_documents is not None and paths:  # of all files together, the first ones
            parts = [(paths, for_files * sum(sizes) // stored)]
        for part, share in parts or [([], hub_share)]:
            left = share
            for document in iter_documents(source, tally, files=part):
                if left <= 0:
                    break
                if not is_validation(document.text, config.validation_fraction):
                    left -= len(document.text)
                    taken += len(document.text)
                    progress(min(taken, total or taken), total, {"stage": "train tokenizer"})
                    yield document.text.decode("utf-8")
    if taken and total:  # the lines of a file hold more than its texts
        progress(total, total, {"stage": "train tokenizer"})
    if not taken and tally.broken_lines:
        raise DataError(
            f"there is no text to train a tokenizer on; the first broken lines:{quoted(tally.broken_examples)}",
            "set text_field of the source to the field that holds the text, or mend the files",
        )


def _check_trained(found: Path, train: TrainTokenizerConfig) -> None:
    record = record_of(found)
    if found.suffix != ".model" or not record.is_file():
        raise DataError(
            f"{found} is there already, and nothing says that it was trained from this recipe (no {record.name})",
            "leave out tokenizer.train to use it as it is, or choose another tokenizer.path",
        )
    if different := trained_differently(found, train):
        raise DataError(
            f"{found} was trained with other settings\n  " + "\n  ".join(different),
            f"choose another tokenizer.path, restore the settings, or delete {found}",
        )
