"""A run folder such as training leaves it: 12 looped layers with memory, a crash, a resume, a torn last line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from loopmem_pretrain.config.data import DataConfig, DatasetConfig
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.model import ModelConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig

LAYERS, LOOPS, STEPS, BATCH, SEQ_LENGTH = 12, 3, 4000, 88, 4096
MakeRun = Callable[..., Path]


def _loss_at(step: float) -> float:
    return 2.55 + 8.4 / (1 + step / 60) ** 0.9


def _records(random: np.random.Generator, looped: bool, memory: bool) -> list[dict]:
    depth = np.arange(LAYERS) / (LAYERS - 1)
    records = []
    for step in range(10, STEPS + 1, 10):
        warm = min(1.0, step / 40)
        lr = 2.9e-3 * (warm if warm < 1 else 0.55 + 0.45 * np.cos(np.pi * step / STEPS))
        rate = 69_000 * (1 + 0.02 * random.normal()) * (0.4 if random.random() < 0.01 else 1)
        cross_entropy = _loss_at(step) + 0.03 * random.normal()
        record = {
            "step": step,
            "tokens": step * BATCH * SEQ_LENGTH,
            "loss": cross_entropy + 0.01 * looped,
            "cross_entropy": cross_entropy,
            "lr": lr,
            "grad_norm": 0.25 + 4 / (1 + step / 20) + 0.05 * abs(random.normal()),
            "tokens_per_second": rate,
            "mfu": rate / 69_000 * 0.41,
        }
        if looped:
            learned = 1 / (1 + np.exp(-(step - 900 - 500 * (1 - depth)) / 350))
            stop = 0.5 - (0.38 * depth + 0.05) * learned + 0.005 * random.normal(size=LAYERS)
            halting = np.stack([stop, (1 - stop) * stop, (1 - stop) ** 2], axis=1)
            zeta = np.broadcast_to(9e-4 + 0.25 * learned[:, None] * np.array([1, 0.6, 0.4]), (LAYERS, LOOPS))
            record |= {
                "expected_loops": (halting @ [1, 2, 3]).tolist(),
                "halting_probs": halting.tolist(),
                "lambdas": np.repeat(stop[:, None], LOOPS, 1).tolist(),
                "step_scales": np.log(np.expm1(zeta)).tolist(),
                "zeta": zeta.tolist(),
                "cosine": (1 - zeta / 3).tolist(),
            }
        if memory:
            opened = 1 / (1 + np.exp(-(step - 700) / 400))
            noise = 0.004 * random.normal(size=LAYERS)
            record["local_gate"] = (0.047 + opened * (0.25 + 0.3 * np.sin(2.5 * depth)) + noise).tolist()
            record["global_gate"] = (0.047 + opened * (0.28 - 0.06 * depth) + noise).tolist()
        records.append(record)
        if step % 250 == 0:
            records.append({"step": step, "tokens": record["tokens"], "validation_loss": _loss_at(step) + 0.02})
    return records


def _write_run(parent: Path, looped: bool = True, memory: bool = True, name: str = "run", data: str = "tokens") -> Path:
    folder = parent / name
    folder.mkdir()
    records = _records(np.random.default_rng(0), looped, memory)
    crash = next(i for i, record in enumerate(records) if record["step"] == 2600)
    resume = next(i for i, record in enumerate(records) if record["step"] == 2510)
    lost = [record | {"loss": 99.0} if "loss" in record else record for record in records[resume:crash]]
    lines = [json.dumps(record) for record in records[:resume] + lost + records[resume:]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4010, "tok')
    model = ModelConfig(
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_loops=LOOPS if looped else 0,
        residual_scale="learned" if looped else "one",
        local_slots=1024 if memory else 0,
        global_slots=512 if memory else 0,
    )
    config = RunConfig(
        run_dir=str(folder),
        model=model,
        data=DataConfig(datasets=(DatasetConfig(path=str(parent / data)),), seq_length=SEQ_LENGTH),
        training=TrainingConfig(train_steps=STEPS, global_batch_size=BATCH, micro_batch_size=4),
        optimizer=OptimizerConfig(lr=2.9e-3),
        schedule=ScheduleConfig(warmup_steps=40, min_lr=2.9e-4),
    )
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(looped=True, memory=True)` writes metrics.jsonl and config.yaml; returns the folder."""
    return partial(_write_run, tmp_path)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One looped run with memory for all tests of a file; not to be changed."""
    return _write_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def short_run(make_run: MakeRun) -> Path:
    """The same configuration after three logged steps, of which only the loss is known: quick to draw."""
    run = make_run()
    lines = [{"step": step, "tokens": step * BATCH * SEQ_LENGTH, "loss": 11.0 - step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run
