"""From token streams to samples: packed data sets, their blend for training, and the fixed validation samples.

A sample is T + 1 tokens: its first T are a model's inputs, its last T the labels. Sample i of a folder is tokens
i*T ... i*T + T of its stream, so neighbours share one token and every token but the first is a label exactly once.
Which sample the i-th of a run is depends on (seed, i) and the folders alone, never on ranks, workers, restarts or
the number of steps (see order.py), so that a run of another size reads the same data in the same order.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loopmem_pretrain.config.data import DataConfig
from loopmem_pretrain.data.indexed import TokenStream
from loopmem_pretrain.data.manifest import Manifest, SplitName, load_manifest
from loopmem_pretrain.data.order import ORDER, BlendCycle, permuted
from loopmem_pretrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loopmem_pretrain.config.run import RunConfig


class PackedDataset:
    """A stream cut into samples of `seq_length` + 1 tokens; a rest at the end, shorter than that, is left out.

    Raises:
        DataError: the stream is too short for one sample.
    """

    def __init__(self, stream: TokenStream, seq_length: int) -> None:
        self.stream, self.seq_length = stream, seq_length
        self.num_samples = (len(stream) - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"{stream.folder}: the {stream.split} split has {len(stream):,} tokens, one sample needs "
                f"data.seq_length + 1 = {seq_length + 1:,}",
                f"prepare more text, or set data.seq_length to at most {max(1, len(stream) - 1)}",
            )

    def __len__(self) -> int:
        """Samples in the data set."""
        return self.num_samples

    def __getitem__(self, sample: int) -> "NDArray[np.int64]":
        """Tokens of one sample, int64 [T + 1].

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.stream.folder}: sample {sample} of {self.num_samples}")
        return self.stream.read(sample * self.seq_length, self.seq_length + 1)


class BlendedDataset:
    """Endless training samples out of one or several folders; index it with any number from 0.

    Args:
        datasets: all of one seq_length.
        weights: share of samples from each, in any unit.
        seed: of the order.

    Raises:
        DataError: a weight is too small to be drawn at all.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float], seed: int) -> None:
        self.datasets, self.seed = list(datasets), seed
        self.seq_length = _common_length(datasets)
        self._cycle = _cycle(datasets, weights)

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(data set, sample of it) that sample `sample_index` of the run is."""
        if sample_index < 0:
            raise IndexError(f"sample index {sample_index} is negative")
        dataset, draw = self._cycle.locate(sample_index)
        return dataset, permuted(draw, self.datasets[dataset].num_samples, self.seed, dataset)

    def __getitem__(self, sample_index: int) -> "NDArray[np.int64]":
        """Tokens of sample `sample_index` of the run, int64 [T + 1]."""
        dataset, sample = self.locate(sample_index)
        return self.datasets[dataset][sample]

    def epochs(self, consumed_samples: int) -> list[float]:
        """How often each data set has been read through after `consumed_samples` samples of the run."""
        drawn = self._cycle.drawn(consumed_samples)
        return [count / dataset.num_samples for count, dataset in zip(drawn, self.datasets, strict=True)]

    def describe(self) -> dict[str, Any]:
        """What the order of samples depends on, as JSON values; checkpoints store it (see `description_differences`).

        `weight` is the realised share: draws in a cycle of 65,536, divided by 65,536.
        """
        return {
            "order": ORDER,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "datasets": [
                {
                    "path": str(dataset.stream.folder),
                    "manifest_sha256": dataset.stream.manifest_sha256,
                    "tokens": len(dataset.stream),
                    "samples": dataset.num_samples,
                    "weight": count / sum(self._cycle.counts),
                }
                for dataset, count in zip(self.datasets, self._cycle.counts, strict=True)
            ],
        }


VALIDATION_SEED = 0
"""Of the order of held-out samples: that of no run, so that all runs on the same folders are measured on the same."""


class ValidationDataset:
    """Held-out samples, always the same: drawn from all of each folder's validation split, blended by the weights.

    Args:
        datasets: validation splits, all of one seq_length.
        weights: as for training.
        num_samples: how many samples a validation is asked to read.

    Raises:
        DataError: the splits hold fewer than `num_samples` in these proportions.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float], num_samples: int) -> None:
        self.datasets, self.num_samples = list(datasets), num_samples
        self.seq_length = _common_length(datasets)
        self._cycle = _cycle(datasets, weights)
        # The blend ends where the first data set would have to start again.
        self.available = min(self._cycle.samples_before(d, dataset.num_samples) for d, dataset in enumerate(datasets))
        """Samples that can be read before one would repeat."""
        self.require(num_samples)

    def require(self, samples: int) -> None:
        """Check that `samples` samples can be read without repeating one.

        Raises:
            DataError: there are fewer.
        """
        if samples > self.available:
            folders = ", ".join(str(dataset.stream.folder) for dataset in self.datasets)
            raise DataError(
                f"validation reads {samples} samples of {self.seq_length} tokens, the validation splits of {folders} "
                f"give {self.available}",
                f"set validation.num_samples to at most {self.available}, or prepare with a larger validation_fraction"
                if self.available
                else "prepare with a larger validation_fraction, or set a shorter data.seq_length",
            )

    def __getitem__(self, sample_index: int) -> "NDArray[np.int64]":
        """Tokens of validation sample `sample_index`, int64 [T + 1].

        Raises:
            IndexError: there are only `available` of them.
        """
        if not 0 <= sample_index < self.available:
            raise IndexError(f"validation sample {sample_index} of {self.available}")
        dataset, draw = self._cycle.locate(sample_index)
        # From all over the split: in the order of the files the first ones would be those of the first source alone.
        return self.datasets[dataset][permuted(draw, self.datasets[dataset].num_samples, VALIDATION_SEED, dataset)]


def open_datasets(config: "RunConfig", check_indexes: bool = True) -> tuple[BlendedDataset, ValidationDataset]:
    """All samples of a run.

    Raises:
        DataError: as `open_training` and `open_validation`.
    """
    return (
        open_training(config.data, config.training.seed, config.model.vocab_size, check_indexes),
        open_validation(config.data, config.validation.num_samples, check_indexes),
    )


def split_warning(dataset: BlendedDataset) -> str:
    """Why held-out text may be trained on; empty where it cannot.

    A document's hash decides, against the fraction of its folder: between folders of one fraction equal texts are on
    one side, between others they need not be.
    """
    fractions = {str(d.stream.folder): d.stream.manifest.recipe.get("validation_fraction") for d in dataset.datasets}
    if len(set(fractions.values())) < 2:
        return ""
    said = ", ".join(f"{folder} {fraction:g}" for folder, fraction in fractions.items() if fraction is not None)
    return (
        f"the folders were prepared with different validation_fraction ({said}): a text that is in several of them may "
        "be trained on in one and held out in another; prepare them with one fraction if they share texts"
    )


def check_datasets(config: "RunConfig") -> None:
    """What can be seen of a run's data in a moment: all but the indexes of shards.

    Raises:
        DataError: as `open_datasets`.
    """
    open_datasets(config, check_indexes=False)


def open_training(data: DataConfig, seed: int, model_vocab_size: int, check_indexes: bool = True) -> BlendedDataset:
    """The training samples of a run.

    Raises:
        DataError: a folder is missing, damaged, too small, or does not fit the others or the model.
    """
    manifests = _load_manifests(data)
    check_vocabulary(manifests, model_vocab_size)
    return BlendedDataset(_open(data, "train", manifests, check_indexes), _weights(data, manifests), seed)


def open_validation(data: DataConfig, num_samples: int, check_indexes: bool = True) -> ValidationDataset:
    """The validation samples of a run.

    Raises:
        DataError: as `open_training`, or there are too few validation samples.
    """
    manifests = _load_manifests(data)
    opened = _open(data, "validation", manifests, check_indexes)
    return ValidationDataset(opened, _weights(data, manifests), num_samples)


def check_same_tokenizer(manifests: Mapping[str, Manifest]) -> None:
    """Check that all folders (path -> manifest) were made with one tokenizer.

    Raises:
        DataError: naming two folders that differ.
    """
    (first, one), *others = manifests.items()
    for folder, other in others:
        if other.tokenizer.sha256 != one.tokenizer.sha256:
            raise DataError(
                f"{first} and {folder} were made with different tokenizers (sha256 {one.tokenizer.sha256[:12]}... "
                f"and {other.tokenizer.sha256[:12]}...): the same id means another text in each",
                f"prepare one of them again with the other's tokenizer, {first}/{one.tokenizer.file}",
            )
        if other.tokenizer.eos_id != one.tokenizer.eos_id:
            raise DataError(
                f"documents end with id {one.tokenizer.eos_id} in {first} and with id {other.tokenizer.eos_id} in "
                f"{folder}: one of them would never be the end of a document to the model",
                "prepare one of them again with the other's tokenizer.eos_token",
            )


def check_vocabulary(manifests: Mapping[str, Manifest], model_vocab_size: int) -> None:
    """Check that the model has a row for every token id in the folders (path -> manifest).

    Raises:
        DataError: naming the folder and both sizes.
    """
    for folder, manifest in manifests.items():
        if manifest.tokenizer.vocab_size > model_vocab_size:
            raise DataError(
                f"vocabulary smaller than a token id: model.vocab_size is {model_vocab_size}, the tokenizer of "
                f"{folder} has ids up to {manifest.tokenizer.vocab_size - 1}",
                f"set model.vocab_size to {manifest.tokenizer.vocab_size} or more",
            )


def description_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What changed between two `BlendedDataset.describe()`: empty when both give the same samples in the same order.

    Paths may differ (a folder was moved or copied); hashes, sizes, shares, seed and length may not.
    """
    lines = [
        f"data {key}: {saved.get(key)} -> {current.get(key)}"
        for key in ("order", "seed", "seq_length")
        if saved.get(key) != current.get(key)
    ]
    before, now = saved.get("datasets", []), current.get("datasets", [])
    if len(before) != len(now):
        return [*lines, f"number of data sets: {len(before)} -> {len(now)}"]
    for old, new in zip(before, now, strict=True):
        changed = [key for key in new if key != "path" and old.get(key) != new[key]]
        lines += [f"data set {new['path']}: {key}: {old.get(key)} -> {new[key]}" for key in changed]
    return lines


def _load_manifests(data: DataConfig) -> dict[str, Manifest]:
    manifests = {dataset.path: load_manifest(dataset.path) for dataset in data.datasets}
    check_same_tokenizer(manifests)
    return manifests


def _weights(data: DataConfig, manifests: Mapping[str, Manifest]) -> list[float]:
    """Of each folder, in training and validation; `tokens` are those of its training split."""
    return [
        float(manifests[d.path].splits["train"].tokens if d.weight == "tokens" else d.weight) for d in data.datasets
    ]


def _open(
    data: DataConfig, split: SplitName, manifests: Mapping[str, Manifest], check_indexes: bool
) -> list[PackedDataset]:
    streams = (TokenStream(each.path, split, manifests[each.path], check_indexes) for each in data.datasets)
    return [PackedDataset(stream, data.seq_length) for stream in streams]


def _common_length(datasets: Sequence[PackedDataset]) -> int:
    lengths = {dataset.seq_length for dataset in datasets}
    if len(lengths) != 1:
        raise ValueError(f"data sets of one blend need one seq_length, got {sorted(lengths)}")
    return lengths.pop()


def _cycle(datasets: Sequence[PackedDataset], weights: Sequence[float]) -> BlendCycle:
    if len(datasets) != len(weights):
        raise ValueError(f"{len(datasets)} data sets, {len(weights)} weights")
    try:
        return BlendCycle(weights)
    except ValueError as error:
        raise DataError(
            f"data.datasets: {error}", "raise that weight, or leave the data set out of data.datasets"
        ) from None
