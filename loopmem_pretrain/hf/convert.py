"""A run's checkpoint as a Hugging Face folder: weights, tokenizer and sample text are found, then exported."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from loopmem_pretrain.checkpoint.manifest import read_manifest
from loopmem_pretrain.checkpoint.store import checkpoint_at, verify
from loopmem_pretrain.checkpoint.universal import mapped_weights
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.data.manifest import load_manifest
from loopmem_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from loopmem_pretrain.errors import DataError
from loopmem_pretrain.metrics_file import METRICS_NAME, read_metrics
from loopmem_pretrain.progress import ProgressBar
from loopmem_pretrain.quiet import prepare_imports
from loopmem_pretrain.words import counted

if TYPE_CHECKING:
    from loopmem_pretrain.hf.card import History

log = logging.getLogger(__name__)

SAMPLE_DOCUMENTS = 8


class OpenedCheckpoint(NamedTuple):
    """A checkpoint and what belongs to it."""

    checkpoint: Path
    config: RunConfig
    step: int
    tokenizer_path: Path


def open_checkpoint(path: str | Path) -> OpenedCheckpoint:
    """The newest checkpoint of a run folder, or the checkpoint folder itself, with its config and tokenizer.

    Raises:
        ConfigError: no such folder.
        CheckpointError: neither a run folder with a checkpoint nor a checkpoint, or a damaged one.
        DataError: the prepared data that holds the tokenizer is missing, or holds another one.
    """
    checkpoint = checkpoint_at(path)
    verify(checkpoint, ["config.yaml"])
    manifest = read_manifest(checkpoint)
    config = load_config(RunConfig, checkpoint / "config.yaml")
    data_dir = Path(config.data.datasets[0].path)
    if not data_dir.is_dir() and (checkpoint.parent.parent / "config.yaml").exists():
        # The data moved after this checkpoint: the run folder's own config knows the newer place.
        newer = load_config(RunConfig, checkpoint.parent.parent / "config.yaml").data
        config = config.model_copy(update={"data": newer})
        data_dir = Path(newer.datasets[0].path)
    tokenizer = load_manifest(data_dir).tokenizer
    trained_with = manifest["tokenizer_sha256"]
    if tokenizer.sha256 != trained_with:
        raise DataError(
            f"the tokenizer of {data_dir} is not the one {checkpoint} was trained with: its hash is "
            f"{tokenizer.sha256[:12]}..., the run's was {trained_with[:12]}...",
            "restore the prepared data the run was trained on at that path",
        )
    return OpenedCheckpoint(checkpoint, config, manifest["step"], data_dir / tokenizer.file)


class LateBar:
    """Counts written parameters; its time begins with the first, not with what is loaded before."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: ProgressBar | None = None

    def update(self, done: int) -> None:
        self.bar = self.bar or ProgressBar("convert", self.total, start=done, unit="parameter")
        self.bar.update(done, "written; comparing comes next" if done == self.total else "")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def convert_run(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    unrolled: int | None = None,
) -> str:
    """Export a run; returns a few lines that say what was written and how it compares.

    Raises:
        ConfigError, CheckpointError, DataError, ConversionError, EnvironmentFault: as `open_checkpoint` and `export`
            say.
    """
    prepare_imports("cpu")
    from loopmem_pretrain.hf.export import export
    from loopmem_pretrain.hf.staging import check_destination
    from loopmem_pretrain.hf.unrolled import check_unrolled

    check_destination(out_dir, overwrite)
    opened = open_checkpoint(path)
    if unrolled is not None:
        check_unrolled(opened.config.model, unrolled)  # before a long merge
    tokenizer = load_tokenizer(opened.tokenizer_path)
    log.info("reading %s", opened.checkpoint)
    with mapped_weights(opened.checkpoint) as weights:
        bar = LateBar(len(weights))
        report = export(
            opened.config.model,
            weights,
            opened.tokenizer_path,
            out_dir,
            sample_texts=list(sample_texts(opened.config, tokenizer)),
            dtype=dtype,
            seq_length=opened.config.data.seq_length,
            overwrite=overwrite,
            history=history(opened),
            unrolled=unrolled,
            on_written=bar.update,
        )
    bar.close()
    match = report.comparison
    return (
        f"{out_dir}: step {opened.step}, {report.parameters:,} parameters, {report.weight_bytes / 1e6:,.1f} MB "
        f"{report.dtype} in {counted(len(report.weight_files), 'file')}\n"
        f"compared on {match.texts} texts, {match.tokens:,} tokens: {match.places} tensors of layers and loops agree, "
        f"logits differ by at most {match.max_abs_difference:.1e} (allowed {match.tolerance:.1e}), loss "
        f"{match.exported_loss:.6f} against {match.reference_loss:.6f}; {match.greedy_tokens} greedy tokens the same"
    )


def history(opened: OpenedCheckpoint) -> "History":
    """What the checkpoint, its data and, where it lies in a run folder, the run's metrics say of the training.

    Raises:
        DataError: prepared data or metrics.jsonl that cannot be read.
    """
    from loopmem_pretrain.hf.card import DataShare, History

    manifest = read_manifest(opened.checkpoint)
    metrics = opened.checkpoint.parent.parent / METRICS_NAME
    records = read_metrics(metrics) if metrics.is_file() else []
    data = [
        DataShare(dataset.path, trained["weight"], load_manifest(dataset.path))
        for dataset, trained in zip(opened.config.data.datasets, manifest["data"]["datasets"], strict=True)
    ]
    return History(
        opened.step,
        manifest["position"]["tokens"],
        tuple(data),
        tuple(record for record in records if record["step"] <= opened.step),
        manifest.get("versions", {}),
        manifest.get("origin"),
    )


def import_from_hf(path: str | Path, config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Begin the run of a configuration with the weights of a folder; returns what was done, in words.

    Raises:
        ConfigError, DataError, ConversionError, EnvironmentFault: as `importing.import_run` says.
    """
    config = load_config(RunConfig, config_path, overrides, run_problems)
    prepare_imports("cpu")
    from transformers.utils import logging

    from loopmem_pretrain.hf.importing import import_run

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    told = import_run(path, config, str(config_path))
    command = shlex.join(["loopmem", "train", "--config", str(config_path), *overrides])
    return f"{told}\n`{command}` continues from here, on any number of ranks"


def sample_texts(config: RunConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Real text to compare on: stretches of the validation split, one sequence long, as many as there are."""
    from loopmem_pretrain.data.dataset import open_validation

    dataset = open_validation(config.data, num_samples=1)
    for index in range(min(SAMPLE_DOCUMENTS, dataset.available)):
        yield tokenizer.decode(dataset[index].tolist())
