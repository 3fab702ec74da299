"""Preparation with tokenizers that were given: other kinds, other ends of documents, texts of which nothing is left."""

# ruff: noqa: F811 - the fixtures that are imported are what tests name
import json
from pathlib import Path

import pytest

from loopmem_pretrain.config.prepare import TokenizerConfig
from loopmem_pretrain.data.prepare import prepare
from loopmem_pretrain.data.tokenizer import load_tokenizer
from loopmem_pretrain.data.workers import Task, is_validation, start_pool, tokenize_batch
from loopmem_pretrain.errors import DataError
from tests.unit.data.test_prepare import (  # noqa: F401 - fixtures
    DOCUMENTS,
    FRACTION,
    corpus,
    interrupt,
    megatron,
    read_split,
    recipe,
    small_batches,
)


def test_a_hugging_face_tokenizer_of_many_tokens(corpus: Path, tmp_path: Path) -> None:
    vocabulary = {f"unused {index}": index for index in range(70_000)}
    for character in set("".join(DOCUMENTS)):
        vocabulary[character] = len(vocabulary)
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    end = {"id": len(vocabulary), "content": "<end>", "special": True}
    content["added_tokens"] = [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), eos_token="<end>")
    manifest = prepare(recipe(corpus, tmp_path / "out", tokenizer=settings, num_processes=2))
    assert (manifest.dtype, manifest.tokenizer.kind) == ("int32", "huggingface")
    documents = read_split(tmp_path / "out", "train")
    expected = [text for text in DOCUMENTS if not is_validation(text.encode(), FRACTION)]
    assert [ids[:-1] for ids in documents] == [[vocabulary[c] for c in text] for text in expected]
    assert {ids[-1] for ids in documents} == {len(vocabulary)}
    assert load_tokenizer(tmp_path / "out/tokenizer").eos_id == len(vocabulary)


def test_documents_of_which_the_tokenizer_keeps_nothing(tmp_path: Path) -> None:
    """sentencepiece's own normalisation drops characters that are no blanks; no bare end mark is left of them."""
    import sentencepiece

    from loopmem_pretrain.eval.documents import prepared_domains

    made = {"model_prefix": str(tmp_path / "spm"), "vocab_size": 340, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), byte_fallback=True, **made)
    texts = [*DOCUMENTS[:100], *("\u200b" * count for count in range(1, 30))]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    wanted = recipe(tmp_path, tmp_path / "out", tokenizer=TokenizerConfig(path=str(tmp_path / "spm.model")))
    manifest = prepare(wanted)
    assert (manifest.counts.documents_kept, manifest.counts.empty_documents) == (100, 29)
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(map(len, DOCUMENTS[:100]))
    (domain,) = prepared_domains([tmp_path / "out"])
    assert all(domain.texts)


def character_tokenizer(folder: Path, end: str) -> TokenizerConfig:
    """A Hugging Face tokenizer of single characters; a file of its own says which token ends a document."""
    folder.mkdir(exist_ok=True)
    vocabulary = {character: index for index, character in enumerate(sorted(set("".join(DOCUMENTS))))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": len(vocabulary) + i, "content": token, **flags} for i, token in enumerate(("<end>", "<stop>"))]
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return TokenizerConfig(path=str(folder))


def test_a_document_that_spells_its_end_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Of a Unigram vocabulary control pieces are found in text, whatever the file calls special."""
    letters = sorted(set("".join(DOCUMENTS)) | set("</s>"))
    vocabulary = [["<unk>", 0.0], ["</s>", -1.0], *([letter, -5.0] for letter in letters)]
    content = {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    assert prepare(recipe(corpus, tmp_path / "out", tokenizer=settings)).tokenizer.eos_id == 1
    (tmp_path / "spelled").mkdir()
    (tmp_path / "spelled" / "0.jsonl").write_text(json.dumps({"text": "a</s>b"}) + "\n")
    with pytest.raises(DataError, match=r"a document spells a control token.*'a</s>b'"):
        prepare(recipe(tmp_path / "spelled", tmp_path / "other", tokenizer=settings))


def test_a_tokenizer_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    """Workers load it later than the manifest's hash is taken."""
    settings = character_tokenizer(tmp_path / "tok", "<end>")
    found = load_tokenizer(settings.path)
    task = Task(str(found.file), found.sha256, None, True, "uint16", FRACTION)
    with found.file.open("a") as file:
        file.write("\n")
    with start_pool(1, task) as pool, pytest.raises(DataError, match="has been replaced since the preparation began"):
        pool.submit(tokenize_batch, [b"a"]).result(60)


def test_another_end_of_documents_is_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    settings = character_tokenizer(tmp_path / "tok", "<end>")
    interrupt(corpus, tmp_path / "out", tokenizer=settings)
    for moment in ("begun", "made"):
        character_tokenizer(tmp_path / "tok", "<stop>")
        with pytest.raises(DataError, match=rf"{moment} from something else(?s:.*)id that ends a document: \d+ -> \d+"):
            prepare(recipe(corpus, tmp_path / "out", tokenizer=settings))
        character_tokenizer(tmp_path / "tok", "<end>")
        prepare(recipe(corpus, tmp_path / "out", tokenizer=settings))


def test_a_refused_tokenizer_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    settings = character_tokenizer(tmp_path / "tok", "<end>")
    interrupt(corpus, tmp_path / "out", tokenizer=settings)
    with pytest.raises(DataError, match="tokenizer's sha256"):
        prepare(recipe(corpus, tmp_path / "out"))
    prepare(recipe(corpus, tmp_path / "out", tokenizer=settings))
    assert load_tokenizer(tmp_path / "out/tokenizer").kind == "huggingface"
