"""Which prepared token shards a run reads, and in which proportion."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from loopmem_pretrain.config.base import FilePath, Problem, Section


def _weight(value: Any) -> float | str:
    if value == "tokens":
        return "tokens"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("must be a number above 0, or tokens")
    return float(value)


class DatasetConfig(Section):
    """One folder written by `loopmem prepare-data`."""

    path: FilePath
    """Folder with manifest.json and the .bin/.idx shards, absolute or relative to the working directory."""
    weight: Annotated[float | Literal["tokens"], PlainValidator(_weight)] = 1.0
    """Share of samples drawn from this folder, above 0, relative to the other weights, rounded to a multiple of 1/65536
    of all samples; `tokens`, for all folders or none: in proportion to its tokens, as if the folders were one. Left
    out, all folders are read equally often, a small one many times: the start tells how many."""


class DataConfig(Section):
    """What a run trains and validates on."""

    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Folders to blend."""
    seq_length: int = Field(gt=0)
    """T: tokens in a sample; documents are packed without a document mask."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that read samples ahead on each rank; 0 reads when the batch is asked for."""


def data_problems(data: DataConfig) -> list[Problem]:
    """Rules between fields; each problem is (path of the key to change, what is wrong and what is valid)."""
    by_tokens = [dataset.weight == "tokens" for dataset in data.datasets]
    if all(by_tokens) or not any(by_tokens):
        return []
    key = ("data", "datasets", str(by_tokens.index(False)), "weight")
    return [(key, "is a number, and another folder's is `tokens`; write `tokens` for all of them, or numbers")]
