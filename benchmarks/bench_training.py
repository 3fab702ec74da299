"""How fast a looped model trains: against a dense model of the same FLOPs, and against plain eager code.

    python benchmarks/bench_training.py                            bare models: forward, backward, AdamW
    python benchmarks/bench_training.py --engine                   the same through DeepSpeed, with batches from shards
    python benchmarks/bench_training.py --config configs/train/demo.yaml     the model and batch of a run's config
    OMP_NUM_THREADS=1 python benchmarks/bench_training.py --threads 1 --clock cpu    on a machine that others use too

Without --config layers have the sizes of the paper (D 768, H 12, F 2048, banks of 1024 and 512 slots); there are few of
them, and a small vocabulary, so that a step takes a second. Contestants take turns within one run, the order reversed
every other round; a ratio is the median over rounds of the ratio within a round, followed by its quartiles. With
`--clock cpu` seconds are those the processor spent on this process. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bench_loader
import torch
from eager_reference import EagerReference
from machine import header
from torch import Tensor

from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.flops import parameter_counts, training_flops_per_token
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM

PACKAGES = ("torch", "deepspeed", "megatron-core")
Clock = Callable[[], float]


class Step(NamedTuple):
    """Seconds of one training step."""

    backward: float
    """Forward and backward pass; with --engine, all but the waiting for data."""
    rest: float
    """AdamW; with --engine, waiting for data."""

    @property
    def total(self) -> float:
        return self.backward + self.rest


class Contestant(NamedTuple):
    """Something that trains a model, one step a call."""

    model: ModelConfig
    step: Callable[[], Step]


def wait_and_read_clock() -> float:
    """Wall time when the GPU has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def model_configs(options: argparse.Namespace) -> dict[str, ModelConfig]:
    """The model of --config; or a looped one without and with memory, and a dense one with as many layers as loops."""
    if options.config:
        return {options.config.stem: options.run.model}
    layers, loops = options.looped_layers, 3
    sizes: dict[str, Any] = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.hidden_size * 8 // 3,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": options.hidden_size // 64,
    }
    looped = sizes | {"num_hidden_layers": layers, "max_loops": loops}
    return {
        "dense": ModelConfig(**sizes, num_hidden_layers=layers * loops, max_loops=0, residual_scale="inverse_depth"),
        "L3": ModelConfig(**looped),
        "M_-3": ModelConfig(**looped, local_slots=1024, global_slots=512),
    }


def bare(model: ModelConfig, options: argparse.Namespace, clock: Clock, kind: str) -> Contestant:
    """The model alone, without DeepSpeed; `kind`: eager, compiled or reference."""
    net: Any = EagerReference(model) if kind == "reference" else LoopMemLM(model, TorchBackend())
    initialize(net.named_parameters(), model, seed=0)
    if kind == "compiled":
        from loopmem_pretrain.training.pipeline import wrap_loops, wrap_loss

        training = run_config(model, options, "unused", compile="loop").training
        wrap_loops(net, training)
        net.backend.cross_entropy = wrap_loss(net.backend.cross_entropy, training)
    net.to(options.device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=options.device == "cuda" or None)
    generator = torch.Generator().manual_seed(0)
    shape = (options.micro_batch_size, options.seq_length + 1)
    tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(options.device)

    def step() -> Step:
        start = clock()
        output = net(tokens[:, :-1], labels=tokens[:, 1:])
        (output if kind == "reference" else output.loss).backward()
        middle = clock()
        optimizer.step()
        optimizer.zero_grad()
        return Step(middle - start, clock() - middle)

    return Contestant(model, step)


class TimedBatches:
    """An iterator of batches that adds up the time spent waiting for them."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], clock: Clock) -> None:
        self.batches, self.clock, self.seconds = batches, clock, 0.0

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = self.clock()
        batch = next(self.batches)
        self.seconds += self.clock() - start
        return batch


def through_engine(model: ModelConfig, options: argparse.Namespace, clock: Clock, folder: str, how: str) -> Contestant:
    """What `loopmem train` does in a step on one rank: batches out of shards, DeepSpeed, ZeRO 1."""
    from loopmem_pretrain.data.dataset import open_training
    from loopmem_pretrain.data.sampler import train_batches
    from loopmem_pretrain.training.engine import TrainingEngine

    config = run_config(model, options, folder, compile="loop" if how == "compiled" else "none")
    engine = TrainingEngine(config, torch.device(options.device))
    data = open_training(config.data, seed=config.training.seed, model_vocab_size=model.vocab_size)
    batches = TimedBatches(
        train_batches(
            data,
            micro_batch_size=config.training.micro_batch_size,
            global_batch_size=config.training.global_batch_size,
            dp_rank=0,
            dp_size=1,
            consumed_samples=0,
            num_workers=0,
            pin_memory=options.device == "cuda",
        ),
        clock,
    )
    done = 0

    def step() -> Step:
        nonlocal done
        waited, start = batches.seconds, clock()
        engine.train_batch(batches, done)
        done += 1
        waited = batches.seconds - waited
        return Step(clock() - start - waited, waited)

    return Contestant(model, step)


def run_config(model: ModelConfig, options: argparse.Namespace, folder: str, **training: str) -> RunConfig:
    """The run of the engine's contestants: one micro-batch a step."""
    values = {
        "run_dir": "unused",
        "model": model.model_dump(),
        "data": {"datasets": [{"path": folder}], "seq_length": options.seq_length, "num_workers": 0},
        "training": {
            "train_steps": 1_000_000,
            "global_batch_size": options.micro_batch_size,
            "micro_batch_size": options.micro_batch_size,
            "precision": options.precision,
            "device": options.device,
            **training,
        },
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 0, "min_lr": 1e-4},
    }
    return RunConfig.model_validate_json(json.dumps(values))


def race(contestants: dict[str, Contestant], rounds: int, warmup: int = 2) -> dict[str, list[Step]]:
    """Let them take turns; the first steps (compilation, allocation) are not counted."""
    for contestant in contestants.values():
        for _ in range(warmup):
            contestant.step()
    seconds: dict[str, list[Step]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(contestants)
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(contestants[name].step())
    return seconds


def ratio(ours: list[float], theirs: list[float], work: float) -> str:
    """Median and quartiles over rounds of (their time / our time) x work."""
    values = sorted(work * b / a for a, b in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def print_times(contestants: dict[str, Contestant], seconds: dict[str, list[Step]], options: Any) -> None:
    """Sizes and speed of each contestant."""
    tokens = options.micro_batch_size * options.seq_length
    parts = "all but data ms | data ms" if options.engine else "forward, backward ms | AdamW ms"
    print(f"| | parameters | MFLOP/token | {parts} | tokens/s | GFLOP/s |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, (model, _) in contestants.items():
        flops = training_flops_per_token(model, options.seq_length, options.micro_batch_size)
        passes, rests = ([getattr(s, part) for s in seconds[name]] for part in ("backward", "rest"))
        rate = tokens / statistics.median(s.total for s in seconds[name])
        print(
            f"| {name} | {parameter_counts(model).total / 1e6:.1f} M | {flops / 1e6:.0f} | "
            f"{statistics.median(passes) * 1e3:.1f} | {statistics.median(rests) * 1e3:.2f} | "
            f"{rate:.0f} | {rate * flops / 1e9:.1f} |"
        )


def print_ratios(contestants: dict[str, Contestant], seconds: dict[str, list[Step]], options: Any) -> None:
    """The comparisons that this benchmark is for."""
    rows = []
    for name in dict.fromkeys(title.partition(", ")[0] for title in contestants):
        if name == "dense":
            continue
        for kind in ("eager", "compiled"):
            rows.append((f"FLOP/s of {name} over dense, both {kind}", f"{name}, {kind}", f"dense, {kind}"))
            rows.append((f"{name}, {kind}, over plain eager code", f"{name}, {kind}", f"{name}, reference"))
    part = "without waiting for data" if options.engine else "forward and backward"
    print(f"\n| ratio of speeds | whole step | {part} |\n|---|---|---|")
    for title, a, b in sorted(rows):
        if a not in seconds or b not in seconds:
            continue
        work = _flops(contestants[a], options) / _flops(contestants[b], options)
        whole = ratio([s.total for s in seconds[a]], [s.total for s in seconds[b]], work)
        passes = ratio([s.backward for s in seconds[a]], [s.backward for s in seconds[b]], work)
        print(f"| {title} | {whole} | {passes} |")


def _flops(contestant: Contestant, options: Any) -> int:
    return training_flops_per_token(contestant.model, options.seq_length, options.micro_batch_size)


def print_data_share(seconds: dict[str, list[Step]]) -> None:
    """How much of a step is waiting for data."""
    print("\n| | waiting for data |\n|---|--:|")
    for name, steps in seconds.items():
        print(f"| {name} | {statistics.median(s.rest / s.total for s in steps):.4%} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="through DeepSpeed instead of bare models")
    parser.add_argument("--config", type=Path, help="of a run: its model, T and micro-batch instead of the sizes below")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--models", nargs="+", choices=("dense", "L3", "M_-3"), default=["dense", "L3", "M_-3"])
    parser.add_argument("--kinds", nargs="+", choices=("eager", "compiled", "reference"))
    parser.add_argument("--hidden-size", type=int, default=768, help="a multiple of 192; heads are 64 wide")
    parser.add_argument("--looped-layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu is for --device cpu")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1: several threads wait for each other in busy loops")
    if options.config:
        options.run = load_config(RunConfig, options.config)
        options.seq_length = options.run.data.seq_length
        options.micro_batch_size = options.run.training.micro_batch_size
        options.hidden_size, options.vocab_size = options.run.model.hidden_size, options.run.model.vocab_size
        options.models = [options.config.stem]
    elif options.hidden_size % 192:
        parser.error(f"--hidden-size {options.hidden_size} is not a multiple of 192 (heads of 64, F = 8 D / 3)")
    if options.rounds < 3:
        parser.error("--rounds must be at least 3: medians and quartiles are taken over them")
    options.kinds = options.kinds or (["eager"] if options.engine else ["eager", "compiled", "reference"])
    if options.engine and "reference" in options.kinds:
        parser.error("--engine has no reference: plain eager code is measured without DeepSpeed")
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    os.environ["DS_ACCELERATOR"] = options.device  # or DeepSpeed looks for it, and says so on standard output
    clock = {"cpu": time.process_time, "wall": time.perf_counter}[options.clock]
    if options.device == "cuda":
        clock = wait_and_read_clock
    print(header(PACKAGES))
    layers = f"{options.looped_layers} looped layers (N = 3) against {3 * options.looped_layers} dense ones"
    if options.config:
        model = options.run.model
        layers = f"{model.num_hidden_layers} layers of {model.max_loops} loops, "
        layers += f"{model.local_slots} and {model.global_slots} slots"
    print(
        f"\n{options.precision}, {options.threads} threads, {options.clock} time; D = {options.hidden_size}, {layers}, "
        f"V = {options.vocab_size}, T = {options.seq_length}, micro-batch {options.micro_batch_size}, "
        f"{options.rounds} rounds.\n"
    )
    models = {name: config for name, config in model_configs(options).items() if name in options.models}
    jobs = [(name, kind) for name in models for kind in options.kinds if (name, kind) != ("dense", "reference")]
    with tempfile.TemporaryDirectory() as folder:
        if options.engine:
            from loopmem_pretrain.training.engine import init_distributed

            init_distributed(torch.device(options.device))
            bench_loader.VOCABULARY = options.vocab_size  # the tokens it writes must fit the reduced vocabulary
            bench_loader.write_random_folder(Path(folder))
            made = [through_engine(models[name], options, clock, folder, kind) for name, kind in jobs]
        else:
            made = [bare(models[name], options, clock, kind) for name, kind in jobs]
        contestants = {f"{name}, {kind}": contestant for (name, kind), contestant in zip(jobs, made, strict=True)}
        seconds = race(contestants, options.rounds)
    print_times(contestants, seconds, options)
    print_ratios(contestants, seconds, options)
    if options.engine:
        print_data_share(seconds)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
