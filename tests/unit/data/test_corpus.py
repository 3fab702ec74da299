"""Reading documents: every format, going on from any document, and every kind of bad input."""

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.prepare import FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig, prepare_problems
from loopmem_pretrain.data.corpus import Tally, find_files, iter_documents
from loopmem_pretrain.errors import DataError

RECORDS = [{"text": f"document {i}\nwith \u00e9 and \u65e5\n", "score": i / 10} for i in range(1200)]
TEXTS = [record["text"] for record in RECORDS]


def source(*paths: Path | str, **values: Any) -> SourceConfig:
    return SourceConfig(paths=tuple(map(str, paths)), origin="test", license="CC0", **values)


def texts(config: SourceConfig, **values: Any) -> list[str]:
    return [document.text.decode() for document in iter_documents(config, **values)]


def jsonl(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(config: SourceConfig, tally: Tally | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        list(iter_documents(config, tally))
    assert caught.value.fix
    return caught.value


def make_files(folder: Path) -> dict[str, SourceConfig]:
    table = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(table, folder / "p.parquet", row_group_size=500)
    frames = zstandard.compress(jsonl(RECORDS[:700])) + zstandard.compress(jsonl(RECORDS[700:]))
    return {
        "jsonl": source(write(folder / "a.jsonl", jsonl(RECORDS))),
        "gz": source(write(folder / "b.jsonl.gz", gzip.compress(jsonl(RECORDS)))),
        "zst": source(write(folder / "c.jsonl.zst", frames)),
        "parquet": source(folder / "p.parquet"),
        "hub": SourceConfig(
            kind="hub", name="json", data_files=(str(folder / "a.jsonl"),), origin="test", license="CC0"
        ),
    }


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "hub"])
def test_reads_and_continues_after_any_document(tmp_path: Path, kind: str) -> None:
    config = make_files(tmp_path)[kind]
    documents = list(iter_documents(config))
    assert [document.text.decode() for document in documents] == TEXTS
    for stop in (0, 1, 499, 500, 700, 1199):
        assert texts(config, start=documents[stop].after) == TEXTS[stop + 1 :]


def test_retries_of_the_hub_are_not_told_twice_each(tmp_path: Path) -> None:
    assert texts(make_files(tmp_path)["hub"]) == TEXTS
    assert not logging.getLogger("huggingface_hub.utils").isEnabledFor(logging.WARNING)


def test_files_are_read_in_order_and_continued_across(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        write(tmp_path / f"{index}.jsonl", jsonl(RECORDS[index * 3 : index * 3 + 3]))
    config = source(tmp_path / "*.jsonl")
    documents = list(iter_documents(config))
    assert [document.text.decode() for document in documents] == TEXTS[:9]
    assert texts(config, start=documents[4].after) == TEXTS[5:9]


def test_the_recipe_of_a_local_folder_reads_every_kind_it_promises(tmp_path: Path, monkeypatch: Any) -> None:
    """Also below folders, and with suffixes in capitals."""
    recipe = Path("data_prep/local_folder.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    below = tmp_path / "data" / "local" / "text" / "below"
    below.mkdir(parents=True)
    for config in make_files(tmp_path).values():
        for path in map(Path, config.paths):
            name, suffix = path.name.split(".", 1)
            (below.parent / path.name).write_bytes(path.read_bytes())
            (below / f"{name}.{suffix.upper()}").write_bytes(path.read_bytes())
    write(below / "A.TXT", b"one\n\ntwo")
    (local,) = load_config(PrepareConfig, recipe).sources
    assert sorted(texts(local)) == sorted(["one\n\ntwo", *TEXTS * 8])
    write(below / "notes.pdf", b"%PDF")
    with pytest.raises(DataError, match=r"notes\.pdf: unknown type; read are \.jsonl"):
        find_files(local)


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\r\n")
    documents = list(iter_documents(source(path)))
    assert [document.text for document in documents] == [b"one\n\ntwo\r\n"]
    assert texts(source(path), start=documents[0].after) == []


def test_txt_documents_between_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\n\none\nmore\n \n\r\ntwo\r\n\nthree")
    config = source(path, document_separator="blank_line")
    documents = list(iter_documents(config))
    assert [document.text for document in documents] == [b"one\nmore", b"two", b"three"]
    assert texts(config, start=documents[0].after) == ["two", "three"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_filter_keeps_min_and_drops_below(tmp_path: Path, kind: str) -> None:
    config = make_files(tmp_path)[kind].model_copy(
        update={"filters": (FilterConfig(field="score", min=3.0, below=3.5),)}
    )
    tally = Tally(0)
    assert texts(config, tally=tally) == TEXTS[30:35]
    assert (tally.documents_read, tally.filtered_documents) == (1200, 1195)


def test_filters_need_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    error = refused(source(path, filters=(FilterConfig(field="score", min=3),)))
    assert f"{path}: filters compare fields of a record, and a .txt has none" in error.problem


def test_a_name_with_brackets(tmp_path: Path) -> None:
    path = write(tmp_path / "x[1].jsonl", jsonl(RECORDS[:3]))
    assert texts(source(path)) == TEXTS[:3]


def test_nested_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"data": {"body": "x"}, "meta": {"score": 1}}]))
    config = source(path, text_field="data.body", filters=(FilterConfig(field="meta.score", min=1),))
    assert texts(config) == ["x"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_max_documents_counts_kept_ones_over_a_restart(tmp_path: Path, kind: str) -> None:
    config = make_files(tmp_path)[kind].model_copy(update={"max_documents": 10})
    documents = list(iter_documents(config))
    assert [document.text.decode() for document in documents] == TEXTS[:10]
    assert texts(config, start=documents[3].after) == TEXTS[4:10]
    assert texts(config, start=documents[9].after) == []


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(RECORDS[:1]) + b"\n  \n" + jsonl(RECORDS[1:2]))
    assert texts(source(path)) == TEXTS[:2]


@pytest.mark.parametrize("separator", ["file", "blank_line"])
def test_byte_order_mark_of_a_text(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n\ntwo")
    config = source(path, document_separator=separator)
    first, *_ = documents = list(iter_documents(config))
    assert first.text.startswith(b"one")
    assert [d.text for d in iter_documents(config, start=first.after)] == [d.text for d in documents[1:]]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    tally = Tally(0)
    assert texts(
        source(write(tmp_path / "a.jsonl", jsonl([{"text": ""}, {"text": " \n"}, {"text": "x"}]))), tally=tally
    ) == ["x"]
    assert (tally.documents_read, tally.empty_documents) == (3, 2)


BROKEN = {
    "cut off": b'{"text": "cut o\n',
    "not an object": b"[1, 2]\n",
    "no text field": b'{"body": "x"}\n',
    "text is null": b'{"text": null}\n',
    "text is a number": b'{"text": 3}\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "too deep": b'{"text": ' + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines_are_counted_up_to_the_bound(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(RECORDS[:1]) + BROKEN[kind] + jsonl(RECORDS[1:2]))
    tally = Tally(1)
    assert texts(source(path), tally=tally) == TEXTS[:2]
    assert tally.broken_lines == 1
    assert tally.broken_examples[0].startswith(f"{path}:2: ")
    assert f"{path}:2: " in refused(source(path)).problem


def test_the_message_shows_the_first_broken_lines_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"x\n" * 50)
    problem = refused(source(path), Tally(20)).problem
    assert "21 broken lines, and max_broken_lines is 20" in problem
    assert problem.count("a.jsonl:") == 5


def test_a_missing_filter_field_is_a_broken_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "x"}]))
    assert (
        "filter field 'score' is None" in refused(source(path, filters=(FilterConfig(field="score", min=1),))).problem
    )


def test_no_file_matches(tmp_path: Path) -> None:
    assert "no such file" in refused(source(tmp_path / "*.jsonl")).problem


def test_a_folder_instead_of_files(tmp_path: Path) -> None:
    assert "is a folder" in refused(source(tmp_path)).problem


def test_unknown_suffix(tmp_path: Path) -> None:
    assert "unknown type" in refused(source(write(tmp_path / "a.csv", b"x"))).problem


def test_empty_file(tmp_path: Path) -> None:
    assert "empty, 0 bytes" in refused(source(write(tmp_path / "a.jsonl", b""))).problem


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "a link to a file that is not there" in refused(source(tmp_path / "*.jsonl")).problem


def test_all_bad_files_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b"")
    write(tmp_path / "b.csv", b"x")
    problem = refused(source(tmp_path / "*", tmp_path / "none*")).problem
    assert "a.jsonl" in problem
    assert "b.csv" in problem
    assert "none*" in problem


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(RECORDS[:1]))
    assert len(find_files(source(tmp_path / "a.jsonl", tmp_path / "*.jsonl"))) == 1


def test_binary_file(tmp_path: Path) -> None:
    assert "binary" in refused(source(write(tmp_path / "a.jsonl", b"\x7fELF\0\0\0"))).problem


def test_utf16_file(tmp_path: Path) -> None:
    assert "UTF-16" in refused(source(write(tmp_path / "a.txt", "text".encode("utf-16")))).problem


def test_txt_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"fine\nfine\n\xe9t\xe9\n")
    assert f"{path}:3: not UTF-8" in refused(source(path)).problem


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_file_cut_off(tmp_path: Path, kind: str) -> None:
    config = make_files(tmp_path)[kind]
    path = Path(config.paths[0])
    write(path, path.read_bytes()[:-20])
    assert "damaged or cut off" in refused(config).problem


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_not_compressed_at_all(tmp_path: Path, kind: str) -> None:
    config = make_files(tmp_path)[kind]
    write(Path(config.paths[0]), jsonl(RECORDS))
    assert "damaged or cut off" in refused(config).problem


def test_parquet_without_the_column(tmp_path: Path) -> None:
    config = make_files(tmp_path)["parquet"].model_copy(update={"text_field": "content"})
    assert "no column content; columns: text, score" in refused(config).problem


def test_parquet_cut_off(tmp_path: Path) -> None:
    config = make_files(tmp_path)["parquet"]
    write(Path(config.paths[0]), Path(config.paths[0]).read_bytes()[:-100])
    assert "p.parquet" in refused(config).problem


def test_hub_data_set_that_cannot_be_reached() -> None:
    config = SourceConfig(kind="hub", name="nobody/nothing", origin="test", license="CC0")
    error = refused(config)
    assert "nobody/nothing/train cannot be opened" in error.problem
    assert "kind: files" in error.fix


def test_rules_between_fields() -> None:
    config = PrepareConfig(
        output_dir="x",
        sources=(
            SourceConfig(name="x", origin="o", license="l"),
            SourceConfig(kind="hub", paths=("x",), origin="o", license="l"),
            source("a", filters=(FilterConfig(field="s"), FilterConfig(field="s", min=2, below=1))),
        ),
        tokenizer=TokenizerConfig(path="x"),
    )
    assert [".".join(key) for key, _ in prepare_problems(config)] == [
        "sources.0.paths",
        "sources.0.name",
        "sources.1.name",
        "sources.1.paths",
        "sources.2.filters.0",
        "sources.2.filters.1.below",
    ]


# ---- what would be lost, or read twice, in silence ---------------------------------------------------------------


def test_a_file_under_two_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-0.jsonl", jsonl([{"text": "a"}]))
    (tmp_path / "latest.jsonl").symlink_to("part-0.jsonl")
    said = str(refused(source(tmp_path / "*.jsonl")))
    assert "part-0.jsonl: the same file as" in said and "it would be read twice" in said


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("good", "secret"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", jsonl([{"text": "a"}]))
    listed = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    for pattern in ("**/*.jsonl", "*/*.jsonl"):
        assert f"{tmp_path}/secret: cannot be listed: Permission denied" in str(refused(source(tmp_path / pattern)))
    assert texts(source(tmp_path / "good" / "*.jsonl")) == ["a"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(path).write_bytes(jsonl([{"text": "a"}]))
    assert "a name that is not UTF-8" in str(refused(source(tmp_path / "*.jsonl")))


def test_a_broken_line_that_is_no_text_can_be_written_down(tmp_path: Path) -> None:
    """Half a surrogate pair in a key, which JSON can spell and UTF-8 cannot."""
    path = write(tmp_path / "a.jsonl", b'{"\\ud800": 1}\n{"text": "a"}\n')
    tally = Tally(1)
    assert [document.text for document in iter_documents(source(path), tally)] == [b"a"]
    assert tally.broken_examples[0].encode().endswith(b"fields: \\ud800")


def test_parquet_text_that_is_not_utf8_is_a_broken_line(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    tally = Tally(1)
    assert [document.text for document in iter_documents(source(path), tally)] == [b"a", b"c"]
    assert tally.broken_examples == [f"{path}: row 2: not UTF-8 text"]
    assert "row 2" in str(refused(source(path)))


def test_zstandard_of_a_long_window_and_of_much_repetition(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    line = jsonl([{"text": "word " * 2000}])
    path = write(tmp_path / "a.jsonl.zst", compressor.compress(line * 2000) + compressor.flush())
    assert path.stat().st_size < 100_000
    assert len(texts(source(path))) == 2000


def test_a_document_that_would_take_all_memory_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Named before it is tokenized; a text file before anything is read."""
    monkeypatch.setattr("loopmem_pretrain.data.corpus.LARGEST", 1000)
    text = write(tmp_path / "a.txt", b"word " * 201)
    assert "document_separator: blank_line cuts it" in str(refused(source(text)))
    assert len(texts(source(text, document_separator="blank_line"), tally=Tally(1))) == 0
    lines = write(tmp_path / "a.jsonl", jsonl([{"text": "a"}, {"text": "word " * 201}]))
    assert f"{lines}:2: a document of 1,005 bytes, and the largest has 1,000" in str(refused(source(lines)))
