"""How much of sentencepiece's own speed `loopmem prepare-data` keeps, on the same text, tokenizer and cores.

    python benchmarks/bench_prepare.py runs/demo/data/corpus runs/demo/data/tokenizer --megabytes 200

Alone: N processes hold the text in memory and do nothing but `encode`. Prepared: the whole of `prepare`, from JSON
lines on the disk to shards, hashes and manifest, with the start of the processes. Only the import of megatron-core is
measured apart, since it is the same however long the job. CPU seconds, of all processes, are the number to trust on a
machine that others use too.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loopmem_pretrain.config.prepare import PrepareConfig, SourceConfig, TokenizerConfig
from loopmem_pretrain.data.corpus import iter_documents
from loopmem_pretrain.data.prepare import prepare
from loopmem_pretrain.data.shards import _builder_class
from loopmem_pretrain.data.tokenizer import load_tokenizer


def write_text(corpus: Path, out: Path, size: int) -> int:
    """Repeat the corpus, each round with its number in every document, up to `size` bytes of text."""
    source = SourceConfig(paths=(str(corpus / "*.jsonl"),), origin="benchmark", license="see SOURCES.json")
    documents = [document.text.decode() for document in iter_documents(source)]
    written = number = 0
    with out.open("w", encoding="utf-8") as stream:
        while written < size:
            for text in documents:
                text = f"{number}\n{text}"
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
            number += 1
    return written


def encode_alone(path: Path, tokenizer_path: Path, part: int, parts: int, barrier: Any, results: Any) -> None:
    """Encode every parts-th document, from memory, in batches of 1 MB."""
    source = SourceConfig(paths=(str(path),), origin="benchmark", license="see SOURCES.json")
    batches: list[list[str]] = [[]]
    size = 0
    for index, document in enumerate(iter_documents(source)):
        if index % parts == part:
            batches[-1].append(document.text.decode())
            size += len(document.text)
            if size >= 1 << 20:
                batches.append([])
                size = 0
    tokenizer = load_tokenizer(tokenizer_path)
    barrier.wait()
    begin, cpu, tokens = time.monotonic(), time.process_time(), 0
    for batch in batches:
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
    results.put((begin, time.monotonic(), time.process_time() - cpu, tokens))


def measure_alone(path: Path, tokenizer_path: Path, processes: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and tokens of `processes` processes that only encode."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=encode_alone, args=(path, tokenizer_path, part, processes, barrier, results))
        for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    seconds = max(end for _, end, *_ in found) - min(begin for begin, *_ in found)
    return seconds, sum(cpu for _, _, cpu, _ in found), sum(tokens for *_, tokens in found)


def measure_prepare(path: Path, tokenizer_path: Path, out: Path, processes: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds of all processes, and tokens without ends of documents."""
    config = PrepareConfig(
        output_dir=str(out),
        sources=(SourceConfig(paths=(str(path),), origin="benchmark", license="see SOURCES.json"),),
        tokenizer=TokenizerConfig(path=str(tokenizer_path)),
        num_processes=processes,
        shard_tokens=20_000_000,
    )
    begin, cpu = time.monotonic(), cpu_seconds()
    manifest = prepare(config)
    seconds, cpu = time.monotonic() - begin, cpu_seconds() - cpu
    tokens = sum(split.tokens - split.documents for split in manifest.splits.values())
    return seconds, cpu, tokens


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder of .jsonl files")
    parser.add_argument("tokenizer", type=Path, help="sentencepiece model or its folder")
    parser.add_argument("--megabytes", type=int, default=200, help="text to tokenize")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2, help="each way is measured so often, in turn; the best counts")
    options = parser.parse_args()
    begin = time.monotonic()
    _builder_class()
    importing = time.monotonic() - begin
    alone, prepared = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        size = write_text(options.corpus, path, options.megabytes * 1_000_000)
        for index in range(options.rounds):
            alone.append(measure_alone(path, options.tokenizer, options.processes))
            prepared.append(measure_prepare(path, options.tokenizer, Path(folder) / f"out{index}", options.processes))
    if len({tokens for *_, tokens in [*alone, *prepared]}) != 1:
        raise SystemExit(f"the two ways do not give the same number of tokens: {alone} {prepared}")
    tokens = alone[0][-1]
    print(f"command: python {' '.join(sys.argv)}")
    names = ("sentencepiece", "megatron-core", "numpy", "torch")
    print(f"versions: Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in facts if line.startswith("model name")), "unknown CPU")
    print(f"hardware: {model}, {options.processes} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"text: {size / 1e6:.1f} MB, {tokens:,} tokens, {load_tokenizer(options.tokenizer).vocab_size:,} pieces\n")
    print("| way | seconds | MB/s | M tokens/s | speed | CPU seconds | CPU |\n|---|---|---|---|---|---|---|")
    (best, best_cpu), ours = least(alone), least(prepared)
    for name, (seconds, cpu) in (("sentencepiece alone", (best, best_cpu)), ("prepare", ours)):
        rate = f"{size / 1e6 / seconds:.2f} | {tokens / 1e6 / seconds:.3f} | {best / seconds:.1%}"
        print(f"| {name} | {seconds:.2f} | {rate} | {cpu:.1f} | {cpu / best_cpu:.1%} |")
    print(f"\nimport of megatron-core, before: {importing:.1f} s")
    print(f"every round, seconds: alone {shown(alone)}; prepare {shown(prepared)}")


def least(rounds: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Best seconds and best CPU seconds."""
    return min(seconds for seconds, *_ in rounds), min(cpu for _, cpu, _ in rounds)


def shown(rounds: list[tuple[float, float, int]]) -> str:
    return ", ".join(f"{seconds:.1f}" for seconds, *_ in rounds)


if __name__ == "__main__":
    main()
