"""README.md of an exported folder: what is known of the model, and nothing that is not."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.data.manifest import Manifest
from loopmem_pretrain.hf.verify import Comparison
from loopmem_pretrain.model.flops import forward_flops_at, forward_flops_per_token, parameter_counts

CURVE_ROWS = 10
EVALUATION_BEGINS, EVALUATION_ENDS = "<!-- loopmem eval: begin -->", "<!-- loopmem eval: end -->"
"""Marks between which `loopmem eval --card` puts what it measured."""


class DataShare(NamedTuple):
    """One prepared folder that a run read."""

    path: str
    """As the run's config has it."""
    share: float
    """Of the samples."""
    manifest: Manifest


class History(NamedTuple):
    """How a model came about."""

    step: int
    """Optimizer steps."""
    tokens: int
    """Tokens seen in them."""
    data: tuple[DataShare, ...]
    """What they were drawn from."""
    records: tuple[Mapping[str, Any], ...]
    """Lines of metrics.jsonl up to that step; none where the file is not there."""
    versions: Mapping[str, str]
    """Packages it was trained with, by name."""
    origin: Mapping[str, str] | None = None
    """Folder and model_type of the weights that the run began with; None where it began with its own."""


def model_card(
    config: ModelConfig,
    dtype: str,
    seq_length: int,
    comparison: Comparison,
    history: History | None = None,
    unrolled: bool = False,
) -> str:
    """The model card as Markdown.

    Args:
        config: the model's sizes.
        dtype: of the exported weights.
        seq_length: tokens of a training sequence.
        comparison: of the exported model with its checkpoint.
        history: where it came from; None where that is not known.
        unrolled: of the dense model that is this one with one loop.
    """
    if unrolled:
        config = config.model_copy(update={"max_loops": 0, "residual_scale": "one"})
        comparison = comparison._replace(expected_loops=())
    sections = [
        _HEAD,
        _sizes(config, dtype, seq_length),
        _UNROLLED if unrolled else _usage(config),
        _loops(config, seq_length, comparison),
        *([_data(history), _curve(history)] if history else [_NO_DATA]),
        _evaluation(comparison, history, unrolled),
        _LIMITS.format(seq_length=seq_length),
    ]
    return "\n".join(sections)


_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- loopmem
---

# A looped memory transformer

A decoder-only language model, trained with loopmem_pretrain. It continues text; it is not trained to follow
instructions or to be safe.
"""

_UNROLLED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The model was trained by loopmem_pretrain and is stored as the dense architecture `hunyuan_v1_dense`, which computes
the same: every layer is applied once. It needs no code of its own.
"""

_NO_DATA = """## Data

What the model was trained on is not recorded here.
"""

_LIMITS = """## Limits

- The model continues text as its training data would, with what is wrong or harmful there.
- Sequences in training had {seq_length:,} tokens; nothing was learned about later positions.
- Ids that only pad the vocabulary are never generated (`suppress_tokens` of generation_config.json). Tokens that are
  added to the tokenizer get these ids: `tokenizer.split_special_tokens = False` lets it read them in texts, and once
  they are trained, take theirs out,
  `model.generation_config.suppress_tokens = list(range(len(tokenizer), model.config.vocab_size)) or None`.
- The licence of these weights is for whoever publishes this folder to add here.
"""


def _sizes(config: ModelConfig, dtype: str, seq_length: int) -> str:
    counts = parameter_counts(config)
    loops = f"each applied up to {config.max_loops} times" if config.max_loops > 1 else "each applied once"
    banks = [f"{config.local_slots} slots in each layer"] if config.local_slots else []
    banks += [f"{config.global_slots} slots shared by all layers"] if config.global_slots else []
    memory = f"{' and '.join(banks)}, {config.gate} gate" if banks else "none"
    heads = f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values"
    return f"""| | |
|---|---|
| parameters | {counts.total:,} |
| of them embedding and head, blocks, looping, memory | {counts.embedding + counts.head:,}, {counts.blocks:,}, \
{counts.looping:,}, {counts.memory:,} |
| layers | {config.num_hidden_layers}, {loops} |
| memory | {memory} |
| hidden size, feed-forward | {config.hidden_size}, {config.intermediate_size} |
| attention heads | {heads} |
| vocabulary | {config.vocab_size:,} |
| trained on sequences of | {seq_length:,} tokens |
| weights stored as | {dtype} |
"""


def _usage(config: ModelConfig) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

`modeling_loopmem.py` holds all of the model's code; `trust_remote_code=True` allows it to run. It needs torch and
transformers (tried with 5.16, 5.23 and 5.24). Where loopmem_pretrain is installed, `import loopmem_pretrain.hf` takes
the place of `trust_remote_code`. `AutoModel` loads the model without its head.

Prompts of different lengths go in one batch with `tokenizer(texts, padding=True, padding_side="left")`; where the
tokenizer has no pad token, set `tokenizer.pad_token = tokenizer.eos_token`. The key/value cache holds every loop of
every layer, {_cached_numbers(config):,} numbers a token.
{_loops_hint(config)}"""


def _cached_numbers(config: ModelConfig) -> int:
    """Keys and values of one token: K heads of width d each, in every layer and loop."""
    kv_width = config.num_key_value_heads * config.head_width
    return 2 * kv_width * config.num_hidden_layers * max(1, config.max_loops)


def _loops_hint(config: ModelConfig) -> str:
    if config.max_loops < 1:
        return ""
    return (
        "\n`model(input_ids, num_loops=n)` and `model.generate(..., num_loops=n)` apply every layer n times instead of "
        f"{config.max_loops}; `output_loop_stats=True` returns halting probabilities and expected loops. "
        "`exit_threshold=0.9` lets each token leave a layer as soon as its router has given out nine tenths of its "
        "mass, which saves the rest of its loops; without it all of them run.\n"
    )


def _loops(config: ModelConfig, seq_length: int, comparison: Comparison) -> str:
    """Expected loops of each layer, and what they would cost."""
    full = forward_flops_per_token(config, seq_length).total
    lines = [
        "## Loops and FLOPs",
        "",
        f"One token of a sequence of {seq_length:,} takes {_flops(full)} forward"
        + (f" with all {config.max_loops} loops." if config.max_loops > 1 else "."),
    ]
    if comparison.expected_loops:
        mean = sum(comparison.expected_loops) / len(comparison.expected_loops)
        lines += [
            f"Were each layer left after the expected number of loops, {mean:.2f} on average, it would be "
            f"{_flops(forward_flops_at(config, seq_length, mean))}.",
            "",
            f"Expected loops, the mean of sum n p_n over {comparison.tokens:,} tokens of held-out text:",
            "",
            *markdown_table(
                ["layer", "expected loops"],
                [[str(layer), f"{loops:.3f}"] for layer, loops in enumerate(comparison.expected_loops)],
            ),
        ]
    return "\n".join([*lines, ""])


def _flops(count: int) -> str:
    return f"{count / 1e9:,.3f} GFLOPs" if count >= 1e8 else f"{count / 1e6:,.3f} MFLOPs"


def _data(history: History) -> str:
    lines = ["## Data", ""]
    for data in history.data:
        train = data.manifest.splits["train"]
        seen = data.share * history.tokens
        lines += [
            f"`{Path(data.path).name}`, {data.share:.1%} of the samples: {train.tokens:,} tokens in "
            f"{train.documents:,} documents, of which the run saw {seen:,.0f} ({seen / train.tokens:.2f} epochs).",
            "",
            *markdown_table(["text", "licence", "files", "bytes"], _sources(data.manifest)),
            "",
        ]
    return "\n".join(lines)


def _sources(manifest: Manifest) -> list[list[str]]:
    """One row an origin and licence."""
    sizes: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for source in manifest.source:
        sizes[source.origin, source.license].append(source.bytes)
    return [
        [origin or "not named", licence or "not named", str(len(found)), _sum(found)]
        for (origin, licence), found in sizes.items()
    ]


def _sum(sizes: Sequence[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{sum(known):,}" if len(known) == len(sizes) else "not recorded"


def _curve(history: History) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in history.versions.items())
    lines = [
        "## Training",
        "",
        *_began_from(history),
        f"{history.step:,} steps, {history.tokens:,} tokens" + (f"; {versions}." if versions else "."),
    ]
    measured = [record for record in history.records if "validation_loss" in record] or list(history.records)
    if measured:
        lines += [
            "",
            "Cross-entropy in nats a token:",
            "",
            *markdown_table(
                ["step", "tokens", "training", "validation"],
                [
                    [f"{row['step']:,}", _number(row, "tokens", ","), *(_number(row, key, ".4f") for key in _LOSSES)]
                    for row in _spread(measured, CURVE_ROWS)
                ],
            ),
        ]
    return "\n".join([*lines, ""])


_LOSSES = ("cross_entropy", "validation_loss")


def _began_from(history: History) -> list[str]:
    """The folder's name alone: its place is nobody's business but the owner's."""
    if not history.origin:
        return []
    name, model_type = Path(history.origin["folder"]).name, history.origin["model_type"]
    return [f"Continues from the weights in `{name}` (model_type `{model_type}`).", ""]


def _number(record: Mapping[str, Any], key: str, form: str) -> str:
    value = record.get(key)
    return "" if value is None else format(value, form)


def _spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many of them, evenly, the last always."""
    count = min(most, len(rows))
    return [rows[(number + 1) * len(rows) // count - 1] for number in range(count)]


def _evaluation(comparison: Comparison, history: History | None, unrolled: bool) -> str:
    text = (
        f"On the {comparison.tokens:,} tokens of held-out text that this folder was checked with, the cross-entropy is "
        f"{comparison.exported_loss:.4f} nats a token (the checkpoint's: {comparison.reference_loss:.4f})."
    )
    lines = ["## Evaluation", ""]
    if unrolled:
        return "\n".join([*lines, text, ""])
    loops = " --num-loops all --exit-threshold 0.5 0.7 0.9" if comparison.expected_loops else ""
    lines += [
        f"{text} With loopmem_pretrain installed, perplexity and bits per byte by domain, and what task suites give; "
        f"`--card` puts it here{', quality against loops and against the threshold of early exit' if loops else ''}:",
        "",
        f"    loopmem eval . --text HELD_OUT.jsonl{loops} --card",
        f"    loopmem eval . --tasks commonsense,math{loops}",
    ]
    if history:
        lines.append(
            f"    loopmem eval . --data {' '.join(data.path for data in history.data)}  # the validation split"
        )
    lines += ["", EVALUATION_BEGINS, EVALUATION_ENDS]
    return "\n".join([*lines, ""])


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; columns of numbers stand at the right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    marks = ["---:" if all(cell[:1].isdigit() for cell in column) else "---" for column in zip(*cells, strict=True)]
    return [f"| {' | '.join(row)} |" for row in [list(headings), marks, *cells]]
