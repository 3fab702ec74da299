"""How long does training wait for a checkpoint: written while it waits, and written in the background?

Trains a model on gloo ranks and saves the same state both ways in turns. Prints Markdown.

    python benchmarks/bench_checkpoint.py > benchmarks/results/checkpoint_cpu.md
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from machine import header


class Turn(NamedTuple):
    """Seconds of one save written while training waits, and of one written in the background."""

    waited: float
    """for the whole save: loss on a sample, write, flush, hash, publish"""
    stalled: float
    """in the background: to begin it, and before the next update of the weights for the copy"""
    behind: float
    """from there until it was published, a training step beside it"""
    step_alone: float
    step_beside: float
    """of a training step, without and with a save in the background"""


def turns_on_rank(rank: int, world_size: int, config: Any, rounds: int) -> tuple[list[Turn], dict[str, float], int]:
    """The turns of this rank, the phases of the last save and the bytes of its checkpoint."""
    import time

    from loopmem_pretrain.checkpoint.manifest import read_manifest
    from loopmem_pretrain.training.trainer import Trainer

    trainer = Trainer(config)
    batches = trainer._batches()

    def step() -> float:
        started = time.perf_counter()
        trainer.engine.train_batch(batches, trainer.position.step)
        trainer._advance()
        return time.perf_counter() - started

    def save(wait: bool) -> float:
        started = time.perf_counter()
        trainer.saver.save(wait)
        return time.perf_counter() - started

    turns = []
    step()
    for _ in range(rounds + 1):
        alone = step()
        waited = save(wait=True)
        step()
        before, started = trainer.saver.seconds, time.perf_counter()
        save(wait=False)
        beside = step()
        stalled = trainer.saver.seconds - before
        trainer.saver.finish()
        turns.append(Turn(waited, stalled, time.perf_counter() - started, alone, beside))
    checkpoint = trainer.store.latest()
    assert checkpoint is not None
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return turns, read_manifest(checkpoint)["seconds"], size


def config_of(folder: Path, options: argparse.Namespace) -> Any:
    """A run on generated sentences."""
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, os.fspath(root))
    from tests.configs import tiny_run
    from tests.prepared import prepare_sentences

    width = options.width
    model = {
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_loops": 2,
    }
    training = {"train_steps": 100_000, "global_batch_size": 2 * options.ranks, "micro_batch_size": 2}
    training |= {"precision": options.precision}
    parallel = {"zero_stage": options.zero_stage}
    tokens = prepare_sentences(folder / "data")
    return tiny_run(folder / "run", tokens, model=model, training=training, parallel=parallel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), options)
        from tests.distributed import run_ranks

        results = run_ranks("bench_checkpoint:turns_on_rank", options.ranks, config, options.rounds, timeout=3000)
    turns, phases, size = results[0]
    first, later = turns[0], turns[1:]
    print("# Waiting for checkpoints\n")
    print(header(["torch", "deepspeed"]) + "\n")
    print(
        f"A checkpoint of {size / 1e9:.2f} GB, {options.ranks} ranks, ZeRO {options.zero_stage}, {options.precision}; "
        f"both ways in turns, {options.rounds} turns after the first; medians (extremes), seconds.\n"
    )
    print("| | first turn | later turns |\n|---|---|---|")
    for name, meaning in (
        ("waited", "training waits for all of it"),
        ("stalled", "in the background: training waits, to begin it and for the copy"),
        ("behind", "in the background: from its beginning to its publication"),
        ("step_alone", "a training step alone"),
        ("step_beside", "a training step beside a save"),
    ):
        values = [getattr(turn, name) for turn in later]
        spread = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        print(f"| {meaning} | {getattr(first, name):.3f} | {spread} |")
    ratios = [turn.stalled / turn.waited for turn in later]
    whole = f"{first.stalled / first.waited:.1%} | {statistics.median(ratios):.1%}"
    print(f"| **wait in the background over whole save** | {whole} ", end="")
    print(f"({min(ratios):.1%} to {max(ratios):.1%}) |\n")
    print(f"Phases of the last save, seconds, slowest rank each: {phases}.")


if __name__ == "__main__":
    main()
