"""How much of the FLOPs that early exit saves is saved as time?

A random model whose halting routers are set so that tokens run a given number of loops on average, at one threshold.
Full loops and early exit take turns within one run, prefill and decoding apart. Prints Markdown.

    python benchmarks/bench_inference.py
    OMP_NUM_THREADS=1 python benchmarks/bench_inference.py --threads 1 --clock cpu      # where others use the machine
    python benchmarks/bench_inference.py --device cuda --dtype bfloat16 --batches 1 8 32 128
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from machine import header
from torch import Tensor

from loopmem_pretrain.hf.configuration_loopmem import LoopMemConfig
from loopmem_pretrain.hf.modeling_loopmem import LoopMemForCausalLM
from loopmem_pretrain.model.flops import forward_flops_at, forward_flops_per_token

THRESHOLD = 0.9


def make_model(options: argparse.Namespace) -> LoopMemForCausalLM:
    torch.manual_seed(0)
    config = LoopMemConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64 // 3 or 1,
        max_loops=options.loops,
        local_slots=128,
    )
    model = LoopMemForCausalLM(config).eval().to(options.device, getattr(torch, options.dtype))
    for layer in model.model.layers:
        hidden = model.model.embed_tokens.weight.float()
        direction = torch.randn(options.hidden, device=options.device)
        layer.halting.weight[0, :-1] = options.spread * direction / (hidden @ direction).std()
        layer.halting.weight[0, -1] = 0
    return model


def set_mean_loops(model: LoopMemForCausalLM, ids: Tensor, wanted: float) -> None:
    """Find the routers' bias, one for all layers, at which tokens run so many loops on average."""
    low, high = -20.0, 20.0
    for _ in range(16):
        bias = (low + high) / 2
        for layer in model.model.layers:
            layer.halting.bias.fill_(bias)
        low, high = (bias, high) if mean_loops(model, ids) > wanted else (low, bias)


def mean_loops(model: LoopMemForCausalLM, ids: Tensor) -> float:
    stats = model(ids, exit_threshold=THRESHOLD, output_loop_stats=True, logits_to_keep=1, use_cache=False).loop_stats
    return float(torch.stack([layer.loops for layer in stats]).float().mean())


def flops(config: Any, keys: float, loops: float, heads: float, tokens: int) -> float:
    """FLOPs of a token, one of `tokens` in a pass, that sees `keys` keys and runs `loops` loops a layer.

    `heads` of it gets logits.
    """
    head = forward_flops_per_token(config, round(keys)).head
    return forward_flops_at(config, round(keys), loops, causal=False, tokens=tokens) + (heads - 1) * head


def seconds_of(run: Callable[[], object], options: argparse.Namespace) -> float:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    if options.device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    run()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def take_turns(runs: list[Callable[[], object]], options: argparse.Namespace) -> tuple[list[float], float, float]:
    """Median seconds of each of two runs, the median ratio second to first, and half its quartile range."""
    for run in runs:
        run()
    times = [[seconds_of(run, options) for run in runs] for _ in range(options.repeats)]
    ratios = sorted(second / first for first, second in times)
    spread = (ratios[len(ratios) * 3 // 4] - ratios[len(ratios) // 4]) / 2
    return [median(column) for column in zip(*times, strict=True)], median(ratios), spread


def prefill(model: LoopMemForCausalLM, ids: Tensor, options: argparse.Namespace) -> tuple[list[float], float, float]:
    runs = [
        lambda settings=settings: model(ids, logits_to_keep=1, **settings)
        for settings in ({}, {"exit_threshold": THRESHOLD})
    ]
    return take_turns(runs, options)


def decode(
    model: LoopMemForCausalLM, ids: Tensor, new: Tensor, options: argparse.Namespace
) -> tuple[list[float], float, float]:
    def steps(cache: Any, settings: dict[str, float]) -> None:
        for token in new.split(1, dim=1):
            model(token, past_key_values=cache, **settings)
        cache.crop(-new.shape[1])

    runs = []
    for settings in ({}, {"exit_threshold": THRESHOLD}):
        cache = model(ids, logits_to_keep=1, **settings).past_key_values
        runs.append(lambda cache=cache, settings=settings: steps(cache, settings))
    return take_turns(runs, options)


def linear_layers(model: LoopMemForCausalLM, rows: int, options: argparse.Namespace) -> float:
    """Seconds that the linear layers of one block take for so many tokens, median."""
    weights = [part.weight for name, part in model.model.layers[0].named_modules() if name.endswith("_proj")]
    inputs = {
        weight: torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device) for weight in weights
    }

    def run() -> None:
        for _ in range(8):
            for weight, x in inputs.items():
                F.linear(x, weight)

    run()
    return median(seconds_of(run, options) for _ in range(9)) / 8


@torch.inference_mode()
def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    print(header(["torch", "transformers"]), "\n")
    if options.device != "cpu":
        print(f"{torch.cuda.get_device_name()}, {options.dtype}.\n")
    model = make_model(options)
    config, generator = model.config, torch.Generator().manual_seed(1)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{size:.0f} M parameters, {options.dtype}: D {config.hidden_size}, F {config.intermediate_size}, "
        f"{config.num_hidden_layers} layers of up to {config.max_loops} loops, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} for keys and values, 128 slots a layer. {options.threads} threads, "
        f"{options.clock} clock, {options.repeats} repeats. Prompts of {options.prompt} tokens, then {options.new} "
        f"more; threshold {THRESHOLD}; the routers' logits spread by {options.spread:g} over tokens.\n"
    )
    print(
        "| mean loops | batch | | full loops, tokens/s | early exit, tokens/s | FLOPs saved | time saved | of it |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for wanted in options.mean_loops:
        calibration = torch.randint(config.vocab_size, (8, 64), generator=generator).to(options.device)
        set_mean_loops(model, calibration, wanted)
        for batch in options.batches:
            shape = (batch, options.prompt + options.new)
            ids = torch.randint(config.vocab_size, shape, generator=generator).to(options.device)
            prompt, new = ids[:, : options.prompt], ids[:, options.prompt :]
            ran = mean_loops(model, ids)
            phases = {
                "prefill": (prefill(model, prompt, options), prompt.numel(), options.prompt / 2, 1 / options.prompt),
                "decode": (decode(model, prompt, new, options), new.numel(), options.prompt + options.new / 2, 1.0),
            }
            for name, ((seconds, ratio, spread), tokens, keys, heads) in phases.items():
                in_pass = tokens if name == "prefill" else batch
                full = flops(config, keys, config.max_loops, heads, in_pass)
                saved = 1 - flops(config, keys, ran, heads, in_pass) / full
                share = f"{(1 - ratio) / saved:.0%}" if saved > 0.01 else "-"
                print(
                    f"| {ran:.2f} | {batch} | {name} | {tokens / seconds[0]:,.0f} | {tokens / seconds[1]:,.0f} | "
                    f"{saved:.0%} | {1 - ratio:.0%} +- {spread:.0%} | {share} |",
                    flush=True,
                )
    print("\nThe linear layers of one block alone, for so many tokens:\n")
    rows = [1, 2, 4, 8, 16, 32, 128, 512]
    print("| tokens | " + " | ".join(map(str, rows)) + " |\n|---|" + "---|" * len(rows))
    timed = [linear_layers(model, n, options) * 1e3 for n in rows]
    print("| ms | " + " | ".join(f"{ms:.2f}" for ms in timed) + " |")
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--mean-loops", type=float, nargs="+", default=[4.0, 2.5, 1.5])
    help_ = "standard deviation of the routers' logits over tokens; 0: all tokens leave a layer at the same loop"
    parser.add_argument("--spread", type=float, default=1.5, help=help_)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    main(parser.parse_args())
