"""Which prepared token shards a run reads, and in which proportion."""

from pydantic import Field

from loopmem_pretrain.config.base import Section


class DatasetConfig(Section):
    """One folder written by `loopmem prepare-data`."""

    path: str = Field(min_length=1)
    """Folder with manifest.json and the .bin/.idx shards, absolute or relative to the working directory."""
    weight: float = Field(default=1.0, gt=0)
    """Share of samples drawn from this folder, relative to the other weights."""


class DataConfig(Section):
    """What a run trains and validates on."""

    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """Folders to blend."""
    seq_length: int = Field(gt=0)
    """T: tokens a sample; documents are packed without a document mask."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that read samples ahead on each rank; 0 reads when the batch is asked for."""
