"""What parallelism costs: megatron's layers where nothing is cut, and pipelines of two stages on two processes.

    python benchmarks/bench_parallel.py > benchmarks/results/parallel_cpu.md      everything, some five minutes
    python benchmarks/bench_parallel.py --parts backend bubble                    some of it

Contestants take turns within one run, the order reversed every other round; a ratio is the median over rounds of the
ratio within a round, followed by its quartiles. Each rank has one thread; pipelines need two cores that nobody else
uses, and wall time. Prints Markdown.
"""

import argparse
import io
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from machine import header

from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.parallel.stages import layer_costs, naive_bounds, stage_bounds, stage_costs
from loopmem_pretrain.tools.step_time import bubble_fraction

ROOT = Path(__file__).parents[1]
PARTS = ("backend", "bubble", "stages", "replay")
STAGES = 2
MICRO_BATCHES = (1, 2, 3, 4, 6, 8)
LOOPS = [1, 1, 2, 3, 4, 5]  # of a model whose early layers loop less
PAPER = "configs/paper/m_minus_3.yaml"
PAPER_LOOPS = [1] * 4 + [2] * 4 + [3] * 4
Summary = list[list[str]]
"""Rows of (question, what was asked for or predicted, what came out)."""


def model_of(width: int, layers: int, **fields: int) -> ModelConfig:
    """A looped model with heads of 64."""
    sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3, "max_loops": 3, "num_hidden_layers": layers}
    return ModelConfig(num_attention_heads=width // 64, num_key_value_heads=width // 64, **sizes | fields)


def run_of(model: ModelConfig, seq_length: int, micro_batches: int) -> RunConfig:
    """A run of two stages, micro-batches of two samples."""
    values: dict[str, Any] = {
        "run_dir": "unused",
        "model": model.model_dump(),
        "data": {"datasets": [{"path": "unused"}], "seq_length": seq_length, "num_workers": 0},
        "parallel": {"pipeline_model_parallel_size": STAGES},
        "training": {
            "train_steps": 1_000_000,
            "global_batch_size": 2 * micro_batches,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 0, "min_lr": 1e-4},
    }
    return RunConfig.model_validate_json(json.dumps(values))


def spread(values: Iterable[float], form: Callable[[float], str] = "{:.3f}".format) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{form(middle)} [{form(low)}, {form(high)}]"


def percent(value: float) -> str:
    return f"{value:.1%}"


def print_table(heads: list[str], rows: Iterable[list[str]]) -> None:
    for row in (heads, ["---", *["--:"] * (len(heads) - 1)], *rows):
        print(f"| {' | '.join(row)} |")


def print_prose(text: str) -> None:
    print(f"\n{textwrap.dedent(text).strip()}\n")


def on_ranks(function: str, *args: Any) -> list[Any]:
    from tests.distributed import run_ranks

    world_size = 1 if function == "backend_steps" else STAGES
    return run_ranks(f"parallel_ranks:{function}", world_size, *args, timeout=1200)


def backend(options: argparse.Namespace) -> Summary:
    """Megatron's layers with one tensor-parallel rank against plain torch."""
    import torch

    models = {
        "L3": model_of(768, 2, vocab_size=2048),
        "M_-3": model_of(768, 2, vocab_size=2048, local_slots=1024, global_slots=512),
    }
    tokens = torch.randint(0, 2048, (1, 513), generator=torch.Generator().manual_seed(0))
    clock = {"cpu": "process_time", "wall": "perf_counter"}[options.clock]
    steps = on_ranks("backend_steps", models, tokens, options.rounds, clock)[0]
    print_prose(f"""
        ## MegatronBackend with one tensor-parallel rank, over TorchBackend

        What the layers cost where nothing is cut: megatron's linear layers and cross-entropy, and collectives of one
        rank. Asked for: at most 1.05. fp32, {options.clock} time; D = 768, 2 looped layers (N = 3), V = 2048,
        T = 512, micro-batch 1, forward and backward pass, AdamW; {options.rounds} rounds. "Losses": the greatest
        relative difference of the two backends' losses in any step.
    """)
    rows, summary = [], []
    for name in models:
        ours, plain = steps[name, "megatron"], steps[name, "torch"]
        pairs = list(zip(ours, plain, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(step.total for step in plain) * 1e3:.0f}",
                f"{statistics.median(step.total for step in ours) * 1e3:.0f}",
                spread(a.total / b.total for a, b in pairs),
                spread(a.passes / b.passes for a, b in pairs),
                f"{max(abs(a.loss - b.loss) / b.loss for a, b in pairs):.1e}",
            ]
        )
        summary.append([f"step of {name} through MegatronBackend, one rank, over TorchBackend", "1.05", rows[-1][3]])
    heads = ["", "torch ms", "megatron ms", "ratio of whole steps", "ratio of forward and backward", "losses"]
    print_table(heads, rows)
    return summary


def bubble(options: argparse.Namespace) -> Summary:
    """The share of a two-stage pipeline's time in which a stage waits."""
    from parallel_ranks import Job

    model = model_of(384, 2, vocab_size=256)
    costs = stage_costs(layer_costs(model, 256), naive_bounds(model, STAGES))
    jobs = {str(count): Job(run_of(model, 256, count), naive_bounds(model, STAGES)) for count in MICRO_BATCHES}
    ranks = on_ranks("pipeline_steps", jobs, options.rounds)
    print_prose(f"""
        ## Bubble of two stages

        Two processes with one thread each train a model of two looped layers through DeepSpeed's pipeline engine over
        gloo: D = 384, N = 3, V = 256, T = 256, micro-batches of 2, one layer a stage (FLOPs of the stages differ by
        {costs[1] / costs[0] - 1:.1%}); {options.rounds} rounds, wall time.

        Bubble: 1 - (seconds in forward and backward passes, summed over both stages) / (2 x pipeline's time), where the
        pipeline's time is from the first stage's first forward pass to the last end of a backward pass. Passing on
        tensors counts as waiting, and so does what one stage takes longer than the other (last column: seconds in
        passes, second stage over first); reduction of gradients and AdamW come after and are not in it. Independent of
        that: the pipeline's time per micro-batch over that with M = {MICRO_BATCHES[-1]} in the same round, beside what
        (M + P - 1) / M says.
    """)
    rows, summary = [], []
    seen = {int(name): list(zip(*(rank[name] for rank in ranks), strict=True)) for name in jobs}
    per_micro_batch = {count: [window(stages) / count for stages in seen[count]] for count in MICRO_BATCHES}
    most = MICRO_BATCHES[-1]
    for count in MICRO_BATCHES:
        waiting = [1 - sum(stage.busy for stage in stages) / (STAGES * window(stages)) for stages in seen[count]]
        ratios = [a / b for a, b in zip(per_micro_batch[count], per_micro_batch[most], strict=True)]
        rows.append(
            [
                str(count),
                f"{statistics.median(per_micro_batch[count]) * count * 1e3:.0f}",
                percent(bubble_fraction(STAGES, count)),
                spread(waiting, percent),
                f"{(count + STAGES - 1) / count * most / (most + STAGES - 1):.3f}",
                spread(ratios) if count != most else "1",
                spread(last.busy / first.busy for first, last in seen[count]),
            ]
        )
        summary.append([f"bubble of P = {STAGES}, M = {count}", rows[-1][2], rows[-1][3]])
    heads = ["M", "pipeline ms", "(P-1)/(M+P-1)", "bubble, measured", "time per micro-batch, formula", "measured"]
    print_table([*heads, "stages"], rows)
    return summary


def window(stages: Iterable[Any]) -> float:
    """Seconds from the first forward pass to the last end of a backward pass of one step on all its stages."""
    stages = list(stages)
    return max(stage.last for stage in stages) - min(stage.first for stage in stages)


def stages(options: argparse.Namespace) -> Summary:
    """Cuts by cost against cuts by number of layers."""
    from parallel_ranks import Job
    from schedule_simulation import simulated_time

    count, length = 4, 128
    cases: dict[str, tuple[ModelConfig, list[int] | None]] = {
        "large vocabulary: V = 32,768, every layer loops 3 times": (model_of(384, 6, vocab_size=32768), None),
        f"unequal loops: {', '.join(map(str, LOOPS))}; V = 256": (model_of(384, 6, vocab_size=256, max_loops=5), LOOPS),
    }
    print_prose(f"""
        ## Balanced against naive stages

        Real steps on two processes, as above: D = 384, 6 looped layers, T = {length}, micro-batches of 2, M = {count};
        {options.rounds} rounds, wall time. Naive: three layers a stage. Balanced: `parallel/stages.py:stage_bounds`,
        with the loops of each layer where they are unequal. Training runs max_loops in every layer; here the layers of
        the second model are made to stop after the loops given, the last loop taking the rest of the probability.
        Predicted: DeepSpeed's schedule replayed with the stages' FLOPs, the pipeline alone. Replayed: the same with the
        seconds that the processor spent on each stage's passes in these steps, for a machine where wall time is noisy.
    """)
    rows, summary = [], []
    for title, (model, loops) in cases.items():
        cuts = {"naive": naive_bounds(model, STAGES), "balanced": stage_bounds(model, length, STAGES, loops)}
        jobs = {name: Job(run_of(model, length, count), bounds, loops) for name, bounds in cuts.items()}
        ranks = on_ranks("pipeline_steps", jobs, options.rounds)
        seen = {name: list(zip(*(rank[name] for rank in ranks), strict=True)) for name in jobs}
        costs = {name: stage_costs(layer_costs(model, length, loops), bounds) for name, bounds in cuts.items()}
        whole = {name: [max(stage.total for stage in step) for step in steps] for name, steps in seen.items()}
        pipeline = {name: [window(step) for step in steps] for name, steps in seen.items()}
        replayed = {
            name: [simulated_time([stage.processor / count for stage in step], count) for step in steps]
            for name, steps in seen.items()
        }
        predicted = simulated_time(costs["balanced"], count) / simulated_time(costs["naive"], count)
        rows.append(
            [
                title,
                *(" : ".join(f"{cost / sum(costs[name]):.0%}" for cost in costs[name]) for name in cuts),
                f"{statistics.median(whole['naive']) * 1e3:.0f}",
                f"{statistics.median(whole['balanced']) * 1e3:.0f}",
                spread(a / b for a, b in zip(whole["balanced"], whole["naive"], strict=True)),
                spread(a / b for a, b in zip(pipeline["balanced"], pipeline["naive"], strict=True)),
                spread(a / b for a, b in zip(replayed["balanced"], replayed["naive"], strict=True)),
                f"{predicted:.3f}",
            ]
        )
        question = f"pipeline's time, balanced over naive stages, {title.partition(':')[0]}"
        summary.append([question, rows[-1][-1], rows[-1][-3]])
    heads = ["", "FLOPs naive", "balanced", "naive step ms", "balanced", "step, balanced / naive", "pipeline alone"]
    print_table([*heads, "replayed", "predicted"], rows)
    return summary


def replay(options: argparse.Namespace) -> Summary:
    """More than two stages: DeepSpeed's schedule, replayed."""
    from schedule_simulation import simulated_bubble, simulated_time

    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import run_problems

    config = load_config(RunConfig, str(ROOT / PAPER), [], run_problems)
    model, length = config.model, config.data.seq_length
    print_prose(f"""
        ## More stages: simulated

        DeepSpeed's schedule replayed instruction by instruction (`benchmarks/schedule_simulation.py`); nothing was
        measured. Equal stages, then the stages of the paper's M_-3 (`{PAPER}`: {model.num_hidden_layers} layers,
        V = {model.vocab_size:,}, T = {length:,}) by FLOPs. "M + P - 1" is that many times the slowest stage, "sum" is M
        times the slowest stage and once each other one; both over the replayed time of the balanced cut. Where these
        twelve layers divide evenly there is nothing to balance: the head costs less than a layer. Unequal loops: as if
        the first four layers ran one loop, the next four two, the last four three.
    """)
    rows = []
    for stages in (2, 3, 4, 6, 12):
        for count in (stages, 4 * stages):
            naive, loops = naive_bounds(model, stages), [float(loop) for loop in PAPER_LOOPS]
            balanced = stage_costs(layer_costs(model, length), stage_bounds(model, length, stages))
            equal_layers = stage_costs(layer_costs(model, length), naive)
            by_loops = stage_costs(layer_costs(model, length, loops), stage_bounds(model, length, stages, loops))
            by_layers = stage_costs(layer_costs(model, length, loops), naive)
            time = simulated_time(balanced, count)
            rows.append(
                [
                    str(stages),
                    str(count),
                    percent(bubble_fraction(stages, count)),
                    percent(simulated_bubble([1.0] * stages, count)),
                    percent(simulated_bubble(balanced, count)),
                    f"{max(balanced) * (count + stages - 1) / time:.3f}",
                    f"{(max(balanced) * (count - 1) + sum(balanced)) / time:.3f}",
                    f"{time / simulated_time(equal_layers, count):.3f}",
                    f"{simulated_time(by_loops, count) / simulated_time(by_layers, count):.3f}",
                ]
            )
    heads = ["P", "M", "(P-1)/(M+P-1)", "equal stages", "M_-3, balanced", "M + P - 1", "sum"]
    print_table([*heads, "M_-3, balanced / naive", "unequal loops, balanced / naive"], rows)
    return []


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="of the part `backend`")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds must be at least 3: medians and quartiles are taken over them")
    sys.path.append(str(ROOT))  # for tests/distributed.py, which starts ranks
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for it, and says so on standard output
    print("# Parallelism on CPU: megatron's layers uncut, bubble, balance of stages\n")
    print(header(("torch", "deepspeed", "megatron-core")))
    print_prose("""
        A ratio is the median over rounds of the ratio within a round, quartiles in brackets. Ranks have one thread
        each. The number of collectives per layer and loop is not measured here: `tests/parity/test_collectives.py`
        counts them and holds them to docs/parallelism.md.
    """)
    summary: Summary = []
    with redirect_stdout(io.StringIO()) as sections:
        for part in options.parts:
            summary += {"backend": backend, "bubble": bubble, "stages": stages, "replay": replay}[part](options)
    if summary:
        print_table(["", "asked for, predicted", "measured"], summary)
    print(f"{sections.getvalue()}\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
