"""Tokenizers: lossless, deterministic, deaf to control tokens in text, and equal in their Hugging Face form."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from loopmem_pretrain.config.prepare import PrepareConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from loopmem_pretrain.data.tokenizer import copy_tokenizer, load_tokenizer, train_sentencepiece
from loopmem_pretrain.data.train_tokenizer import sample_texts, train_tokenizer
from loopmem_pretrain.errors import ConfigError, ConversionError, DataError, EnvironmentFault
from loopmem_pretrain.hf.tokenizer import check_parity, to_huggingface

SYLLABLES = ["the", "sta", "te", "un", "ion", "mem", "ber", "ly", "co", "ng", "re", "ss", "yes", "no", "per", "haps"]
MARKS = ["1,234", "said:", "<b>", "/s\n\n", "", "indent\tx", "=", "2", "*", "17."]
HARD = [
    "a\nb\n",
    "\n",
    "  two  spaces ",
    "\r\n\ttab",
    "nul \0 inside",
    "\u65e5\u672c \U0001f389 \u00e9\u0301 \u00a0",
    "1234567890 12.5",
    "</s> <s> <unk> <pad> <0x0A>",
    "\ufeffmark",
    " " * 200,
    "\n" * 50,
    "",
]


def texts(count: int = 300, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randrange(1, 5))) for _ in range(200)] + MARKS * 3
    return [" ".join(draw.choices(words, k=draw.randrange(1, 120))) for _ in range(count)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    train_sentencepiece(texts(), folder, TrainTokenizerConfig(vocab_size=400, model_type=request.param))
    return folder


def test_ids_and_size_are_where_the_config_says(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert (tokenizer.vocab_size, tokenizer.kind) == (400, "sentencepiece")


def test_round_trip_is_exact(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    for text in HARD + texts(50, seed=1):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_exception_is_the_space_mark(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_digits_stand_alone(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x1234")][-4:] == ["1", "2", "3", "4"]


def test_text_cannot_spell_a_control_token(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert not {0, 1, 2, 3} & set(tokenizer.encode("</s><s><unk><pad>"))


def test_batch_equals_single(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]


def test_training_twice_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    config = TrainTokenizerConfig.model_validate_json(
        json.dumps(json.loads((trained / "training.json").read_text())["config"])
    )
    again = train_sentencepiece(texts(), tmp_path, config)
    assert again.read_bytes() == (trained / "tokenizer.model").read_bytes()


def test_hugging_face_form_is_equal(trained: Path, tmp_path: Path) -> None:
    to_huggingface(trained, tmp_path)
    runs = [mark * n for mark in " .-=a1" for n in range(1, 40)]
    assert check_parity(trained, tmp_path, HARD[:-2] + texts(200, seed=2) + runs) == []


def test_hugging_face_form_loads_with_its_special_tokens(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    to_huggingface(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 2, 2, 3)
    assert len(loaded) == 400
    assert loaded.decode(loaded("  it 's , fine .\n")["input_ids"]) == "  it 's , fine .\n"


def test_parity_check_finds_a_difference(trained: Path, tmp_path: Path) -> None:
    to_huggingface(trained, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    assert check_parity(trained, tmp_path, ["lower", "UPPER case"]) == ["UPPER case"]


def test_parity_check_finds_a_text_that_does_not_come_back(trained: Path, tmp_path: Path) -> None:
    """Equal ids are half of it: what a model writes would lose its spaces."""
    to_huggingface(trained, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["decoder"]["decoders"][0]
    path.write_text(json.dumps(content))
    assert check_parity(trained, tmp_path, ["lower", "two words"]) == ["two words"]


def test_a_model_that_normalises_is_not_converted(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_prefix=str(tmp_path / "m"), vocab_size=100, minloglevel=2
    )
    with pytest.raises(ConversionError, match=r"byte_fallback is off; text is normalised .*; add_dummy_prefix is on"):
        to_huggingface(tmp_path / "m.model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def gpt_like(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer.json, as GPT-2's, with a control token and truncation left switched on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.enable_truncation(8)
    (tmp_path / "gpt").mkdir()
    tokenizer.save(str(tmp_path / "gpt/tokenizer.json"))
    return tmp_path / "gpt"


def test_tokenizer_json_round_trip_without_injection_or_truncation(gpt_like: Path) -> None:
    tokenizer = load_tokenizer(gpt_like, "<|endoftext|>")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert (tokenizer.kind, tokenizer.eos_id) == ("huggingface", 0)
    assert tokenizer.eos_id not in ids
    for text in HARD + texts(20, seed=3):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]


def test_tokenizer_json_without_a_named_end_token(gpt_like: Path) -> None:
    with pytest.raises(DataError, match="nothing says which token ends a document") as caught:
        load_tokenizer(gpt_like)
    assert "tokenizer.eos_token" in caught.value.fix


def test_tokenizer_json_with_an_unknown_end_token(gpt_like: Path) -> None:
    with pytest.raises(DataError, match="not in its vocabulary"):
        load_tokenizer(gpt_like, "<eos>")


def test_end_token_from_tokenizer_config(gpt_like: Path) -> None:
    (gpt_like / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert load_tokenizer(gpt_like).eos_id == 0


def test_a_copy_knows_its_end_token(gpt_like: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt_like, "<|endoftext|>")
    copy_tokenizer(tokenizer, tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.eos_id, again.sha256) == (tokenizer.eos_id, tokenizer.sha256)


def test_a_sentencepiece_model_names_its_own_end_token(trained: Path) -> None:
    assert load_tokenizer(trained, "</s>").eos_id == 2
    with pytest.raises(DataError, match=r"eos_token is '<\|im_end\|>', and .* ends documents with '</s>'"):
        load_tokenizer(trained, "<|im_end|>")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x0a\xff half of it")
    with pytest.raises(DataError, match="is damaged or no"):
        load_tokenizer(tmp_path)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="from 5 bytes of text") as caught:
        train_sentencepiece(["hello"], tmp_path, TrainTokenizerConfig(vocab_size=8192))
    most = re.search(r"set tokenizer.train.vocab_size to at most (\d+), or give it more text", caught.value.fix)
    assert most and "INTERNAL" not in caught.value.problem
    assert not list(tmp_path.iterdir())
    train_sentencepiece(["hello"], tmp_path, TrainTokenizerConfig(vocab_size=int(most[1])))


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="from 0 bytes of text"):
        train_sentencepiece([], tmp_path, TrainTokenizerConfig(vocab_size=300))


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_sentencepiece(
            ["".join(map(chr, range(0x4E00, 0x4F00)))] * 3, tmp_path, TrainTokenizerConfig(vocab_size=300)
        )
    assert "raise tokenizer.train.vocab_size" in caught.value.fix


def test_an_error_of_the_texts_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="broken line"):
        train_sentencepiece(_failing(), tmp_path, TrainTokenizerConfig(vocab_size=300))


def _failing():  # type: ignore[no-untyped-def]
    yield "some text"
    raise DataError("a broken line", "mend it")


def recipe(tmp_path: Path, **train: object) -> PrepareConfig:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "B " + text}) + "\n" for text in texts(100, seed=5)))
    return PrepareConfig(
        output_dir=str(tmp_path / "out"),
        sources=(SourceConfig(paths=(str(tmp_path / "*.jsonl"),), origin="test", license="CC0"),),
        tokenizer=TokenizerConfig(
            path=str(tmp_path / "tok"), train=TrainTokenizerConfig.model_validate({"vocab_size": 400, **train})
        ),
        validation_fraction=0.1,
    )


def test_train_tokenizer_trains_once(tmp_path: Path) -> None:
    config, stages = recipe(tmp_path), []
    path = train_tokenizer(config, lambda done, total, info: stages.append((done, total, dict(info))))
    assert path == tmp_path / "tok/tokenizer.model"
    assert stages[-1][0] == stages[-1][1] == sum(path.stat().st_size for path in tmp_path.glob("*.jsonl"))
    before = path.stat().st_mtime_ns
    assert train_tokenizer(config, lambda done, total, info: stages.append((done, total, dict(info)))) == path
    assert stages[-1][2] == {"stage": "train tokenizer", "already": True}
    assert path.stat().st_mtime_ns == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    train_tokenizer(recipe(tmp_path))
    with pytest.raises(DataError, match=r"tokenizer.train.vocab_size: 400 -> 500"):
        train_tokenizer(recipe(tmp_path, vocab_size=500))


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    def named(name: str, vocab_size: int) -> PrepareConfig:
        config = recipe(tmp_path, vocab_size=vocab_size)
        path = str(tmp_path / "tok" / name)
        return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": path})})

    a, b = named("a.model", 400), named("b.model", 420)
    train_tokenizer(a), train_tokenizer(b)
    assert [train_tokenizer(config).name for config in (a, b)] == ["a.model", "b.model"]
    with pytest.raises(DataError, match=r"vocab_size: 400 -> 420") as caught:
        train_tokenizer(named("a.model", 420))
    assert f"delete {tmp_path / 'tok/a.model'}" in caught.value.fix


def test_a_foreign_tokenizer_is_not_taken_for_the_trained_one(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    train_tokenizer(config)
    (tmp_path / "tok/training.json").unlink()
    with pytest.raises(DataError, match="nothing says that it was trained from this recipe"):
        train_tokenizer(config)


def test_nothing_to_train(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer.train: required"):
        train_tokenizer(config.model_copy(update={"tokenizer": TokenizerConfig(path="x")}))


def test_the_sample_is_bounded_and_takes_from_every_file(tmp_path: Path) -> None:
    config = recipe(tmp_path, sample_bytes=20_000)
    assert config.tokenizer.train is not None
    sample = list(sample_texts(config, config.tokenizer.train))
    assert 20_000 <= sum(map(len, sample)) < 22_000
    share = sum(len(text) for text in sample if text.startswith("B ")) / sum(map(len, sample))
    assert 0.15 < share < 0.4


def test_documents_behind_max_documents_are_not_trained_on(tmp_path: Path) -> None:
    """Of all files together, not of each."""
    config = recipe(tmp_path)
    assert config.tokenizer.train is not None
    limited = config.sources[0].model_copy(update={"max_documents": 310})
    sample = list(sample_texts(config.model_copy(update={"sources": (limited,)}), config.tokenizer.train))
    assert 1 <= sum(text.startswith("B ") for text in sample) <= 10
    assert len(sample) <= 310


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    assert config.tokenizer.train is not None
    assert 300 < len(list(sample_texts(config, config.tokenizer.train))) < 390


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="not allowed"):
        train_sentencepiece(texts(), tmp_path / "x", TrainTokenizerConfig(vocab_size=400))
