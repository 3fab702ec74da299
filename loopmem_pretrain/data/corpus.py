"""Streams documents out of raw text, in one fixed order, from any place where an earlier run stopped.

Every document comes with the `Cursor` behind it: reading on from that cursor continues with the next document,
nothing twice and nothing lost. Lines that are not JSON with a text are counted and shown, up to a bound.
"""

import codecs
import glob
import json
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.config.prepare import FilterConfig, SourceConfig
from loopmem_pretrain.data.lines import read_lines
from loopmem_pretrain.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
"""Of files that are read, in small or capital letters."""
LARGEST = 100_000_000
"""Bytes of a document: tokenizing one takes 40 to 120 times its size in memory."""
_SHOWN = 5  # broken lines quoted in messages
_LONGEST = 300  # characters of one of them
_ROWS = 512  # parquet rows decoded at a time


class Cursor(NamedTuple):
    """A place in a source: what was read is everything before it."""

    file: int = 0
    """Index of the file."""
    offset: int = 0
    """Byte (of the uncompressed text) or, for parquet and hub, row at which the next document begins."""
    line: int = 0
    """Lines (or rows) of the file before that place."""
    kept: int = 0
    """Documents yielded so far, for max_documents."""
    stored: int = 0
    """Bytes of the stored file before that place, for progress; approximate inside compressed files."""
    state: str = ""
    """hub: the state of the `datasets` stream, as JSON."""


class Document(NamedTuple):
    """One text, UTF-8 encoded, and the place behind it."""

    text: bytes
    after: Cursor


@dataclass
class Tally:
    """Counts of one reading; goes on from where an earlier run's counts stopped."""

    max_broken_lines: int
    documents_read: int = 0
    broken_lines: int = 0
    empty_documents: int = 0
    filtered_documents: int = 0
    broken_examples: list[str] = field(default_factory=list)

    def broken(self, place: str, reason: str) -> None:
        """Count a broken line.

        Raises:
            DataError: there are more than max_broken_lines.
        """
        self.broken_lines += 1
        if len(self.broken_examples) < _SHOWN:
            said = f"{place}: {reason}".encode(errors="backslashreplace").decode()  # half a surrogate pair is no text
            self.broken_examples.append(said[:_LONGEST])
        if self.broken_lines > self.max_broken_lines:
            raise DataError(
                f"{self.broken_lines:,} broken lines, and max_broken_lines is {self.max_broken_lines:,}; "
                f"the first of them:{quoted(self.broken_examples)}",
                "mend the files or text_field, or raise max_broken_lines and run the same command again",
            )


def quoted(broken_examples: Sequence[str]) -> str:
    """Broken lines as the end of a message, one below the other."""
    return "".join(f"\n  {example}" for example in broken_examples)


def find_files(source: SourceConfig) -> list[Path]:
    """The files of a source in reading order: by pattern, then by name.

    Raises:
        DataError: a pattern matches nothing; a file is empty or of an unknown type; all such problems at once.
    """
    files: dict[Path, None] = {}
    identities: dict[tuple[int, int], Path] = {}
    problems: list[str] = []
    for pattern in source.paths:
        path = Path(pattern).expanduser()
        is_name = os.path.lexists(path)  # a file may have brackets in its name
        matches = [path] if is_name else sorted(map(Path, glob.glob(str(path), recursive=True)))
        unlisted = [] if is_name else _cannot_be_listed(path)
        problems += unlisted
        if not matches and not unlisted:
            problems.append(f"{pattern}: no such file (looked from {Path.cwd()})")
        for match in matches:
            if not os.access(match, os.F_OK):
                problems.append(f"{match}: a link to a file that is not there")
            elif match.is_dir():
                if pattern == str(match) or not glob.has_magic(pattern):
                    problems.append(f"{match}: is a folder; write a pattern such as {match}/*.jsonl")
            elif not match.name.lower().endswith(SUFFIXES):
                problems.append(f"{match}: unknown type; read are {', '.join(SUFFIXES)}")
            elif match.stat().st_size == 0:
                problems.append(f"{match}: empty, 0 bytes")
            elif (
                match.name.lower().endswith(".txt")
                and source.document_separator == "file"
                and match.stat().st_size > LARGEST
            ):
                problems.append(
                    f"{match}: one document of {match.stat().st_size:,} bytes, and the largest has {LARGEST:,}; "
                    "document_separator: blank_line cuts it"
                )
            elif source.filters and match.name.lower().endswith(".txt"):
                problems.append(f"{match}: filters compare fields of a record, and a .txt has none")
            elif not _is_unicode(str(match)):
                problems.append(f"{str(match)!a}: a name that is not UTF-8, which the manifest cannot hold")
            else:
                found = match.stat()
                other = identities.setdefault((found.st_dev, found.st_ino), match)
                if other != match:
                    problems.append(f"{match}: the same file as {other}, it would be read twice")
                files[match] = None
    if not files and not problems:
        problems.append(f"{', '.join(source.paths)}: only folders match; write a pattern such as FOLDER/*.jsonl")
    if problems:
        raise DataError(
            "cannot read the sources as written\n  " + "\n  ".join(problems),
            "correct sources.paths, or remove or mend these files",
        )
    return list(files)


def _cannot_be_listed(pattern: Path) -> list[str]:
    """Folders in which the pattern may match and that cannot be looked into: `glob` passes over them in silence."""
    magic = next((index for index, part in enumerate(pattern.parts) if glob.has_magic(part)), None)
    if magic is None:
        return []
    deepest = None if "**" in pattern.parts else len(pattern.parts) - 1
    problems: list[str] = []

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            problems.append(f"{error.filename}: cannot be listed: {error.strerror}")

    for folder, folders, _ in os.walk(Path(*pattern.parts[:magic]), onerror=note):
        if deepest is not None and len(Path(folder).parts) >= deepest:
            folders.clear()
    return problems


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps bytes of a name that are not UTF-8 as half surrogates
        return False
    return True


def iter_documents(
    source: SourceConfig,
    tally: Tally | None = None,
    start: Cursor | None = None,
    files: list[Path] | None = None,
) -> Iterator[Document]:
    """Stream the documents of one source that pass its filters.

    Args:
        source: what to read.
        tally: counts to go on with; by default fresh ones that allow no broken line.
        start: where to go on; by default the beginning.
        files: result of `find_files`, if it is at hand.

    Raises:
        DataError: no file, an unreadable, binary or damaged file, a missing column, too many broken lines, or a hub
            data set that cannot be reached.
    """
    tally = Tally(0) if tally is None else tally
    start = Cursor() if start is None else start
    if source.max_documents is not None and start.kept >= source.max_documents:
        return
    if source.kind == "hub":
        from loopmem_pretrain.data.hub import hub_rows

        rows = hub_rows(source, start)
    else:
        rows = _file_rows(source, tally, start, find_files(source) if files is None else files)
    kept = start.kept
    try:
        for row in rows:
            text = _keep(source, row, tally)
            if text is None:
                continue
            kept += 1
            yield Document(text, row.after._replace(kept=kept))
            if kept == source.max_documents:
                return
    finally:
        rows.close()  # a half-read parquet stream of `datasets` hangs the process at exit unless it is closed


class Row(NamedTuple):
    """What a reader found: a record with fields, or a text itself; `place` names it in messages."""

    record: dict[str, Any] | str
    place: str
    after: Cursor


def _keep(source: SourceConfig, row: Row, tally: Tally) -> bytes | None:
    text: Any = row.record
    if isinstance(row.record, dict):
        text = _field(row.record, source.text_field)
        if not isinstance(text, str):
            known = ", ".join(map(str, list(row.record)[:12])) or "none"
            what = f"field {source.text_field!r} is {type(text).__name__}, not text"
            tally.broken(row.place, what if text is not None else f"no text in {source.text_field!r}; fields: {known}")
            return None
        for rule in source.filters:
            number = _field(row.record, rule.field)
            if isinstance(number, bool) or not isinstance(number, int | float):
                tally.broken(row.place, f"filter field {rule.field!r} is {number!r}, not a number")
                return None
            if not _passes(rule, number):
                tally.documents_read += 1
                tally.filtered_documents += 1
                return None
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        tally.broken(row.place, f"not valid Unicode at character {error.start}: {error.reason}")
        return None
    if len(encoded) > LARGEST:
        tally.broken(row.place, f"a document of {len(encoded):,} bytes, and the largest has {LARGEST:,}")
        return None
    tally.documents_read += 1
    if not text.strip():
        tally.empty_documents += 1
        return None
    return encoded  # type: ignore[no-any-return]


def _field(record: dict[str, Any], name: str) -> Any:
    """The value of a field; a name that is not there as written is taken as a dotted path."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _passes(rule: FilterConfig, number: float) -> bool:
    return (rule.min is None or number >= rule.min) and (rule.below is None or number < rule.below)


def _file_rows(source: SourceConfig, tally: Tally, start: Cursor, files: list[Path]) -> Generator[Row]:
    for index in range(start.file, len(files)):
        path, begin = files[index], start if index == start.file else Cursor(file=index)
        try:
            if path.suffix.lower() == ".parquet":
                yield from _parquet_rows(source, path, begin, tally)
            elif path.suffix.lower() == ".txt":
                yield from _text_rows(source, path, begin)
            else:
                yield from _json_rows(path, begin, tally)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror or error}", "check the file, its disk and its permissions"
            ) from error


def _json_rows(path: Path, begin: Cursor, tally: Tally) -> Generator[Row]:
    with read_lines(path, begin.offset) as stream:
        offset, number = begin.offset, begin.line
        for line in stream:
            offset, number = offset + len(line), number + 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            place = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                tally.broken(place, f"not JSON: {error}")
                continue
            if not isinstance(record, dict):
                tally.broken(place, f"a JSON {type(record).__name__}, not an object with fields")
                continue
            yield Row(record, place, Cursor(begin.file, offset, number, stored=stream.stored))


def _text_rows(source: SourceConfig, path: Path, begin: Cursor) -> Generator[Row]:
    if begin.offset >= path.stat().st_size:
        return
    with read_lines(path, begin.offset) as stream:
        offset, number = begin.offset, begin.line
        first, block = number + 1, []
        for line in stream:
            offset, number = offset + len(line), number + 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if source.document_separator == "file" or not line.isspace():
                block.append(line)
                continue
            if block:
                text = _decode(b"".join(block).rstrip(b"\r\n"), path, first)
                yield Row(text, f"{path}:{first}", Cursor(begin.file, offset, number, stored=offset))
            first, block = number + 1, []
        if block:
            joined = b"".join(block)
            text = _decode(joined if source.document_separator == "file" else joined.rstrip(b"\r\n"), path, first)
            yield Row(text, f"{path}:{first}", Cursor(begin.file, offset, number, stored=offset))


def _decode(text: bytes, path: Path, line: int) -> str:
    if b"\0" in text:
        raise DataError(
            f"{path}:{line + text[: text.index(0)].count(10)}: binary: there is a NUL byte",
            "remove the file or mend it",
        )
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        where = line + text.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{where}: not UTF-8 text: byte 0x{text[error.start]:02x}", "convert the file to UTF-8 or remove it"
        ) from None


def _parquet_rows(source: SourceConfig, path: Path, begin: Cursor, tally: Tally) -> Generator[Row]:
    import pyarrow
    import pyarrow.parquet

    wanted = [source.text_field, *(rule.field for rule in source.filters)]
    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            missing = sorted({name.split(".")[0] for name in wanted if name not in columns} - set(columns))
            if missing:
                raise DataError(
                    f"{path}: no column {', '.join(missing)}; columns: {', '.join(columns)}",
                    "set text_field and filters of the source, or --text-field of eval, to columns of the file",
                )
            groups, row = range(table.metadata.num_row_groups), 0
            for group in groups:
                count = table.metadata.row_group(group).num_rows
                if row + count <= begin.offset:
                    row += count
                    continue
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=list(dict.fromkeys(wanted))):
                    if row + len(batch) <= begin.offset:
                        row += len(batch)
                        continue
                    for record in _records(batch):
                        row += 1
                        if record is None and row > begin.offset:
                            tally.broken(f"{path}: row {row}", "not UTF-8 text")
                        elif record is not None and row > begin.offset:
                            stored = size * row // max(1, table.metadata.num_rows)
                            yield Row(record, f"{path}: row {row}", Cursor(begin.file, row, row, stored=stored))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged or no parquet file: {error}", "copy or download the file again") from error


def _records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one whose text is not UTF-8, which parquet does not look at."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
