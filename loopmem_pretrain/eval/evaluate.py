"""`loopmem eval`: a run or an exported folder on held-out text, as a dictionary that JSON can hold.

Nothing is drawn at random: the same command on the same machine gives the same numbers.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from loopmem_pretrain import __version__
from loopmem_pretrain.checkpoint.manifest import MANIFEST, read_manifest
from loopmem_pretrain.checkpoint.store import checkpoint_at
from loopmem_pretrain.data.files import sha256_file, write_file
from loopmem_pretrain.errors import ConfigError, DataError
from loopmem_pretrain.eval.documents import Domain, prepared_domains, text_domains
from loopmem_pretrain.eval.perplexity import DomainScores, Ratio, Scorer, measure
from loopmem_pretrain.eval.scoring import Setting, stride_of
from loopmem_pretrain.inference.command import open_model
from loopmem_pretrain.inference.generate import codec_of
from loopmem_pretrain.progress import ProgressBar
from loopmem_pretrain.quiet import prepare_imports


def evaluate(
    path: str | Path,
    *,
    text: Sequence[str] = (),
    data: Sequence[str] = (),
    num_loops: Sequence[str] = (),
    max_documents: int | None = None,
    batch_size: int = 8,
    command: str = "",
) -> dict[str, Any]:
    """Score documents; docs/evaluation.md says what the numbers mean.

    Args:
        path: run folder (its newest checkpoint), one of its checkpoints, or an exported folder.
        text: files to score, one domain each.
        data: folders of prepared data, whose validation splits are scored; without both, those of the run.
        num_loops: forced numbers of loops, or `all`; empty runs the model as it was trained.
        max_documents: of each domain; None scores all.
        batch_size: windows in one forward pass; the numbers do not depend on it.
        command: recorded as it is.

    Raises:
        ConfigError: a value that cannot be meant, or nothing to score.
        DataError: text or prepared data that cannot be scored, or a tokenizer that does not fit the model.
        CheckpointError: no whole checkpoint, or a model that gives no finite cross-entropy.
        ConversionError: an exported folder that is damaged.
    """
    for name, value in (("--batch-size", batch_size), ("--max-documents", max_documents)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is not valid", "give 1 or more")
    prepare_imports("cpu")
    is_exported = (Path(path) / "config.json").exists()
    # The checkpoint is named once: a training beside this may save a newer one meanwhile.
    place = Path(path) if is_exported else checkpoint_at(path)
    domains = _domains(place, is_exported, text, data)
    model, tokenizer, trained_on = open_model(place)
    settings = settings_of(model, num_loops)
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
    scorer = Scorer(model, codec.encode, codec.eos_id, context, batch_size)
    results = [_with_bar(scorer, domain, settings, max_documents) for domain in domains]
    return {
        "command": command,
        "version": __version__,
        "model": _identity(place, is_exported, model),
        "context": context,
        "stride": stride_of(context),
        "batch_size": batch_size,
        "max_documents": max_documents,
        "max_loops": model.config.max_loops,
        "domains": [_plain(result, model.config.max_loops) for result in results],
    }


def settings_of(model: Any, num_loops: Sequence[str]) -> list[Setting]:
    """What `--num-loops` asks for.

    Raises:
        ConfigError: no number of loops, or a model that does not loop.
    """
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


def write_evaluation(path: str | Path, evaluation: dict[str, Any]) -> None:
    """Write what `evaluate` returned as JSON, whole or not at all.

    Raises:
        EnvironmentFault: disk full, no permission.
    """
    write_file(Path(path), (json.dumps(evaluation, indent=1, allow_nan=False) + "\n").encode())


def _domains(place: Path, is_exported: bool, text: Sequence[str], data: Sequence[str]) -> list[Domain]:
    if text:
        return text_domains(text)
    if data:
        return prepared_domains(data)
    if is_exported:
        raise ConfigError(f"{place}: an exported folder has no validation split", "add --text FILE or --data PREPARED")
    from loopmem_pretrain.hf.convert import open_checkpoint

    return prepared_domains([dataset.path for dataset in open_checkpoint(place).config.data.datasets])


def _with_bar(scorer: Scorer, domain: Domain, settings: list[Setting], max_documents: int | None) -> DomainScores:
    bar = ProgressBar(f"eval {domain.name}", 0, unit="window")

    def show(windows: int, documents: int) -> None:
        bar.update(windows, f"{documents:,} documents")

    try:
        return measure(scorer, domain, settings, max_documents, show)
    finally:
        bar.close()


def _identity(place: Path, is_exported: bool, model: Any) -> dict[str, Any]:
    """Which weights: for an exported folder the hash of its files' hashes, else that of the checkpoint's manifest."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not is_exported:
        step = read_manifest(place)["step"]
        return {"path": str(place), "step": step, "dtype": dtype, "sha256": sha256_file(place / MANIFEST)}
    files = sorted(file for kind in ("config.json", "*.safetensors", "tokenizer*.json") for file in place.glob(kind))
    lines = [f"{sha256_file(file)}  {file.name}\n" for file in files]
    return {"path": str(place), "step": None, "dtype": dtype, "sha256": sha256("".join(lines).encode()).hexdigest()}


def _plain(result: DomainScores, max_loops: int) -> dict[str, Any]:
    rows = [
        {
            "num_loops": score.setting.num_loops,
            "extrapolation": (score.setting.num_loops or 0) > max_loops,
            "gates_closed": score.setting.gates_closed,
            "nats": score.nats,
            **_named("perplexity", score.perplexity),
            **_named("bits_per_byte", score.bits_per_byte),
        }
        for score in result.scores
    ]
    return {**result._asdict(), "scores": rows}


def _named(name: str, ratio: Ratio) -> dict[str, float | None]:
    return {name: ratio.value, f"{name}_standard_error": ratio.standard_error}
