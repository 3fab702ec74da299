"""Training speed on one NVIDIA GPU: tokens/s, TFLOP/s, MFU and memory of a config, through DeepSpeed as in training.

    python benchmarks/bench_gpu.py                                        M_-3 of the paper, bf16, T = 4096
    python benchmarks/bench_gpu.py --config configs/paper/l3.yaml configs/paper/l3_if.yaml --micro-batch-sizes 2
    python benchmarks/bench_gpu.py --micro-batch-sizes 4 --compile loop --profile
    python benchmarks/bench_gpu.py --device cpu --tiny                    tests this script; its numbers mean nothing

Every combination of config, micro-batch size, compilation and recomputation runs in a process of its own, so that one
that runs out of memory, or fails, costs one line of the table. Tokens are random. FLOPs are those of model/flops.py:
forward x 3, recomputation not counted. A step is --accumulation micro-batches and one AdamW update; its time is the
median. Prints Markdown; exits with 1 if a combination failed other than for want of memory.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import header

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also where the package is not installed
RESULT = "RESULT "  # what the line begins with that hands a child's numbers to its parent
OUT_OF_MEMORY = "out of memory"
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paper = ROOT / "configs" / "paper" / "m_minus_3.yaml"
    parser.add_argument("--config", nargs="+", default=[str(paper)], help="run configs; their data is not read")
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--compile", nargs="+", choices=("none", "loop"), default=["none", "loop"])
    parser.add_argument("--activation-checkpointing", nargs="+", choices=("none", "loop"), default=["none"])
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches a step")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before that: compilation, allocation")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of the GPU where it is not known")
    parser.add_argument("--timeout", type=float, default=900, help="seconds one combination may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and T = 64")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that took longest in one step")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child's combination, as JSON
    options = parser.parse_args()
    if min(options.steps, options.warmup, options.accumulation, *options.micro_batch_sizes) < 1:
        parser.error("--steps, --warmup, --accumulation and --micro-batch-sizes must be at least 1")
    return options


def overrides(options: argparse.Namespace, job: dict[str, Any]) -> list[str]:
    """What is changed in the config for one combination."""
    values = [
        f"training.device={options.device}",
        f"training.micro_batch_size={job['micro_batch_size']}",
        f"training.global_batch_size={job['micro_batch_size'] * options.accumulation}",
        f"training.compile={job['compile']}",
        f"training.activation_checkpointing={job['checkpointing']}",
        f"parallel.zero_stage={options.zero_stage}",
    ]
    if options.peak_tflops:
        values.append(f"logging.peak_tflops={options.peak_tflops}")
    if options.tiny:
        values += ["data.seq_length=64", *(f"model.{key}={value}" for key, value in TINY.items())]
    return values


def measure(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Train one combination in this process.

    Raises:
        LoopMemError: the config is wrong, or the machine does not offer what it asks for.
        RuntimeError: the loss is not finite, so the numbers would not be those of training.
    """
    import torch

    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig, run_problems
    from loopmem_pretrain.model.flops import training_flops_per_token
    from loopmem_pretrain.parallel.topology import Topology
    from loopmem_pretrain.training.engine import TrainingEngine, init_distributed
    from loopmem_pretrain.training.hardware import choose_device, peak_flops

    config = load_config(RunConfig, job["config"], overrides(options, job), rules=run_problems)
    device = choose_device(config, local_rank=0)
    init_distributed(device, config.parallel)
    engine = TrainingEngine(config, device, Topology.join(config.parallel))
    batches = random_batches(config.model.vocab_size, job["micro_batch_size"], config.data.seq_length, device)
    cuda = device.type == "cuda"
    losses: list[float] = []

    def step() -> float:
        start = time.perf_counter()
        losses.append(float(engine.train_batch(batches, step=len(losses))))
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    for _ in range(options.warmup - 1):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(options.steps)]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses {losses}: not training")
    if options.profile:
        profile(step, cuda)

    peak, source = peak_flops(config, device)
    tokens = config.training.global_batch_size * config.data.seq_length
    rate = tokens / statistics.median(seconds)
    flops = rate * training_flops_per_token(config.model, config.data.seq_length, config.training.micro_batch_size)
    return {
        "tokens_per_second": rate,
        "tflops": flops / 1e12,
        "mfu": flops / peak,
        "peak": f"{peak / 1e12:.4g} TFLOP/s ({source})",
        "step_ms": statistics.median(seconds) * 1e3,
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "first_step_s": first,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "losses": [losses[0], losses[-1]],
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cuda": torch.version.cuda,
    }


def random_batches(vocab_size: int, micro_batch_size: int, seq_length: int, device: Any) -> Iterator[Any]:
    """Eight random micro-batches, again and again, in pinned memory as the trainer's loader gives them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        tokens = torch.randint(0, vocab_size, (micro_batch_size, seq_length + 1), generator=generator)
        pair = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        made.append(tuple(part.pin_memory() for part in pair) if device.type == "cuda" else pair)
    return itertools.cycle(made)


def profile(step: Any, cuda: bool) -> None:
    """The 25 operations that took longest in one step, on standard error."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=activities) as recorded:
        step()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    sys.stderr.write(recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70) + "\n")


def run_child(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Measure one combination in a process of its own; {"failed": why} where there are no numbers."""
    lonely = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # one process, whoever started it
    environment = {key: value for key, value in os.environ.items() if key not in lonely}
    environment["DS_ACCELERATOR"] = options.device
    command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {options.timeout:.0f} s"}
    if options.profile:
        sys.stderr.write(done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return dict(json.loads(line.removeprefix(RESULT)))
    if "OutOfMemoryError" in done.stderr:
        return {"failed": OUT_OF_MEMORY}
    sys.stderr.write(done.stderr)
    reason = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "see above")
    return {"failed": f"exit code {done.returncode}: {reason.strip()}"}


def row(options: argparse.Namespace, job: dict[str, Any], result: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{Path(job['config']).stem}{', tiny' if options.tiny else ''}"
    start = f"| {name} | {job['micro_batch_size']} | {job['compile']} | {job['checkpointing']} |"
    if "failed" in result:
        return f"{start} {result['failed']} | | | | | | |"
    memory = "" if result["allocated_gib"] is None else f"{result['allocated_gib']:.1f} / {result['reserved_gib']:.1f}"
    return (
        f"{start} {result['tokens_per_second']:,.0f} | {result['tflops']:.4g} | {result['mfu']:.1%} | {memory} | "
        f"{result['step_ms']:.1f} | {result['spread']:.1%} | {result['first_step_s']:.1f} |"
    )


def refuse_without_gpu(device: str) -> None:
    """Raises: SystemExit (6, as the package's own environment faults) where torch sees no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"torch {torch.__version__} sees no GPU\n  what to do: check nvidia-smi, CUDA_VISIBLE_DEVICES "
            "and that torch was installed for CUDA; --device cpu --tiny tests the script itself\n"
        )
        raise SystemExit(6)


def main() -> int:
    """Measure and print."""
    options = parse()
    if options.one:
        print(RESULT + json.dumps(measure(options, json.loads(options.one))), flush=True)
        return 0
    refuse_without_gpu(options.device)
    keys = ("config", "micro_batch_size", "compile", "checkpointing")
    choices = (options.config, options.micro_batch_sizes, options.compile, options.activation_checkpointing)
    jobs = [dict(zip(keys, values, strict=True)) for values in itertools.product(*choices)]
    print(header(("torch", "deepspeed", "megatron-core")) + "\n", flush=True)
    print(
        "| config | micro-batch | compile | recomputation | tokens/s | TFLOP/s | MFU | GiB allocated / reserved | "
        "step ms | spread | first step s |\n|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    results = []
    for job in jobs:
        results.append(run_child(options, job))
        print(row(options, job, results[-1]), flush=True)
    good = [result for result in results if "failed" not in result]
    if good:
        print(f"\n{good[0]['device']}, CUDA {good[0]['cuda']}; MFU against {good[0]['peak']}. ", end="")
        print(
            f"{options.accumulation} micro-batches a step, ZeRO {options.zero_stage}; medians of {options.steps} steps."
        )
    return int(any(result.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for result in results))


if __name__ == "__main__":
    sys.exit(main())
