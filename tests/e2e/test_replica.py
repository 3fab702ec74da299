"""Whole runs against the paper's equations: every number that metrics.jsonl holds but times is predicted."""

import json

import numpy as np
import pytest
import torch

from loopmem_pretrain.data.order import permuted
from loopmem_pretrain.model.backend import TorchBackend
from loopmem_pretrain.model.init import initialize
from loopmem_pretrain.model.loopmem import LoopMemLM
from tests.configs import tiny_run
from tests.e2e.test_training import run
from tests.replica import predict

TIMES = {"tokens_per_second", "mfu", "seconds_per_step", "saving_seconds"}
OF_THE_LAST_STEP = {"step", "tokens", "lr", "beta1", "grad_norm", "skipped_steps"}
OF_THE_LAST_STEP |= {"step_scales", "zeta", "validation_loss"}
"""The other keys are means over the steps since the line before."""

ARITHMETIC, EXACT = {"step", "tokens", "lr", "beta1", "skipped_steps", "ponder_weight"}, 1e-12
"""Keys that the run, too, computes in float64, and their largest relative difference."""
ROUNDED = 5e-6
"""That of the other keys. A run computes in float32, and its weights gather the rounding (6e-8) of every step. Measured
over eight seeds: zeta 2.1e-6, as e^s has seven times the relative error of s = -7; a gate 1.2e-6; the rest 4e-7."""

COMMON = {
    "model": {"vocab_size": 320},
    "training": {"micro_batch_size": 4, "train_steps": 12},
    "schedule": {"warmup_steps": 4},
    "optimizer": {"eps": 1e-5},  # Adam makes whole steps of gradients below it, also where they are rounding noise
    "validation": {"interval_steps": 8, "num_samples": 16},
    "checkpoint": {"interval_steps": 12},
    "logging": {"interval_steps": 1},
}
VARIANTS = {
    "cosine": {
        "training": {"micro_batch_size": 2},  # two micro-batches a step on each of two ranks
        "optimizer": {"gradient_clipping": 0.7},
    },
    "one_cycle": {
        "model": {"gate": "scalar", "gate_init_bias": -3.0, "ponder_weight": 0.3},
        "parallel": {"zero_stage": 3},
        "training": {"ponder_schedule": "cyclic", "ponder_period": 5},
        "optimizer": {"beta1": 0.95, "weight_decay": 1.0, "weight_decay_rule": "paper"},
        "schedule": {"type": "one_cycle", "beta1_min": 0.85},
        "logging": {"interval_steps": 5},
    },
    "wsd": {
        "model": {"gate": "constant", "local_slots": 0, "ponder_weight": -0.1, "tie_word_embeddings": True},
        "parallel": {"zero_stage": 2},
        "training": {"ponder_schedule": "linear"},
        "optimizer": {"weight_decay": 1.0, "decay_memory_banks": True, "gradient_clipping": 0.0},
        "schedule": {"type": "wsd", "decay_steps": 5},
    },
    "plain": {  # attention at full strength: zeta begins at 9e-4 and hides in loops what is little
        "model": dict.fromkeys(("max_loops", "local_slots", "global_slots", "ponder_weight"), 0)
        | {"residual_scale": "inverse_depth"},
        "optimizer": {"lr": 3e-3},  # at 1e-2 a gradient leaps now and then, and magnifies rounding a hundredfold
    },
}


def config_of(variant, run_dir, data_dir):
    own = VARIANTS[variant]
    sections = {name: COMMON.get(name, {}) | own.get(name, {}) for name in {*COMMON, *own}}
    return tiny_run(run_dir, data_dir, **sections)


def read_samples(folder, split, length):
    """All samples [samples, length + 1] of a prepared folder: its stream in pieces that share one token."""
    shards = sorted(folder.glob(f"{split}-*.bin"))
    stream = np.concatenate([np.fromfile(shard, "<u2") for shard in shards]).astype(np.int64)
    return torch.from_numpy(stream).unfold(0, length + 1, length)


def predicted_lines(config, data_dir):
    """The lines of metrics.jsonl: one every log interval and at every validation."""
    model = LoopMemLM(config.model, TorchBackend())
    initialize(model.named_parameters(), config.model, config.training.seed)  # as the run is before its first step
    train, held_out = (read_samples(data_dir, split, config.data.seq_length) for split in ("train", "validation"))
    size, steps = config.training.global_batch_size, config.training.train_steps
    order = torch.tensor([permuted(draw, len(train), config.training.seed, dataset=0) for draw in range(steps * size)])
    samples = config.validation.num_samples
    held_out = held_out[[permuted(draw, len(held_out), seed=0, dataset=0) for draw in range(samples)]]
    lines, interval = [], []
    for step in predict(config, dict(model.named_parameters()), train[order].split(size), held_out):
        interval.append(step)
        if step["step"] % config.logging.interval_steps == 0 or "validation_loss" in step:
            means = {key: torch.stack([each[key] for each in interval]).mean(0) for key in interval[0]}
            lines.append({key: step[key] if key in OF_THE_LAST_STEP else means[key] for key in step})
            interval = []
    return lines


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_logs_what_the_equations_predict(tmp_path, sentences, variant):
    config = config_of(variant, tmp_path, sentences)
    assert run(config) == ("done", None)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    predicted = predicted_lines(config, sentences)
    assert [line["step"] for line in logged] == [line["step"] for line in predicted]
    for line, expected in zip(logged, predicted, strict=True):
        assert line.keys() - TIMES == expected.keys()
        differences = {key: relative_difference(line[key], value) for key, value in expected.items()}
        bounds = {key: EXACT if key in ARITHMETIC else ROUNDED for key in expected}
        # A difference that is NaN is below no bound.
        assert not {key: each for key, each in differences.items() if not each <= bounds[key]}, f"step {line['step']}"


def relative_difference(logged, predicted):
    logged = torch.tensor(logged, dtype=torch.float64)
    assert logged.shape == predicted.shape
    return ((logged - predicted).abs() / predicted.abs().clamp_min(1e-300)).max().item()
