"""The exported tokenizer on much real text, and what a copied one leaves behind."""

import importlib
import json
import sysconfig
from pathlib import Path

from transformers import AutoTokenizer

from loopmem_pretrain.config.prepare import TrainTokenizerConfig
from loopmem_pretrain.data.tokenizer import load_tokenizer, train_sentencepiece
from loopmem_pretrain.hf.tokenizer import check_parity, to_huggingface
from tests.unit.hf.conftest import TEXTS


def real_lines(count: int) -> list[str]:
    """Different lines of English and of code, as every Python brings them: its reference manual and its library."""
    topics = importlib.import_module("pydoc_data.topics").topics
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [*topics.values(), *(path.read_text(encoding="utf-8", errors="replace") for path in library)]
    lines = list(dict.fromkeys(line for text in texts for line in text.splitlines() if line.strip()))
    return lines[:count]


def test_ten_thousand_lines(tmp_path):
    lines = real_lines(10_000)
    assert len(lines) == 10_000
    trained = train_sentencepiece(iter(lines[::4]), tmp_path / "trained", TrainTokenizerConfig(vocab_size=4000))
    to_huggingface(trained, tmp_path / "hf")
    assert check_parity(trained, tmp_path / "hf", lines) == []
    assert check_parity(trained, tmp_path / "hf", ["\n".join(lines[start : start + 50]) for start in (0, 5000)]) == []


def test_defaults_of_an_exported_tokenizer(tokenizer_path, tokenizer, tmp_path):
    to_huggingface(tokenizer_path, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert loaded.is_fast and loaded.chat_template is None and loaded.padding_side == "left"
    special = loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.pad_token_id
    assert special == (tokenizer.eos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id)
    ids = loaded("</s> is text")["input_ids"]
    assert not set(special) & set(ids) and loaded.decode(ids) == "</s> is text"


def test_a_copied_tokenizer_adds_nothing(tmp_path):
    """One as chat models have it: marks at the ends, truncation, a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    chat = Tokenizer(models.BPE())
    chat.pre_tokenizer, chat.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    chat.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    begin = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    chat.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    chat.enable_truncation(8)
    (tmp_path / "chat").mkdir()
    chat.save(str(tmp_path / "chat/tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": "{{ messages }}", "add_bos_token": True}
    (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps(names))

    to_huggingface(tmp_path / "chat", tmp_path / "hf")
    texts = [*TEXTS, "x" * 50, "<|user|>"]
    assert check_parity(tmp_path / "chat", tmp_path / "hf", texts) == []
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert loaded.chat_template is None and (loaded.bos_token_id, loaded.eos_token_id) == (1, 1)
    assert load_tokenizer(tmp_path / "hf").encode(TEXTS[0]) == load_tokenizer(tmp_path / "chat").encode(TEXTS[0])
