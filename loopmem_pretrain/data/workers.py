"""The processes that tokenize: a batch of texts goes in, arrays of token ids come out, split by split.

Only light imports here: every worker starts as a fresh interpreter.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from loopmem_pretrain.data.manifest import DTypeName, SplitName
from loopmem_pretrain.data.pool import WorkerPool
from loopmem_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from loopmem_pretrain.errors import DataError


class Task(NamedTuple):
    """What every batch of a run has in common."""

    tokenizer_file: str
    tokenizer_sha256: str
    """Of what the manifest will name."""
    eos_token: str | None
    append_eos: bool
    dtype: DTypeName
    validation_fraction: float


class Tokens(NamedTuple):
    """Documents of one split: their ids one after the other, and where each ends."""

    ids: np.ndarray[Any, Any]
    """All ids, [sum of lengths], in the shard's dtype."""
    lengths: list[int]
    """Tokens of each document."""
    text_bytes: int
    """UTF-8 bytes of their text."""


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: a property of its text alone."""
    hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return hashed < fraction * 2**64


def tokenize(texts: list[bytes], tokenizer: Tokenizer, task: Task) -> dict[SplitName, Tokens]:
    """Tokenize documents, keeping their order within each split; a document that gives no token is left out."""
    parts: dict[SplitName, list[bytes]] = {"train": [], "validation": []}
    for text in texts:
        parts["validation" if is_validation(text, task.validation_fraction) else "train"].append(text)
    result: dict[SplitName, Tokens] = {}
    for split, part in parts.items():
        if part:
            encoded = tokenizer.encode_batch([text.decode("utf-8") for text in part])
            _refuse_control_tokens(encoded, part, tokenizer)
            size = sum(len(text) for text, document in zip(part, encoded, strict=True) if document)
            documents = [document for document in encoded if document]
            if task.append_eos:
                for document in documents:
                    document.append(tokenizer.eos_id)
            lengths = [len(document) for document in documents]
            ids = np.fromiter(chain.from_iterable(documents), np.dtype(task.dtype), sum(lengths))
            result[split] = Tokens(ids, lengths, size)
    return result


def _refuse_control_tokens(encoded: list[list[int]], texts: list[bytes], tokenizer: Tokenizer) -> None:
    """A document that spells the mark of its end must not end there.

    `encode_special_tokens` keeps spelled marks as text, but not with every tokenizer.json: not where the mark is a
    piece of a Unigram, WordPiece or WordLevel vocabulary, nor where it is an added token that is not called special.
    """
    if tokenizer.kind == "sentencepiece":
        return  # no text becomes a control piece there
    own = (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    marks = {mark for mark in own if mark is not None and mark != tokenizer.unk_id}
    for ids, text in zip(encoded, texts, strict=True):
        found = marks.intersection(ids)
        if found:
            raise DataError(
                f"a document spells a control token, and the tokenizer takes it for one (id {min(found)}): "
                f"{text[:200].decode(errors='replace')!r}",
                "use a tokenizer.json whose control tokens are added tokens with `special: true` of a BPE model, or "
                "one trained here; or take such documents out of the sources",
            )


def start_pool(num_processes: int, task: Task) -> WorkerPool:
    """Processes for `tokenize_batch`; they end when this process ends, however it ends."""
    return WorkerPool(num_processes, _start_worker, (task,))


def tokenize_batch(texts: list[bytes]) -> dict[SplitName, Tokens]:
    """`tokenize` in a worker of `start_pool`."""
    tokenizer, task = _worker
    return tokenize(texts, tokenizer, task)


_worker: tuple[Tokenizer, Task]  # of a worker process, set once when it starts


def _start_worker(task: Task) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    tokenizer = load_tokenizer(task.tokenizer_file, task.eos_token)
    if tokenizer.sha256 != task.tokenizer_sha256:
        raise DataError(
            f"{task.tokenizer_file} has been replaced since the preparation began",
            "leave the tokenizer alone meanwhile; run the same command again, which compares it with what was begun",
        )
    _worker = tokenizer, task


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns as well when the parent was killed and could tell nobody
        os._exit(1)
