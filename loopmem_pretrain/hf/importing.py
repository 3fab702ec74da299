"""`loopmem convert --from-hf`: weights of a Hugging Face folder become the checkpoint of step 0 of a run.

Before the checkpoint gets its name, the model that it holds is compared with the folder's, run by transformers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from loopmem_pretrain.checkpoint.first import check_new_run, first_checkpoint
from loopmem_pretrain.checkpoint.probe import FILE as PROBE_FILE
from loopmem_pretrain.checkpoint.store import CheckpointStore
from loopmem_pretrain.checkpoint.universal import MERGED, read_weights, write_weights
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import open_datasets, open_validation
from loopmem_pretrain.data.files import write_file
from loopmem_pretrain.data.manifest import load_manifest
from loopmem_pretrain.data.tokenizer import load_tokenizer
from loopmem_pretrain.errors import ConversionError, DataError
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.hf.source import Source, check_model, check_tensors, open_source, weights_of
from loopmem_pretrain.hf.verify import reference_model
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import parameter_counts
from loopmem_pretrain.model.loopmem import LoopMemLM
from loopmem_pretrain.progress import ProgressBar

LOSS_TOLERANCE = 1e-4
"""Nats, and of the largest logit: the same sums in another order, through all layers."""
SAMPLES = 4
"""Validation samples on which tokenizers are compared."""
ROWS = 256
"""Tokens whose logits are held in float64 at a time."""


class Match(NamedTuple):
    """The imported model beside the folder's on one held-out sample, float32 on the CPU."""

    tokens: int
    loss: float
    source_loss: float
    max_abs_difference: float
    """Of any logit."""
    scale: float
    """Largest |logit| of the source."""


def import_run(path: str | Path, config: RunConfig, where: str) -> str:
    """Begin the run of a configuration with the weights of a folder; returns what was done, in words.

    Args:
        path: of the folder.
        config: of the run.
        where: the configuration's file, for messages.

    Raises:
        ConfigError: the folder, the run's model or its run_dir cannot be meant.
        DataError: the run's data cannot be opened, or was made with another tokenizer.
        ConversionError: the weights are damaged, not those of their config.json, or compute something else here.
        EnvironmentFault: disk full, no permission.
    """
    check_new_run(Path(config.run_dir))
    source = open_source(path)
    check_model(source, config.model, where)
    shapes = _shapes(config)
    check_tensors(source, shapes)
    compared = _check_tokenizer(source, config)
    dataset, validation = open_datasets(config)
    sample = [int(token) for token in validation[0]]
    origin = {"folder": str(source.folder.resolve()), "model_type": source.model_type}
    with first_checkpoint(config, dataset, shapes, origin) as folder:
        merged = folder / MERGED
        write_weights(merged, _shown(weights_of(source, config.model, shapes, config.training.seed), len(shapes)))
        match = _compare(source, config, dict(read_weights(merged, shapes)), sample)
        write_file(folder / PROBE_FILE, (json.dumps({"loss": match.loss, "tokens": [sample]}) + "\n").encode())
    checkpoint = CheckpointStore(config.run_dir).latest()
    what = f"a {source.model_type} model with new loops and banks" if source.is_retrofit else "an exported model"
    return (
        f"{checkpoint}: {parameter_counts(config.model).total:,} parameters from {source.folder}, {what}\n"
        f"compared on {match.tokens:,} tokens: logits differ by at most {match.max_abs_difference:.1e} (largest "
        f"{match.scale:.1e}), loss {match.loss:.6f} against {match.source_loss:.6f}\n"
        f"{compared}\n"
        f"{_left_behind(source)}"
        "this is step 0 of a new run: the optimizer's moments are zero, schedules and samples begin anew"
    )


def _left_behind(source: Source) -> str:
    """What of config.json is about generation alone."""
    if source.exit_threshold is None:
        return ""
    return (
        f"exit_threshold {source.exit_threshold:g} of its config.json is not taken over: models were compared with all "
        "loops, and a run has none; set it in the config.json of the next export\n"
    )


def _shapes(config: RunConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = LoopMemLM(config.model, TorchBackend())
    return {name: list(value.shape) for name, value in model.named_parameters()}


def _shown(weights: Iterator[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    bar = ProgressBar("convert", total, unit="parameter")
    for done, item in enumerate(weights, start=1):
        yield item
        bar.update(done, "written; comparing comes next" if done == total else "")
    bar.close()


def _check_tokenizer(source: Source, config: RunConfig) -> str:
    """The run's data must have been made with the tokenizer of the weights; returns what was compared."""
    data_dir = Path(config.data.datasets[0].path)
    entry = load_manifest(data_dir).tokenizer
    vocabulary = source.fields["vocab_size"]
    if entry.vocab_size > vocabulary:
        raise DataError(
            f"wrong tokenizer: that of {data_dir} has {entry.vocab_size:,} tokens, the weights in {source.folder} have "
            f"rows for {vocabulary:,}",
            f"prepare the data with the tokenizer of the weights (tokenizer.path: {source.folder})",
        )
    file = source.folder / "tokenizer.json"
    if not file.is_file():
        return f"no tokenizer.json in {source.folder}: that {data_dir} was made with its tokenizer is not checked"
    ours = load_tokenizer(data_dir / entry.file)
    theirs = load_tokenizer(file, eos_token=getattr(ours, "eos_token", None))
    validation = open_validation(config.data, config.validation.num_samples)
    for number in range(min(SAMPLES, validation.available)):
        text = ours.decode(validation[number].tolist())
        if theirs.encode(text) != ours.encode(text):
            raise DataError(
                f"wrong tokenizer: that of {data_dir} and {file} give other tokens for validation sample {number}",
                f"prepare the data with the tokenizer of the weights (tokenizer.path: {source.folder})",
            )
    return f"the tokenizer in {source.folder} gives the tokens of {data_dir}"


def _compare(source: Source, config: RunConfig, weights: dict[str, Tensor], sample: list[int]) -> Match:
    """Run both models on the sample, one after the other."""
    inputs, labels = torch.tensor([sample[:-1]]), torch.tensor(sample[1:])
    with torch.inference_mode():
        expected = _load(source)(inputs, use_cache=False).logits[0]
        found = reference_model(config.model, weights)(inputs).logits[0]
    losses, difference = [0.0, 0.0], 0.0
    for ours, theirs, targets in zip(*(torch.split(each, ROWS) for each in (found, expected, labels)), strict=True):
        difference = max(difference, float((ours - theirs).abs().max()))
        for index, logits in enumerate((ours, theirs)):
            losses[index] += float(F.cross_entropy(logits.double(), targets, reduction="sum")) / len(labels)
    match = Match(len(labels), losses[0], losses[1], difference, float(expected.abs().max()))
    limit = LOSS_TOLERANCE * max(1.0, match.scale)
    if not (abs(losses[0] - losses[1]) <= LOSS_TOLERANCE and match.max_abs_difference <= limit):
        raise ConversionError(
            f"the model taken from {source.folder} computes something else: over {match.tokens} tokens logits differ "
            f"by up to {match.max_abs_difference:.3e} (allowed {limit:.1e}), loss {match.loss:.6f} instead of "
            f"{match.source_loss:.6f} (allowed {LOSS_TOLERANCE:g})",
            "nothing was written; report this together with its config.json",
        )
    return match


def _load(source: Source) -> Any:
    """The folder's own model, float32, as transformers loads it, with all loops."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    try:
        if source.is_retrofit:
            model: Any = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=False, **options)
        else:
            model = LoopMemForCausalLM.from_pretrained(source.folder, **options)
            model.config.exit_threshold = None  # of generation; what training begins with runs all loops
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise ConversionError(
            f"transformers cannot load {source.folder}: {type(error).__name__}: {error}", "copy the folder again"
        ) from error
    return model.eval()
