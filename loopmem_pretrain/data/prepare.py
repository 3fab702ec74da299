"""Raw text to token shards, in several processes, resumable after a kill at any moment.

One process reads the sources in order and cuts the stream into batches; the pool tokenizes batches; the results are
appended to the shards in reading order. A batch depends only on the place where it begins, and shards are closed only
at the end of a batch, so the bytes of the shards depend neither on the number of processes nor on interruptions.

    sources -> documents -> batches -> pool -> shards, journal -> manifest.json (last)
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.data.corpus import Cursor, Tally, iter_documents, quoted
from loopmem_pretrain.data.files import Progress, silent
from loopmem_pretrain.data.journal import Entry, Journal, folder_lock
from loopmem_pretrain.data.manifest import (
    MANIFEST_NAME,
    Counts,
    Manifest,
    Shard,
    Split,
    SplitName,
    TokenizerRecord,
    load_manifest,
    require_files,
    token_dtype,
    verify_shards,
    write_manifest,
)
from loopmem_pretrain.data.pool import WorkerDied
from loopmem_pretrain.data.recipe import (
    begin_or_continue,
    check_complete,
    refuse_changed_sources,
    refuse_foreign_folder,
    source_files,
    source_records,
)
from loopmem_pretrain.data.shards import ShardWriter, remove_unlisted
from loopmem_pretrain.data.tokenizer import JSON_NAME, MODEL_NAME, Tokenizer, copy_tokenizer
from loopmem_pretrain.data.train_tokenizer import ensure_tokenizer
from loopmem_pretrain.data.workers import Task, Tokens, start_pool, tokenize_batch
from loopmem_pretrain.errors import DataError, EnvironmentFault
from loopmem_pretrain.words import counted

_BATCH_BYTES = 1 << 20  # of text in a batch: large against a hand-over between processes, small against a usual shard
_LEAST_BYTES = 1 << 14  # of text in a batch of small shards
_IN_FLIGHT = 3  # batches a process has waiting or finished, so that none stands idle behind a slow one
_TOKENIZER_FOLDER = "tokenizer"
USUAL_LENGTH = 4096
"""Tokens of a sample in most recipes; a validation split must hold one sample at least."""
_SPLITS: tuple[SplitName, ...] = ("train", "validation")


class Batch(NamedTuple):
    """Documents in reading order, and the state of the reading behind the last of them."""

    texts: list[bytes]
    source: int
    after: Cursor
    counts: dict[str, Any]


def prepare(config: PrepareConfig, progress: Progress = silent) -> Manifest:
    """Make `config.output_dir` a folder of token shards, or go on where an earlier run stopped.

    A folder that is complete with the same recipe is left as it is. A tokenizer that does not exist yet is trained
    if `config.tokenizer.train` says how.

    Args:
        config: a validated recipe (see `prepare_problems`).
        progress: called as (done bytes, total bytes or None, info) with info["stage"] one of `train tokenizer`,
            `hash sources`, `tokenize`, `complete`; while tokenizing with documents, tokens, shards, broken_lines, and
            at the end with `already` (the folder was complete before) and `broken_examples`. Done and total count
            bytes of the stored source files; total is None when a hub data set, whose size is unknown, is read.

    Raises:
        DataError: sources or tokenizer missing or damaged, another recipe in the folder, no documents.
        EnvironmentFault: disk full, no permission, the folder is in use, a worker process was killed.
    """
    folder = Path(config.output_dir).expanduser()
    refuse_foreign_folder(folder, config.tokenizer.path)
    with folder_lock(folder):
        if (folder / MANIFEST_NAME).exists():
            return _complete(config, folder, progress)
        files = source_files(config)
        tokenizer = ensure_tokenizer(config, progress)
        journal = Journal(folder)
        task = Task(
            tokenizer_file=str(tokenizer.file.resolve()),
            tokenizer_sha256=tokenizer.sha256,
            eos_token=config.tokenizer.eos_token,
            append_eos=config.append_eos,
            dtype=token_dtype(tokenizer.vocab_size),
            validation_fraction=config.validation_fraction,
        )
        pool = start_pool(num_processes(config), task)
        try:
            found = begin_or_continue(config, journal, files, tokenizer, pool, progress)
            copy_tokenizer(tokenizer, folder / _TOKENIZER_FOLDER)
            run = _Run(config, folder, journal, files, tokenizer, task, progress)
            run.tokenize(pool)
            refuse_changed_sources(found)
            return run.finish()
        except WorkerDied as error:
            raise EnvironmentFault(
                "a tokenizing process was killed, most often because memory ran out",
                "run the same command again, it continues; with a smaller num_processes if it happens again: a "
                "document takes 40 to 120 times its size in memory",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Run:
    """One stretch of work on a folder, from the journal's last entry to the manifest."""

    def __init__(
        self,
        config: PrepareConfig,
        folder: Path,
        journal: Journal,
        files: list[list[Path]],
        tokenizer: Tokenizer,
        task: Task,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.journal, self.files = config, folder, journal, files
        self.tokenizer, self.task, self.progress = tokenizer, task, progress
        remove_unlisted(folder, self._shards())
        require_files(folder, self._shards())
        self.documents = self.tokens = self.closed = 0
        """In closed shards, and how many these are."""
        for entry in journal.entries:
            self._count(entry.shards)
        last = journal.entries[-1] if journal.entries else None
        self.source = last.source if last else 0
        self.cursor = Cursor(*last.cursor) if last else Cursor()
        self.tally = Tally(config.max_broken_lines)
        if last:
            self.tally.documents_read, self.tally.broken_lines = last.documents_read, last.broken_lines
            self.tally.empty_documents, self.tally.filtered_documents = last.empty_documents, last.filtered_documents
            self.tally.broken_examples = list(last.broken_examples)
        self.writers = {
            split: ShardWriter(folder, split, task.dtype, sum(split in entry.shards for entry in journal.entries))
            for split in _SPLITS
        }
        # Bytes of the stored files before each file, source by source, and behind the last of them.
        self.before = [[0, *accumulate(path.stat().st_size for path in paths)] for paths in files]
        known = all(source.kind == "files" for source in config.sources)
        self.total = sum(sizes[-1] for sizes in self.before) if known else None

    def tokenize(self, pool: Executor) -> None:
        """All that is left, up to the journal's last entry."""
        limit = _IN_FLIGHT * num_processes(self.config)
        pending: deque[tuple[Batch, Future[dict[SplitName, Tokens]]]] = deque()
        for batch in self._batches():
            pending.append((batch, pool.submit(tokenize_batch, batch.texts)))
            if len(pending) >= limit:
                self._absorb(*pending.popleft())
        while pending:
            self._absorb(*pending.popleft())
        entries = self.journal.entries
        if not entries or entries[-1].source < len(self.files) or any(w.documents for w in self.writers.values()):
            self._commit(len(self.files), Cursor(), self._counts())

    def _batches(self) -> Iterator[Batch]:
        most = min(_BATCH_BYTES, max(_LEAST_BYTES, self.config.shard_tokens))  # a shard is closed between batches
        for index in range(self.source, len(self.config.sources)):
            start = self.cursor if index == self.source else Cursor()
            texts: list[bytes] = []
            size = 0
            for document in iter_documents(self.config.sources[index], self.tally, start, self.files[index]):
                texts.append(document.text)
                size += len(document.text)
                if size >= most:
                    yield Batch(texts, index, document.after, self._counts())
                    texts, size = [], 0
            if texts:  # the last one of a source; what followed it in the source was broken, empty or filtered
                yield Batch(texts, index + 1, Cursor(), self._counts())

    def _counts(self) -> dict[str, Any]:
        values = dict(vars(self.tally))
        del values["max_broken_lines"]
        return {**values, "broken_examples": tuple(self.tally.broken_examples)}

    def _absorb(self, batch: Batch, future: "Future[dict[SplitName, Tokens]]") -> None:
        result = future.result()
        for split, tokens in result.items():
            if tokens.lengths:
                self.writers[split].add(tokens)
        if any(writer.tokens >= self.config.shard_tokens for writer in self.writers.values()):
            self._commit(batch.source, batch.after, batch.counts)
        self._say(batch)

    def _commit(self, source: int, cursor: Cursor, counts: dict[str, Any]) -> None:
        """Close the shards of both splits together: then one place in the sources is behind all of them."""
        text_bytes = {split: writer.text_bytes for split, writer in self.writers.items() if writer.documents}
        shards = {split: shard for split, writer in self.writers.items() if (shard := writer.close())}
        self.journal.append(Entry(shards=shards, text_bytes=text_bytes, source=source, cursor=(*cursor,), **counts))
        self._count(shards)

    def _count(self, shards: Mapping[SplitName, Shard]) -> None:
        self.documents += sum(shard.documents for shard in shards.values())
        self.tokens += sum(shard.tokens for shard in shards.values())
        self.closed += len(shards)

    def _shards(self, split: SplitName | None = None) -> list[Shard]:
        return [
            shard for entry in self.journal.entries for name, shard in entry.shards.items() if split in (None, name)
        ]

    def _say(self, batch: Batch) -> None:
        done, position = sum(sizes[-1] for sizes in self.before[: batch.source]), batch.after
        if batch.source < len(self.before):
            done += self.before[batch.source][min(position.file, len(self.before[batch.source]) - 1)] + position.stored
        writers = self.writers.values()
        info = {
            "stage": "tokenize",
            "documents": self.documents + sum(writer.documents for writer in writers),
            "tokens": self.tokens + sum(writer.tokens for writer in writers),
            "shards": self.closed,
            "broken_lines": batch.counts["broken_lines"],
        }
        self.progress(done, self.total, info)

    def finish(self) -> Manifest:
        """The manifest, which makes the folder complete."""
        splits: dict[SplitName, Split] = {}
        for name in _SPLITS:
            shards = self._shards(name)
            splits[name] = Split(
                documents=sum(shard.documents for shard in shards),
                tokens=sum(shard.tokens for shard in shards),
                text_bytes=sum(entry.text_bytes.get(name, 0) for entry in self.journal.entries),
                shards=tuple(shards),
            )
        last = self.journal.entries[-1]
        kept = sum(split.documents for split in splits.values())
        if not splits["train"].documents:
            raise DataError(
                f"no document is left to train on: {last.documents_read:,} read, {last.empty_documents:,} empty, "
                f"{last.filtered_documents:,} filtered, {last.broken_lines:,} broken lines, "
                f"{kept:,} held out for validation{quoted(last.broken_examples)}",
                f"check sources, their text_field and filters, and validation_fraction, then delete {self.folder} and "
                "run again",
            )
        assert self.journal.header is not None
        manifest = Manifest(
            tokenizer=_tokenizer_record(self.tokenizer),
            dtype=self.task.dtype,
            splits=splits,
            source=tuple(source_records(self.config, self.journal.header)),
            license="; ".join(dict.fromkeys(source.license for source in self.config.sources)),
            counts=Counts(
                documents_read=last.documents_read,
                broken_lines=last.broken_lines,
                empty_documents=last.documents_read - last.filtered_documents - kept,  # or without a single token
                filtered_documents=last.filtered_documents,
                documents_kept=kept,
            ),
            recipe=self.config.model_dump(mode="json"),
        )
        verify_shards(self.folder, manifest, hashes=False)
        write_manifest(self.folder, manifest)
        self.journal.remove()
        _say_complete(manifest, self.progress, already=False, broken_examples=last.broken_examples)
        return manifest


def num_processes(config: PrepareConfig) -> int:
    """Processes that tokenize: as configured, or every core this process may use."""
    return config.num_processes or len(os.sched_getaffinity(0))


def _complete(config: PrepareConfig, folder: Path, progress: Progress) -> Manifest:
    manifest = load_manifest(folder)
    check_complete(config, manifest, folder)
    verify_shards(folder, manifest, hashes=False)
    Journal(folder).remove()  # left over if an earlier run was killed right after it wrote the manifest
    _say_complete(manifest, progress, already=True, broken_examples=())
    return manifest


def _tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    name = MODEL_NAME if tokenizer.kind == "sentencepiece" else JSON_NAME
    return TokenizerRecord(
        kind=tokenizer.kind,
        file=f"{_TOKENIZER_FOLDER}/{name}",
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
    )


def validation_warning(manifest: Manifest, fraction: float) -> str:
    """Why training with samples of usual lengths would refuse the validation split, and what to do; else empty."""
    held_out, tokens = manifest.splits["validation"], sum(split.tokens for split in manifest.splits.values())
    needed = USUAL_LENGTH + 1
    if held_out.tokens >= needed:
        return ""
    said = f"the validation split has {counted(held_out.tokens, 'token')} in {counted(held_out.documents, 'document')}"
    if not held_out.documents:
        said = f"validation_fraction {fraction:g} held no document out for validation"
    wanted = 2 * needed / tokens  # a hash chooses the documents, so the share is about right only
    advice = f"validation_fraction: {wanted:.1g} gives more" if wanted < 0.5 else "give it more text"
    refused = "training will refuse this folder"
    if held_out.documents:
        refused += f" where a sample is longer, such as data.seq_length {USUAL_LENGTH:,}"
    return f"{said}; {refused}: {advice}, in another output_dir"


def _say_complete(manifest: Manifest, progress: Progress, **extra: Any) -> None:
    total = sum(source.bytes or 0 for source in manifest.source)
    info = {
        "stage": "complete",
        "documents": manifest.counts.documents_kept,
        "tokens": sum(split.tokens for split in manifest.splits.values()),
        "shards": sum(len(split.shards) for split in manifest.splits.values()),
        "broken_lines": manifest.counts.broken_lines,
    }
    progress(total, total, {**info, **extra})
