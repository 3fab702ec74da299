"""Text comes back from prepared data as it was, and losses of the tokenizer are told."""

import json

import pytest

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.data.prepare import prepare
from loopmem_pretrain.data.workers import is_validation
from loopmem_pretrain.errors import DataError
from loopmem_pretrain.eval.documents import prepared_domains, text_domains

TEXTS = ["the of and </s> to", "gro\u00df \U0001f98a\n\nthe end\n", " a  b "]

FRACTION = 0.99


def prepared(folder, tokenizer, texts, append_eos=True):
    """A folder whose validation split holds all of `texts`, and whose train split one other."""
    assert all(is_validation(text.encode(), FRACTION) for text in texts)
    other = next(str(number) for number in range(9999) if not is_validation(str(number).encode(), FRACTION))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, other]))
    recipe = {
        "output_dir": str(folder / "tokens"),
        "sources": [{"paths": [str(folder / "text.jsonl")], "origin": "generated", "license": "none"}],
        "tokenizer": {"path": str(tokenizer)},
        "validation_fraction": FRACTION,
        "append_eos": append_eos,
        "num_processes": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    prepare(load_config(PrepareConfig, folder / "recipe.yaml"))
    return str(folder / "tokens")


@pytest.mark.parametrize("append_eos", [True, False])
def test_prepared_text_is_the_text(tmp_path, sentences, caplog, append_eos):
    (domain,) = prepared_domains([prepared(tmp_path, sentences / "tokenizer", TEXTS, append_eos)])
    assert [text.decode() for text in domain.texts] == TEXTS
    assert not caplog.records


@pytest.mark.parametrize(("most", "kept"), [(1, [1]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])])
def test_some_documents_come_from_all_over_the_split(tmp_path, sentences, caplog, most, kept):
    """Not the first ones, which are of the first source; nothing is said of a loss where not all are read."""
    (domain,) = prepared_domains([prepared(tmp_path, sentences / "tokenizer", TEXTS)], most)
    assert [text.decode() for text in domain.texts] == [TEXTS[number] for number in kept]
    assert domain.of == 3 and not caplog.records


def test_bytes_that_the_tokenizer_loses(tmp_path, sentences, caplog):
    """U+2581, three bytes, is sentencepiece's own space and comes back as one."""
    (domain,) = prepared_domains([prepared(tmp_path, sentences / "tokenizer", ["a\u2581b"])])
    assert list(domain.texts) == [b"a b"]
    assert "was made from 5 bytes of text and decodes to 3" in caplog.text


@pytest.mark.parametrize("name", ["b.jsonl", "b.parquet"])
def test_a_field_of_another_name(tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    rows = [{"body": text} for text in TEXTS]
    if name == "b.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    (domain,) = text_domains([str(tmp_path / name)], "body")
    assert [text.decode() for text in domain.texts] == TEXTS
    (domain,) = text_domains([str(tmp_path / name)])
    with pytest.raises(DataError) as caught:
        list(domain.texts)
    assert "--text-field" in caught.value.fix and "max_broken_lines" not in str(caught.value)


def test_files(tmp_path):
    """A .txt file is one document; names are no patterns."""
    (tmp_path / "a[1].txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    one, many = text_domains([str(tmp_path / "a[1].txt"), str(tmp_path / "b.jsonl")])
    assert list(one.texts) == [b"one\n\ntwo\n"]
    assert [text.decode() for text in many.texts] == TEXTS
