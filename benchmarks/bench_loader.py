"""How fast batches come out of prepared shards.

    python benchmarks/bench_loader.py [--data FOLDER] [--seq-length 4096] [--micro-batch-size 8] [--seconds 5]

Without --data it writes 64 M random two-byte tokens (128 MB) into a temporary folder. The shards are in the page cache
in that case: what is measured is this package's own work, not a disk. Prints Markdown.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from loopmem_pretrain.config.data import DataConfig, DatasetConfig
from loopmem_pretrain.data.dataset import BlendedDataset, open_training
from loopmem_pretrain.data.files import sha256_file
from loopmem_pretrain.data.manifest import (
    Counts,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    load_manifest,
    write_manifest,
)
from loopmem_pretrain.data.sampler import train_batches

SHARDS, DOCUMENTS, DOCUMENT_TOKENS, VOCABULARY = 4, 16_000, 1000, 50_304


def write_random_folder(folder: Path) -> None:
    """SHARDS shards of DOCUMENTS documents of DOCUMENT_TOKENS random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random, shards = np.random.default_rng(0), []
    for number in range(SHARDS):
        prefix = folder / f"train-{number:05d}"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        tokens = torch.from_numpy(random.integers(0, VOCABULARY, DOCUMENTS * DOCUMENT_TOKENS))
        for document in tokens.reshape(DOCUMENTS, DOCUMENT_TOKENS):
            builder.add_document(document, [DOCUMENT_TOKENS])
        builder.finalize(f"{prefix}.idx")
        files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        sizes, hashes = [f.stat().st_size for f in files], [sha256_file(f) for f in files]
        shards.append(
            Shard(
                prefix=prefix.name,
                documents=DOCUMENTS,
                tokens=len(tokens),
                bin_bytes=sizes[0],
                idx_bytes=sizes[1],
                bin_sha256=hashes[0],
                idx_sha256=hashes[1],
            )
        )
    (folder / "tokenizer.model").write_bytes(b"none: random tokens")
    documents, total = SHARDS * DOCUMENTS, SHARDS * DOCUMENTS * DOCUMENT_TOKENS
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            kind="sentencepiece",
            file="tokenizer.model",
            sha256=sha256_file(folder / "tokenizer.model"),
            vocab_size=VOCABULARY,
            bos_id=None,
            eos_id=0,
            pad_id=None,
            unk_id=None,
        ),
        dtype="uint16",
        splits={
            "train": Split(documents=documents, tokens=total, text_bytes=0, shards=tuple(shards)),
            "validation": Split(documents=0, tokens=0, text_bytes=0, shards=()),
        },
        source=(),
        license="none: random tokens",
        counts=Counts(
            documents_read=documents, broken_lines=0, empty_documents=0, filtered_documents=0, documents_kept=documents
        ),
        recipe={},
    )
    write_manifest(folder, manifest)


def microseconds(work: Callable[[int], object], seconds: float) -> float:
    """Time of one call of work(0), work(1), ...; the first hundred warm up."""
    for i in range(100):
        work(i)
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for i in range(done, done + 100):
            work(i)
        done += 100
    return elapsed / done * 1e6


def measure(data: BlendedDataset, micro_batch_size: int, num_workers: int, seconds: float) -> float:
    """Microseconds a sample of `train_batches`, its readers started and ahead at the start."""
    batches = train_batches(
        data,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        num_workers=num_workers,
        pin_memory=False,
    )
    return microseconds(lambda _: next(batches), seconds) / micro_batch_size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared folder; default: random tokens")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data or temporary
        if not arguments.data:
            write_random_folder(Path(temporary))
        config = DataConfig(datasets=(DatasetConfig(path=folder),), seq_length=arguments.seq_length)
        vocabulary = load_manifest(folder).tokenizer.vocab_size
        start = time.perf_counter()
        data = open_training(config, seed=42, model_vocab_size=vocabulary)
        opened = time.perf_counter() - start
        rows = [
            ("order: which sample is number i", microseconds(data.locate, arguments.seconds)),
            ("order and reading, int64 [T + 1]", microseconds(data.__getitem__, arguments.seconds)),
        ]
        rows += [
            (
                f"`train_batches`, {workers} reading threads" if workers else "`train_batches`, read when asked for",
                measure(data, arguments.micro_batch_size, workers, arguments.seconds),
            )
            for workers in (0, 1, 2)
        ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "megatron-core"))
    print(f"    {' '.join(['python', *sys.argv])}\n")
    print(f"Python {platform.python_version()}, {packages}; {os.cpu_count()} cores, {_processor()}, {sys.platform}.")
    print(f"{data.describe()['datasets'][0]['tokens']:,} tokens, T = {arguments.seq_length}, ", end="")
    print(f"micro-batch {arguments.micro_batch_size}; opened in {opened:.2f} s.\n")
    print("| what | us a sample | tokens/s |\n|---|---:|---:|")
    for name, spent in rows:
        print(f"| {name} | {spent:.1f} | {arguments.seq_length / spent:.1f} M |")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
