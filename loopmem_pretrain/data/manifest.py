"""`manifest.json`: what a folder of token shards holds, from what it was made, and whether it is whole.

It is written last, so a folder with a manifest is complete. Token counts, sizes and hashes in it are what the
reader checks the shards against; docs/data_format.md describes the format for readers outside this package.
"""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.data.files import sha256_file, write_file
from loopmem_pretrain.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT: Final = "loopmem-shards"
VERSION: Final = 1

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Prefix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # one name: cannot leave the folder
SplitName = Literal["train", "validation"]
DTypeName = Literal["uint16", "int32"]


def again(folder: str | Path) -> str:
    """What to do about a folder that is damaged."""
    return f"delete {folder} and prepare it again with `loopmem prepare-data`, or copy it again if it was copied"


def token_dtype(vocab_size: int) -> DTypeName:
    """Megatron's rule: two bytes a token while the vocabulary is below 65,500, else four."""
    return "uint16" if vocab_size < 65500 else "int32"


class TokenizerRecord(Section):
    """The tokenizer the shards were made with."""

    kind: Literal["sentencepiece", "huggingface"]
    """How to load it."""
    file: str = Field(min_length=1)
    """Path of the copy inside the folder, with forward slashes."""
    sha256: Sha256
    """Hash of that file."""
    vocab_size: int = Field(gt=0)
    """Ids are 0 ... vocab_size - 1."""
    bos_id: int | None
    """Beginning of sequence, if the tokenizer has one; not written into shards."""
    eos_id: int = Field(ge=0)
    """Ends every document of a shard (where the recipe says append_eos)."""
    pad_id: int | None
    """Padding, if the tokenizer has it; not written into shards."""
    unk_id: int | None
    """Unknown, if the tokenizer has it."""

    @model_validator(mode="after")
    def _inside(self) -> "TokenizerRecord":
        path = PurePosixPath(self.file)
        if path.is_absolute() or ".." in path.parts or "\\" in self.file:
            raise ValueError(f"file {self.file!r} leads out of the folder")
        return self


class Shard(Section):
    """One pair PREFIX.bin, PREFIX.idx in Megatron's indexed format, one sequence a document."""

    prefix: Prefix
    """File name without suffix."""
    documents: int = Field(gt=0)
    """Documents in it."""
    tokens: int = Field(gt=0)
    """Tokens in it, ends of documents included."""
    bin_bytes: int = Field(gt=0)
    """Size of PREFIX.bin."""
    idx_bytes: int = Field(gt=0)
    """Size of PREFIX.idx."""
    bin_sha256: Sha256
    """Hash of PREFIX.bin."""
    idx_sha256: Sha256
    """Hash of PREFIX.idx."""


class Split(Section):
    """The shards of one split, in order; without shards when the split is empty."""

    documents: Count
    """Documents in all shards."""
    tokens: Count
    """Tokens in all shards, ends of documents included."""
    text_bytes: Count
    """UTF-8 bytes of the text behind the tokens (for bits per byte)."""
    shards: tuple[Shard, ...]
    """The shards."""


class Source(Section):
    """One thing that was read."""

    path: str
    """File as given (or NAME/CONFIG/SPLIT of a hub data set)."""
    bytes: int | None
    """File size; null for a hub data set."""
    sha256: Sha256 | None
    """Hash of the file; null for a hub data set."""
    revision: str | None
    """Commit of a hub data set; null for a file."""
    origin: str
    """Where the text comes from, in the recipe's words."""
    license: str
    """Its licence, in the recipe's words."""


class Counts(Section):
    """What became of the documents that were read."""

    documents_read: Count
    """Documents met, empty and filtered ones included; broken lines are not among them."""
    broken_lines: Count
    """Lines that are not a JSON object with the text field."""
    empty_documents: Count
    """Documents without a visible character, left out."""
    filtered_documents: Count
    """Documents left out by the recipe's filters."""
    documents_kept: Count
    """Documents in the shards."""


class Manifest(Section):
    """Everything in manifest.json."""

    format: Literal["loopmem-shards"] = FORMAT
    """Tells the file from other JSON."""
    version: Literal[1] = VERSION
    """Of the format."""
    tokenizer: TokenizerRecord
    """The tokenizer."""
    dtype: DTypeName
    """Type of a token in the .bin files, little-endian."""
    splits: dict[SplitName, Split]
    """`train` and `validation`, both always present."""
    source: tuple[Source, ...]
    """What was read."""
    license: str
    """Licences of all sources, joined."""
    counts: Counts
    """What became of the documents."""
    recipe: dict[str, Any]
    """The resolved prepare configuration."""

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.dtype != token_dtype(self.tokenizer.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not belong to vocab_size {self.tokenizer.vocab_size}")
        if set(self.splits) != {"train", "validation"}:
            raise ValueError(f"splits are {sorted(self.splits)}, not train and validation")
        prefixes = [shard.prefix for split in self.splits.values() for shard in split.shards]
        if len(set(prefixes)) < len(prefixes):
            raise ValueError("a shard is listed twice")
        item_size = 2 if self.dtype == "uint16" else 4
        for name, split in self.splits.items():
            for total, parts in (
                (split.documents, sum(shard.documents for shard in split.shards)),
                (split.tokens, sum(shard.tokens for shard in split.shards)),
            ):
                if total != parts:
                    raise ValueError(f"splits.{name} says {total:,}, its shards add up to {parts:,}")
            for shard in split.shards:
                if shard.bin_bytes != shard.tokens * item_size:
                    raise ValueError(f"{shard.prefix}: {shard.tokens} tokens do not take {shard.bin_bytes} bytes")
        return self


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check FOLDER/manifest.json (not the shards; see `verify_shards`).

    Raises:
        DataError: missing, not JSON, of another format or version, or contradicting itself; with file, key, value.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not path.parent.is_dir():
            looked = "" if Path(folder).is_absolute() else f" (looked from {Path.cwd()})"
            raise DataError(
                f"{folder}: no such folder{looked}",
                "check the path to the prepared data (of a run: data.datasets in its config.yaml); a relative one "
                "counts from where the command is started",
            ) from None
        raise DataError(
            f"{path} does not exist: the folder is no prepared data set, or preparing it was interrupted",
            "run `loopmem prepare-data` again with the same config (it continues), or correct the path",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", again(folder)) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: damaged or cut off, not valid JSON: {error.msg}", again(folder)
        ) from None
    except (RecursionError, ValueError) as error:  # nested without end, numbers of thousands of digits
        raise DataError(f"{path}: damaged, not valid JSON: {error}", again(folder)) from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: format: {found!r} is not {FORMAT!r}", "point to a folder written by `loopmem prepare-data`"
        )
    if values.get("version") != VERSION:
        raise DataError(
            f"{path}: version: {values.get('version')!r} is not {VERSION}, the version this package reads",
            "prepare the folder again with this version of the package, or install the version that wrote it",
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise DataError(f"{path} is damaged\n  " + "\n  ".join(lines), again(folder)) from None


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write FOLDER/manifest.json whole or not at all.

    Raises:
        EnvironmentFault: disk full, no permission.
    """
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n"
    write_file(Path(folder) / MANIFEST_NAME, text.encode())


def verify_shards(folder: str | Path, manifest: Manifest, hashes: bool) -> None:
    """Check that every file of the manifest is there with its size and, when asked, its hash (reads all bytes).

    The tokenizer's hash, of a small file, is always compared: with another tokenizer ids mean something else.

    Raises:
        DataError: naming every file that is missing or differs, with what was expected and what was found.
    """
    root = Path(folder)
    problems = _file_problems(root / manifest.tokenizer.file, None, manifest.tokenizer.sha256)
    for split in manifest.splits.values():
        problems += _shard_problems(root, split.shards, hashes)
    if problems:
        raise DataError(f"{root} does not hold what its manifest says\n  " + "\n  ".join(problems), again(root))


def require_files(folder: Path, shards: Iterable[Shard]) -> None:
    """Check that the files of finished shards are there with their sizes, before more are added to them.

    Raises:
        DataError: naming every file that is missing or has another size.
    """
    problems = _shard_problems(folder, shards, hashes=False)
    if problems:
        raise DataError(f"{folder} has lost finished shards\n  " + "\n  ".join(problems), again(folder))


def _shard_problems(folder: Path, shards: Iterable[Shard], hashes: bool) -> list[str]:
    problems: list[str] = []
    for shard in shards:
        path = folder / shard.prefix
        problems += _file_problems(Path(f"{path}.bin"), shard.bin_bytes, shard.bin_sha256 if hashes else None)
        problems += _file_problems(Path(f"{path}.idx"), shard.idx_bytes, shard.idx_sha256 if hashes else None)
    return problems


def _file_problems(path: Path, size: int | None, sha256: str | None) -> list[str]:
    """What is wrong with a file; None is not compared."""
    if not path.is_file():
        return [f"{path}: missing"]
    if size is not None and path.stat().st_size != size:
        return [f"{path}: {path.stat().st_size:,} bytes, expected {size:,}"]
    if sha256 is not None and (found := sha256_file(path)) != sha256:
        return [f"{path}: sha256 {found}, expected {sha256}"]
    return []


def _describe(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"{key}: missing"
    if isinstance(detail["input"], dict | list):  # a rule over several values, which its message already shows
        return f"{key}: {detail['msg']}".removeprefix(": ")
    return f"{key}: {detail['msg']} (got {detail['input']!r})"
