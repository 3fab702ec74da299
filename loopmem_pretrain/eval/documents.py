"""Held-out text by domain: files of text, or the validation split of prepared data, as whole documents.

Both give text. A prepared split is decoded with its own tokenizer, and whoever scores it encodes it again: so any model
can be scored on any prepared data, and bytes are counted in text, not in tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from loopmem_pretrain.config.prepare import SourceConfig
from loopmem_pretrain.data.corpus import SUFFIXES, Tally, iter_documents
from loopmem_pretrain.data.indexed import TokenStream
from loopmem_pretrain.data.tokenizer import load_tokenizer
from loopmem_pretrain.errors import DataError

log = logging.getLogger(__name__)


class Domain(NamedTuple):
    """Documents that are measured together."""

    name: str
    """The path it is read from."""
    texts: Iterator[bytes]
    """Its documents, UTF-8; they can be read once. Reading raises DataError for a damaged file."""
    of: int | None = None
    """How many there are, those not among `texts` included; None where only reading tells."""


def text_domains(paths: Sequence[str], text_field: str = "text") -> list[Domain]:
    """One domain a file. A .txt file is one document; others are read as `loopmem prepare-data` reads them,
    from `text_field`, and no line may be broken.

    Raises:
        DataError: a file is missing, empty or of an unknown type; all such files at once.
    """
    problems = []
    for path in map(Path, paths):
        if path.is_dir():
            problems.append(f"{path}: a folder; name its files, or prepared data by --data")
        elif not path.is_file():
            problems.append(f"{path}: no such file")
        elif not path.name.lower().endswith(SUFFIXES):
            problems.append(f"{path}: unknown type; read are {', '.join(SUFFIXES)}")
        elif path.stat().st_size == 0:
            problems.append(f"{path}: empty, 0 bytes")
    if problems:
        raise DataError("cannot read the text\n  " + "\n  ".join(problems), "correct the paths after --text")
    return [Domain(path, _read_file(Path(path), text_field)) for path in paths]


def prepared_domains(folders: Sequence[str], max_documents: int | None = None) -> list[Domain]:
    """One domain a folder of prepared data: its validation split, or `max_documents` of it.

    These stand at equal distances: a split has its sources one after the other, so the first ones are of the first.

    Raises:
        DataError: a folder is missing or damaged, or holds no validation split.
    """
    domains = []
    for folder in folders:
        stream = TokenStream(folder, "validation")
        of = stream.manifest.splits["validation"].documents
        domains.append(Domain(folder, _read_prepared(stream, _spread(of, max_documents)), of))
    return domains


def _spread(of: int, most: int | None) -> set[int]:
    """Which of so many documents are taken: each from the middle of an equal share."""
    count = of if most is None else min(most, of)
    return {(2 * number + 1) * of // (2 * count) for number in range(count)}


class _NoneBroken(Tally):
    """What is measured is all of the text, or the numbers would be of another."""

    def broken(self, place: str, reason: str) -> None:
        raise DataError(f"{place}: {reason}", "name the field that holds the text by --text-field, or mend the file")


def _read_file(path: Path, text_field: str) -> Iterator[bytes]:
    source = SourceConfig(paths=(str(path),), text_field=text_field, origin="evaluation", license="evaluation")
    for document in iter_documents(source, _NoneBroken(0), files=[path]):
        yield document.text


def _read_prepared(stream: TokenStream, chosen: set[int]) -> Iterator[bytes]:
    tokenizer = load_tokenizer(stream.folder / stream.manifest.tokenizer.file)
    decoded, split = 0, stream.manifest.splits["validation"]
    for number, tokens in enumerate(stream.documents()):
        if number not in chosen:
            continue
        # The mark at its end decodes to nothing.
        text = tokenizer.decode(tokens.tolist()).encode("utf-8")
        decoded += len(text)
        if text:  # folders of earlier versions have documents of which the tokenizer kept nothing
            yield text
    if len(chosen) == split.documents and decoded != split.text_bytes:
        log.warning(
            "%s: the validation split was made from %s bytes of text and decodes to %s: its tokenizer loses some of it",
            stream.folder,
            f"{split.text_bytes:,}",
            f"{decoded:,}",
        )
