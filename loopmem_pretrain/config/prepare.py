"""How raw text becomes token shards: sources, tokenizer, split and shard sizes.

load_config(PrepareConfig, "data_prep/demo.yaml", ["num_processes=4"], rules=prepare_problems)
"""

import re
from typing import Any, Literal

from pydantic import Field

from loopmem_pretrain.config.base import Key, Problem, Section

SPECIAL_PIECES = 4 + 256  # <unk> <s> </s> <pad> and one piece for each byte value


class FilterConfig(Section):
    """Keeps documents whose value in one numeric field satisfies min <= value < below."""

    field: str = Field(min_length=1)
    """Name of a numeric field next to the text, such as `score`; dots reach into nested JSON (`metadata.score`)."""
    min: float | None = None
    """Smallest value kept; unset keeps everything below `below`."""
    below: float | None = None
    """Values from here up are dropped; unset keeps everything from `min` up."""


class SourceConfig(Section):
    """Text files, or one data set of the Hugging Face hub."""

    kind: Literal["files", "hub"] = "files"
    """`files` reads .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt by suffix, in small or capital letters; `hub`
    streams through `datasets`."""
    paths: tuple[str, ...] = ()
    """files: paths or glob patterns (** crosses folders), relative to the working directory; read in sorted order."""
    name: str | None = None
    """hub: data set, such as HuggingFaceTB/smollm-corpus; or a builder of `datasets` (json) with data_files."""
    config: str | None = None
    """hub: configuration of the data set, such as fineweb-edu-dedup."""
    split: str = "train"
    """hub: split to read."""
    revision: str | None = None
    """hub: commit to read; pin it, or a resumed run may read different data."""
    data_files: tuple[str, ...] = ()
    """hub: files for a builder such as json; leave it out for a named data set."""
    text_field: str = Field(default="text", min_length=1)
    """Field or column that holds the text; dots reach into nested JSON. Unused for .txt."""
    document_separator: Literal["file", "blank_line"] = "file"
    """.txt only: a file is one document, or documents are set apart by blank lines."""
    filters: tuple[FilterConfig, ...] = ()
    """A document is kept when all of these hold."""
    max_documents: int | None = Field(default=None, gt=0)
    """Stop reading this source after this many kept documents, the first in reading order, not a sample of it: of files
    that are sorted (by date, crawl, subject) they are of one kind; unset reads it all."""
    origin: str = Field(min_length=1)
    """Where the text comes from, for the manifest."""
    license: str = Field(min_length=1)
    """Its licence, for the manifest."""


class TrainTokenizerConfig(Section):
    """A sentencepiece model trained on the sources: byte fallback, no normalisation, digits apart."""

    vocab_size: int = Field(gt=SPECIAL_PIECES)
    """Pieces, with the 4 special ones (<unk> 0, <s> 1, </s> 2, <pad> 3) and the 256 byte pieces."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """bpe converts exactly to Hugging Face; unigram tokenizes faster, with ties on about 0.4 % of texts."""
    sample_bytes: int = Field(default=1_000_000_000, gt=0)
    """Most text to train on, in UTF-8 bytes, taken from the beginning of every file in proportion to its size."""
    character_coverage: float = Field(default=0.9999, gt=0.9, le=1)
    """Share of characters that get a piece of their own; the others are spelled in bytes without loss."""


class TokenizerConfig(Section):
    """An existing tokenizer, or one to train first."""

    path: str = Field(min_length=1)
    """tokenizer.model (sentencepiece), tokenizer.json (Hugging Face) or a folder with one; a trained
    one is written there."""
    eos_token: str | None = None
    """Hugging Face only: the token that ends a document, where tokenizer_config.json does not name it."""
    train: TrainTokenizerConfig | None = None
    """How to train it when `path` does not exist yet; unset never trains and only reads `path`."""


class PrepareConfig(Section):
    """Everything `loopmem prepare-data` and `loopmem train-tokenizer` need to know."""

    output_dir: str = Field(min_length=1)
    """Folder for the shards, manifest.json and a copy of the tokenizer; the same folder continues after a stop."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """What is read, in this order."""
    tokenizer: TokenizerConfig
    """What turns text into token ids."""
    validation_fraction: float = Field(default=0.001, ge=0, lt=1)
    """Share of documents held out: those whose text hashes below this threshold. So equal texts fall on the same side
    of the split, within a folder and between folders of equal validation_fraction."""
    append_eos: bool = True
    """End every document with the end-of-document token."""
    shard_tokens: int = Field(default=100_000_000, ge=1000)
    """Tokens after which a shard is closed; finished shards are what an interrupted run keeps."""
    max_broken_lines: int = Field(default=100, ge=0)
    """Lines without valid JSON and text that are tolerated, counted over all sources; one more ends the run."""
    num_processes: int | None = Field(default=None, gt=0)
    """Processes that tokenize; unset takes every core this process may use. The shards do not depend on it."""


def prepare_problems(config: PrepareConfig) -> list[Problem]:
    """Rules between fields; each problem is (path of the key to change, what is wrong and what is valid)."""
    problems = _credentials(config.model_dump(mode="json"))
    for index, source in enumerate(config.sources):
        problems += [(("sources", str(index), *key), message) for key, message in _source_problems(source)]
    if config.tokenizer.train is not None and config.tokenizer.eos_token is not None:
        problems.append((("tokenizer", "eos_token"), "belongs to Hugging Face tokenizers; a trained one ends in </s>"))
    if config.tokenizer.train is not None and config.tokenizer.path.endswith(".json"):
        problems.append((("tokenizer", "path"), "training writes tokenizer.model; name a folder or a .model file"))
    return problems


def _credentials(value: Any, key: Key = ()) -> list[Problem]:
    """URLs that hold a password or token: the recipe is copied into the manifest, which travels with the data."""
    if isinstance(value, dict):
        return [problem for name, inner in value.items() for problem in _credentials(inner, (*key, str(name)))]
    if isinstance(value, list):
        return [problem for index, inner in enumerate(value) for problem in _credentials(inner, (*key, str(index)))]
    if isinstance(value, str) and re.search(r"://[^/@\s]*@", value):
        advice = "leave them out, the manifest would keep them; give them by HF_TOKEN, or in ~/.netrc"
        return [(key, f"is a URL with credentials; {advice}")]
    return []


def _source_problems(source: SourceConfig) -> list[Problem]:
    problems: list[Problem] = []
    if source.kind == "files":
        if not source.paths:
            problems.append((("paths",), "kind files needs at least one path or pattern"))
        for key in ("name", "config", "revision", "data_files"):
            if getattr(source, key):
                problems.append(((key,), "belongs to kind hub, not files; leave it out"))
        if source.split != "train":
            problems.append((("split",), "belongs to kind hub, not files; leave it out"))
    else:
        if not source.name:
            problems.append((("name",), "kind hub needs the name of a data set"))
        if source.paths:
            problems.append((("paths",), "belongs to kind files, not hub; leave it out"))
    for index, rule in enumerate(source.filters):
        if rule.min is None and rule.below is None:
            problems.append((("filters", str(index)), "keeps everything; set min, below or both"))
        elif rule.min is not None and rule.below is not None and rule.below <= rule.min:
            problems.append((("filters", str(index), "below"), f"{rule.below} is not above min {rule.min}"))
    return problems
