"""Tokenizers: train a lossless sentencepiece model, and load one or a Hugging Face tokenizer behind one protocol.

Raw text is only ever text: `</s>` or `<|endoftext|>` inside a document is spelled out like any other characters and
never becomes a control token, so a document cannot end itself.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from loopmem_pretrain.config.prepare import TrainTokenizerConfig
from loopmem_pretrain.data.files import sha256_file, write_file
from loopmem_pretrain.errors import DataError

MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
JSON_CONFIG_NAME = "tokenizer_config.json"
RECORD_NAME = "training.json"
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
_PIECE_BYTES = 3000  # the trainer skips texts longer than its limit of 4192 bytes, so longer ones are cut
_TRAINING_THREADS = 4  # a constant: sums in another order could give another model


class Tokenizer(Protocol):
    """What the package asks of a tokenizer; ids are 0 ... vocab_size - 1."""

    kind: Literal["sentencepiece", "huggingface"]
    file: Path
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    unk_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without begin or end marks."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on one thread."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids; begin, end and padding ids give nothing."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model file."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self.file = file
        try:
            content = file.read_bytes()
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}", "check tokenizer.path") from error
        except RuntimeError as error:
            raise DataError(
                f"{file} is damaged or no sentencepiece model: {error}", "train or copy the tokenizer again"
            ) from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = int(self.processor.vocab_size())
        eos = _id_or_none(self.processor.eos_id())
        if eos is None:
            raise DataError(f"{file} has no </s> piece to end documents with", "use a model with an eos piece")
        self.eos_id = eos
        self.bos_id = _id_or_none(self.processor.bos_id())
        self.pad_id = _id_or_none(self.processor.pad_id())
        self.unk_id = _id_or_none(self.processor.unk_id())

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without begin or end marks."""
        return self.processor.encode(text)  # type: ignore[no-any-return]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on one thread."""
        return self.processor.encode(texts, num_threads=1)  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; begin, end and padding ids give nothing."""
        return self.processor.decode(ids)  # type: ignore[no-any-return]


class HuggingFaceTokenizer:
    """A `tokenizer.json`; which token ends a document comes from tokenizer_config.json or from the caller."""

    kind: Literal["sentencepiece", "huggingface"] = "huggingface"

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        import tokenizers

        self.file = file
        try:
            content = file.read_bytes()
            self.backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}", "check tokenizer.path") from error
        except Exception as error:  # tokenizers raises plain Exception for whatever it cannot parse
            raise DataError(f"{file} is damaged or no tokenizer.json: {error}", "copy the tokenizer again") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # means: special tokens in raw text are encoded as ordinary text
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        named = _special_tokens(file.with_name(JSON_CONFIG_NAME))
        self.eos_token = eos_token or named.get("eos_token")
        if self.eos_token is None:
            raise DataError(
                f"{file}: nothing says which token ends a document (no eos_token in {JSON_CONFIG_NAME} beside it)",
                "set tokenizer.eos_token, for example '<|endoftext|>' for GPT-2",
            )
        eos = self.backend.token_to_id(self.eos_token)
        if eos is None:
            raise DataError(
                f"{file}: the end-of-document token {self.eos_token!r} is not in its vocabulary",
                "set tokenizer.eos_token to a token of the vocabulary",
            )
        self.eos_id = eos
        self.bos_id, self.pad_id, self.unk_id = (
            self.backend.token_to_id(named[key]) if key in named else None
            for key in ("bos_token", "pad_token", "unk_token")
        )

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without begin or end marks."""
        return self.backend.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on as many threads as TOKENIZERS_PARALLELISM allows."""
        return [encoded.ids for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; begin, end and padding ids give nothing."""
        return self.backend.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer file that `path` (a file, or a folder with one) means; None where there is none."""
    root = Path(path).expanduser()
    if root.is_file():
        return root
    return next((root / name for name in (MODEL_NAME, JSON_NAME) if (root / name).is_file()), None)


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Load a sentencepiece .model, a Hugging Face tokenizer.json, or a folder with one of them.

    Args:
        path: file or folder; in a folder tokenizer.model comes before tokenizer.json.
        eos_token: the token that ends a document, where no tokenizer_config.json names it; a sentencepiece model
            names its own.

    Raises:
        DataError: missing, damaged, without a token that ends documents, or a sentencepiece model with another one.
    """
    file = find_tokenizer(path)
    if file is None:
        raise DataError(
            f"no tokenizer at {path}: neither a file nor a folder with {MODEL_NAME} or {JSON_NAME}",
            "correct tokenizer.path, or train one with `loopmem train-tokenizer`",
        )
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, eos_token)
    tokenizer = SentencePieceTokenizer(file)
    own = tokenizer.processor.id_to_piece(tokenizer.eos_id)
    if eos_token not in (None, own):
        raise DataError(
            f"tokenizer.eos_token is {eos_token!r}, and {file}, a sentencepiece model, ends documents with {own!r}",
            "leave out tokenizer.eos_token, or name a Hugging Face tokenizer",
        )
    return tokenizer


def train_sentencepiece(texts: Iterable[str], out_dir: str | Path, config: TrainTokenizerConfig) -> Path:
    """Train a sentencepiece model and write OUT_DIR/tokenizer.model (OUT_DIR itself where it ends in .model).

    Decoding gives back every text exactly, but for one character: U+2581, which sentencepiece itself uses for a
    space, comes back as a space. The same texts and config give the same bytes.

    Returns:
        Path of the model file, which is whole: it is written last, in one step.

    Raises:
        DataError: no text, or too little of it for vocab_size.
        EnvironmentFault: disk full, no permission.
    """
    import sentencepiece

    target = Path(out_dir).expanduser()
    file = target if target.suffix == ".model" else target / MODEL_NAME
    taken = _Taken(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(taken),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if taken.failure is not None:  # reading the texts failed; the trainer only passes its message on
            raise taken.failure from None
        too_small, most = "required_chars" in str(error), re.search(r"value <= (\d+)", str(error))
        why = "" if most else f": {error}"
        lower = (
            f"set tokenizer.train.vocab_size to at most {int(most[1]):,}"
            if most
            else "lower tokenizer.train.vocab_size"
        )
        raise DataError(
            f"sentencepiece cannot make {config.vocab_size:,} pieces from {taken.size:,} bytes of text{why}",
            "raise tokenizer.train.vocab_size, or lower character_coverage"
            if too_small
            else f"{lower}, or give it more text",
        ) from error
    record = {"config": config.model_dump(mode="json"), "text_bytes": taken.size, "text_sha256": taken.hash.hexdigest()}
    write_file(record_of(file), (json.dumps(record, indent=1) + "\n").encode())
    write_file(file, model.getvalue())
    return file


def record_of(file: Path) -> Path:
    """Where it is written down how a model file was trained."""
    return file.with_name(RECORD_NAME if file.name == MODEL_NAME else f"{file.stem}.{RECORD_NAME}")


def trained_differently(file: Path, config: TrainTokenizerConfig) -> list[str]:
    """Fields in which the record beside a trained model differs from `config`; empty without a record."""
    record = record_of(file)
    if not record.is_file():
        return []
    try:
        old = json.loads(record.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record} is damaged: {error}", f"remove {file} and {record}, then train again") from error
    new = config.model_dump(mode="json")
    return [f"tokenizer.train.{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value]


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Copy the tokenizer's files into `folder`, from where `load_tokenizer` reads it alike; returns the file name."""
    name = MODEL_NAME if tokenizer.kind == "sentencepiece" else JSON_NAME
    if tokenizer.file.resolve() == (folder / name).resolve():
        return name
    if isinstance(tokenizer, HuggingFaceTokenizer):
        settings = tokenizer.file.with_name(JSON_CONFIG_NAME)
        values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        values["eos_token"] = tokenizer.eos_token
        write_file(folder / JSON_CONFIG_NAME, (json.dumps(values, indent=1) + "\n").encode())
    write_file(folder / name, tokenizer.file.read_bytes())
    if sha256_file(folder / name) != tokenizer.sha256:
        raise DataError(f"{tokenizer.file} changed while it was copied", "run the same command again")
    return name


class _Taken:
    """Passes texts on in pieces the trainer accepts, cut at line ends or spaces, and remembers what passed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.size = 0
        self.hash = hashlib.sha256()
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                encoded = text.encode("utf-8")
                self.size += len(encoded)
                self.hash.update(encoded + b"\0")
                yield from _pieces(text)
        except BaseException as error:
            self.failure = error
            raise


def _pieces(text: str) -> Iterator[str]:
    begin, limit = 0, _PIECE_BYTES // 4 if not text.isascii() else _PIECE_BYTES
    while begin < len(text):
        end = min(begin + limit, len(text))
        if end < len(text):
            cut = max(text.rfind("\n", begin, end) + 1, text.rfind(" ", begin, end))
            end = cut if cut > begin else end
        yield text[begin:end]
        begin = end


def _id_or_none(value: int) -> int | None:
    return int(value) if value >= 0 else None


def _special_tokens(path: Path) -> dict[str, str]:
    """eos_token and its like from tokenizer_config.json, where a token is a string or an object with `content`."""
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}", "copy the tokenizer again") from error
    found = {}
    for key, value in values.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found
