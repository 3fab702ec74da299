"""Whole runs on gloo ranks: logs, checkpoints, exact resume, conversion, and what goes wrong."""

import json
import math
import shutil
from pathlib import Path

import pytest

from loopmem_pretrain.checkpoint.state import _refuse_lost_checkpoints
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.metrics_file import read_lines
from loopmem_pretrain.model.flops import training_flops_per_token
from tests.configs import tiny_run
from tests.distributed import run_command, run_ranks

ON_RANK = "tests.e2e.test_training:train_on_rank"


def train_on_rank(
    rank: int, world_size: int, config: RunConfig, stop_at_step: int | None = None, before: str = "", first: str = ""
):
    """Run to the end (or `stop_at_step`); returns (status, named error or None).

    `first` is run on every rank before the trainer is made, `before` before it trains.
    """
    from loopmem_pretrain.errors import LoopMemError
    from loopmem_pretrain.training.trainer import Trainer

    exec(first, {})
    try:
        trainer = Trainer(config, stop_at_step)
        exec(before, {"trainer": trainer})
        return trainer.train(), None
    except LoopMemError as error:
        return None, error


def run(config, ranks=2, **options):
    """All ranks' (status, error); ranks must agree."""
    results = run_ranks(
        ON_RANK, ranks, config, options.get("stop_at_step"), options.get("before", ""), options.get("first", "")
    )
    assert len({(status, type(error)) for status, error in results}) == 1, results
    return results[0]


def lines(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def config_for(run_dir, data_dir, **sections):
    """The tiny run with micro-batches as large as two data-parallel ranks can have them: a step is one pass then."""
    sections["model"] = {"vocab_size": 320, **sections.get("model", {})}
    sections["training"] = {"micro_batch_size": 4, **sections.get("training", {})}
    return tiny_run(run_dir, data_dir, **sections)


EXACT = ("step", "loss", "cross_entropy", "grad_norm", "validation_loss", "expected_loops", "local_gate", "step_scales")


def exact(run_dir):
    return [{key: line[key] for key in EXACT if key in line} for line in lines(run_dir)]


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (1, "bf16"),
        (2, "fp32"),
        (3, "bf16"),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(tmp_path, sentences, zero_stage, precision):
    training = {"precision": precision, "micro_batch_size": 2, "train_steps": 10}
    sections = {"parallel": {"zero_stage": zero_stage}, "training": training, "validation": {"interval_steps": 5}}
    whole = config_for(tmp_path / "whole", sentences, **sections)
    halves = config_for(tmp_path / "halves", sentences, **sections)
    assert run(whole) == ("done", None)
    assert run(halves, stop_at_step=5) == ("interrupted", None)
    assert run(halves) == ("done", None)
    assert exact(tmp_path / "whole") == exact(tmp_path / "halves")
    assert exact(tmp_path / "whole")[-1]["step"] == 10


def test_a_run_and_its_folder(tmp_path, sentences):
    config = config_for(tmp_path, sentences, logging={"tensorboard": True, "wandb": "offline"})
    assert run(config) == ("done", None)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    last = logged[-1]
    for key in ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "validation_loss"):
        assert math.isfinite(last[key]), key
    # Two ranks of logging.peak_tflops 0.05 each; a step has 8 samples of 16 tokens.
    flops = training_flops_per_token(config.model, 16, config.training.micro_batch_size)
    for line in logged:
        assert line["tokens_per_second"] * line["seconds_per_step"] == pytest.approx(8 * 16)
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / (2 * 0.05e12))
    assert last["tokens"] == 20 * 8 * 16
    for key, shape in (("expected_loops", (2,)), ("local_gate", (2,)), ("global_gate", (2,))):
        assert len(last[key]) == shape[0]
    for key in ("lambdas", "halting_probs", "cosine", "step_scales", "zeta"):
        assert [len(layer) for layer in last[key]] == [3, 3], key
    assert logged[-1]["validation_loss"] < logged[1]["validation_loss"] < math.log(320) + 0.3
    assert all(abs(sum(layer) - 1) < 1e-5 for layer in last["halting_probs"])
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"]) == ("done", 20)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000020\n"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000010",
        "step_00000020",
    ]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["deepspeed"] and environment["world_size"] == 2
    begin, end = read_lines(tmp_path / "starts.jsonl")
    assert begin == {"event": "begin", "step": 0, **environment}
    assert end.pop("time") >= status["time"] and end == {"event": "end", "step": 20, "status": "done"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [5, 10, 15, 20]
    assert "expected_loops/layer_01" in events.Tags()["scalars"]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    wandb_id = (tmp_path / "wandb_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{wandb_id}"))


def test_a_start_says_where_its_weights_come_from(tmp_path, sentences):
    """A run_dir that is misspelt, or weights that were not imported: training would begin anew in silence."""
    handler = f"logging.FileHandler({str(tmp_path / 'log')!r})"
    first = (
        f"import logging; log = logging.getLogger('loopmem_pretrain'); log.setLevel('INFO'); log.addHandler({handler})"
    )
    config, told = config_for(tmp_path / "run", sentences), []
    for step in (1, 2):
        run(config, ranks=1, stop_at_step=step, first=first)
        said = (tmp_path / "log").read_text()
        told.append((said.count("weights begin random, from training.seed"), said.count("resumed from")))
    assert told == [(1, 0), (1, 1)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_number_of_ranks_does_not_change_the_loss(tmp_path, sentences, ranks):
    for each in (1, ranks):
        config = config_for(tmp_path / str(each), sentences, training={"micro_batch_size": 2})  # 4 ranks have no larger
        assert run(config, ranks=each)[0] == "done"
    one, other = (exact(tmp_path / str(each))[-1] for each in (1, ranks))
    for key in ("loss", "validation_loss", "expected_loops"):
        assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_deterministic_runs_are_bit_identical(tmp_path, sentences):
    before = "import torch; assert torch.are_deterministic_algorithms_enabled()"
    for name in ("a", "b"):
        config = config_for(tmp_path / name, sentences, training={"deterministic": True, "train_steps": 10})
        run(config, before=before)
    assert exact(tmp_path / "a") == exact(tmp_path / "b")


def test_only_the_newest_checkpoints_are_kept(tmp_path, sentences):
    run(config_for(tmp_path, sentences, checkpoint={"interval_steps": 4, "keep_last": 2}))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000016", "step_00000020"]


def test_a_signal_stops_all_ranks_cleanly(tmp_path, sentences):
    config = config_for(tmp_path, sentences)
    before = "import os, signal\nif trainer.rank == 1: trainer.signal = 'SIGTERM'"
    assert run(config, before=before) == ("interrupted", None)
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "stopped by SIGTERM"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"
    assert run(config) == ("done", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sentences):
    """A finished ten-step run; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(config_for(folder, sentences, training={"train_steps": 10}, schedule={"warmup_steps": 2})) == (
        "done",
        None,
    )
    return folder


def longer(run_dir, data_dir, **sections):
    """The config of `finished`, in another folder."""
    sections["training"] = {"train_steps": 10, **sections.get("training", {})}
    return config_for(run_dir, data_dir, **sections)


@pytest.fixture
def copy_of_finished(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_another_config_is_refused(copy_of_finished, sentences):
    _, error = run(longer(copy_of_finished, sentences, optimizer={"lr": 0.5}))
    assert error.exit_code == 2
    assert "optimizer.lr: 0.01 -> 0.5" in error.problem


def test_another_config_is_refused_though_its_record_has_gone(copy_of_finished, sentences):
    (copy_of_finished / "config.yaml").unlink()
    _, error = run(longer(copy_of_finished, sentences, training={"global_batch_size": 16}))
    assert error.exit_code == 4
    assert "training.global_batch_size: 8 -> 16" in error.problem
    (copy_of_finished / "config.yaml").unlink()
    assert run(longer(copy_of_finished, sentences))[0] == "done"


def test_how_a_run_is_observed_may_change(copy_of_finished, sentences):
    assert run(longer(copy_of_finished, sentences, logging={"interval_steps": 2})) == ("done", None)


def test_the_data_may_move(copy_of_finished, sentences, tmp_path):
    shutil.copytree(sentences, tmp_path / "moved")
    assert run(longer(copy_of_finished, tmp_path / "moved")) == ("done", None)


def test_a_number_of_ranks_that_does_not_divide_is_refused(copy_of_finished, sentences):
    _, error = run(longer(copy_of_finished, sentences), ranks=3)
    assert error.exit_code == 2
    assert "global_batch_size 8" in error.problem


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_named(copy_of_finished, sentences, damage):
    file = next((copy_of_finished / "checkpoints" / "step_00000010").glob("*zero_pp_rank_1*"))
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    else:
        file.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    _, error = run(longer(copy_of_finished, sentences))
    assert error.exit_code == 4
    assert file.name in error.problem and "restore" in error.fix


def test_a_missing_checkpoint_is_named(copy_of_finished, sentences):
    shutil.rmtree(copy_of_finished / "checkpoints" / "step_00000010")
    _, error = run(longer(copy_of_finished, sentences))
    assert error.exit_code == 4 and "step_00000010" in error.problem


@pytest.mark.parametrize("gone", ["folder", "content"])
def test_a_run_whose_checkpoints_have_gone_does_not_begin_anew(copy_of_finished, sentences, gone):
    """As in a copy that was cut short; it would be trained from the first step into the same log."""
    shutil.rmtree(copy_of_finished / "checkpoints")
    if gone == "content":
        (copy_of_finished / "checkpoints").mkdir()
    before = exact(copy_of_finished)
    _, error = run(longer(copy_of_finished, sentences))
    assert error.exit_code == 4
    assert error.problem == f"{copy_of_finished} has trained 10 steps (status.json), and there is no checkpoint in it"
    assert exact(copy_of_finished) == before
    (copy_of_finished / "status.json").unlink()
    run(longer(copy_of_finished, sentences), stop_at_step=1)


@pytest.mark.parametrize(
    ("status", "step", "logged", "lost"),
    [
        ("running", 20, 0, 20),  # a start that was killed had resumed at step 20
        ("running", 0, 16, 16),  # the first start, after its third checkpoint was due
        ("failed", 16, 16, 16),
        ("failed", 8, 8, 0),
        ("running", 0, 15, 0),  # its saves may have failed
    ],
)
def test_a_killed_run_whose_checkpoints_have_gone_does_not_begin_anew(tmp_path, status, step, logged, lost):
    (tmp_path / "status.json").write_text(json.dumps({"status": status, "reason": "-", "step": step}))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, logged + 1)) + '{"st')
    if lost:
        with pytest.raises(CheckpointError, match=f"has trained {lost} steps"):
            _refuse_lost_checkpoints(tmp_path, 5)
    else:
        _refuse_lost_checkpoints(tmp_path, 5)


def test_a_second_start_without_checkpoints_is_refused_too(copy_of_finished, sentences):
    """The first one's failure does not take the place of what status.json knew."""
    path = copy_of_finished / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))
    shutil.rmtree(copy_of_finished / "checkpoints")
    config_path = copy_of_finished / "again.yaml"
    config_path.write_text(dump_config(longer(copy_of_finished, sentences)))
    for _ in range(2):
        refused = run_command("train", "--config", config_path)
        assert refused.returncode == 4 and "has trained 10 steps" in refused.stderr


def test_checkpoints_on_a_disk_that_is_not_there(copy_of_finished, sentences):
    (copy_of_finished / "status.json").unlink()
    (copy_of_finished / "checkpoints").rename(copy_of_finished.parent / "disk")
    (copy_of_finished / "checkpoints").symlink_to(copy_of_finished.parent / "away")
    before = exact(copy_of_finished)
    _, error = run(longer(copy_of_finished, sentences))
    assert error.exit_code == 4 and "away, which is not there" in error.problem
    assert exact(copy_of_finished) == before
    (copy_of_finished.parent / "disk").rename(copy_of_finished.parent / "away")
    assert run(longer(copy_of_finished, sentences)) == ("done", None)


@pytest.mark.parametrize("content", ["", "null", '{"status": "done"}', '{"status": "done", "step": "x"}', '{"sta'])
def test_without_a_checkpoint_a_damaged_status_says_nothing(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"status.json is damaged, and there is no checkpoint"):
        _refuse_lost_checkpoints(tmp_path, 5)


def test_a_half_written_checkpoint_is_ignored(copy_of_finished, sentences):
    half = copy_of_finished / "checkpoints" / ".incomplete-step_00000015"
    half.mkdir()
    (half / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (copy_of_finished / "checkpoints" / "latest").unlink()  # killed between rename and pointer
    assert run(longer(copy_of_finished, sentences))[0] == "done"


def test_other_data_is_refused(copy_of_finished, tmp_path):
    from tests.prepared import prepare_sentences

    other = prepare_sentences(tmp_path / "other", seed=2)
    _, error = run(longer(copy_of_finished, other))
    assert error.exit_code == 4
    assert "other data" in error.problem


def test_a_vocabulary_smaller_than_a_token_id(tmp_path, sentences):
    _, error = run(config_for(tmp_path, sentences, model={"vocab_size": 300}))
    assert error.exit_code == 3
    assert "300" in error.problem and "320" in error.fix


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard(tmp_path, sentences, damage):
    shutil.copytree(sentences, tmp_path / "tokens")
    shard = tmp_path / "tokens" / "train-00000.bin"
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-2])
    _, error = run(config_for(tmp_path / "run", tmp_path / "tokens"))
    assert error.exit_code == 3
    assert "train-00000.bin" in error.problem


def test_a_start_that_its_loggers_refuse_is_none(tmp_path, sentences):
    """Else starts.jsonl would have it as killed."""
    (tmp_path / "tensorboard").write_text("a file where the folder has to be")
    _, error = run(config_for(tmp_path, sentences, logging={"interval_steps": 5, "tensorboard": True}), ranks=1)
    assert error is not None
    assert read_lines(tmp_path / "starts.jsonl") == []


def test_a_gpu_that_is_not_there(tmp_path, sentences):
    _, error = run(config_for(tmp_path, sentences, training={"device": "cuda"}), ranks=1)
    assert error.exit_code == 6
    assert "device=cpu" in error.fix


def test_a_run_folder_that_cannot_be_made(tmp_path, sentences):
    (tmp_path / "file").write_text("not a folder")
    _, error = run(config_for(tmp_path / "file" / "run", sentences))
    assert error.exit_code == 6


def test_no_space_left_in_a_save(tmp_path, sentences):
    """A real limit on file size stands in for a full disk; the checkpoint before stays the newest."""
    config = config_for(tmp_path, sentences)
    assert run(config, stop_at_step=10) == ("interrupted", None)
    before = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    before += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))"
    _, error = run(config, ranks=2, before=before)
    assert error.exit_code == 6
    assert "step 20" in error.problem
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000010\n"
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"
    assert run(config) == ("done", None)


FULL = (
    "log = next(hook for hook in trainer.hooks if hasattr(hook, 'loggers')).loggers[0]; "
    "log.file.close(); log.file = open('/dev/full', 'ab', buffering=0); "
)


def test_a_disk_that_is_full_for_a_while_under_the_log(tmp_path, sentences):
    """Its lines are written when there is room again."""
    before = f"""{FULL}
one = log.log
def with_room_later(metrics):
    if metrics["step"] == 15:
        log.file = open({str(tmp_path / "metrics.jsonl")!r}, "ab", buffering=0)
    one(metrics)
log.log = with_room_later
"""
    assert run(config_for(tmp_path, sentences), ranks=1, before=before) == ("done", None)
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 15, 20]


def test_a_disk_that_stays_full_under_the_log(tmp_path, sentences):
    before = "import loopmem_pretrain.training.loggers as loggers; loggers.MOST_UNWRITTEN = 3000; " + FULL
    _, error = run(config_for(tmp_path, sentences), ranks=1, before=before)
    assert error.exit_code == 6
    assert "No space left" in error.problem
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_a_run_folder_in_use(tmp_path, sentences):
    from loopmem_pretrain.lock import take_lock

    config = config_for(tmp_path, sentences)
    with take_lock(tmp_path / ".lock", "", ""):
        _, error = run(config)
        assert error.exit_code == 6
        assert "another process is training" in error.problem
    assert run(config) == ("done", None)


def test_the_logged_loss_is_a_mean_also_under_a_cyclic_ponder_weight(tmp_path, sentences):
    for interval in (1, 10):
        training = {"train_steps": 10, "ponder_schedule": "cyclic", "ponder_period": 10}
        logging = {"interval_steps": interval}
        run(
            config_for(
                tmp_path / str(interval), sentences, training=training, model={"ponder_weight": 0.3}, logging=logging
            )
        )
    each, (whole,) = lines(tmp_path / "1"), lines(tmp_path / "10")
    assert len(each) == 10
    for key in ("loss", "cross_entropy", "ponder_loss", "ponder_cost"):
        assert whole[key] == pytest.approx(sum(line[key] for line in each) / 10, rel=1e-5), key
    for line in each:
        assert line["ponder_loss"] == pytest.approx(line["ponder_weight"] * line["ponder_cost"], rel=1e-5)
        expected = sum(e - 1 for e in line["expected_loops"]) / 2 / 2
        assert line["ponder_cost"] == pytest.approx(expected, rel=1e-5)


def test_alarms(tmp_path, sentences):
    alarms = {"after_steps": 0, "min_expected_loops": 2.9, "min_gate": 0.9}
    handler = f"logging.FileHandler({str(tmp_path / 'log')!r})"
    before = f"import logging; logging.getLogger('loopmem_pretrain').addHandler({handler})"
    run(config_for(tmp_path, sentences, alarms=alarms, training={"train_steps": 10}), before=before)
    said = (tmp_path / "log").read_text()
    assert said.count("halting of layer 0 is stuck at one loop") == 1
    assert "local_gate of layer 1 does not open" in said


def test_conversion_with_another_tokenizer_is_refused(tmp_path, sentences):
    from loopmem_pretrain.errors import DataError
    from loopmem_pretrain.hf.convert import convert_run
    from tests.prepared import prepare_sentences

    shutil.copytree(sentences, tmp_path / "data" / "tokens")
    run(config_for(tmp_path / "run", tmp_path / "data" / "tokens", training={"train_steps": 4}))
    shutil.rmtree(tmp_path / "data")
    prepare_sentences(tmp_path / "data", seed=2)
    with pytest.raises(DataError, match="tokenizer"):
        convert_run(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(1, "bf16"), (3, "fp32"), *(pytest.param(stage, "fp32", marks=pytest.mark.slow) for stage in (1, 2))],
)
def test_conversion_of_every_stage(tmp_path, sentences, zero_stage, precision):
    from loopmem_pretrain.hf.convert import convert_run

    training = {"train_steps": 10, "precision": precision}
    config = config_for(tmp_path / "run", sentences, parallel={"zero_stage": zero_stage}, training=training)
    run(config)
    said = convert_run(tmp_path / "run", tmp_path / "hf")
    assert "step 10" in said
    import torch
    from safetensors.torch import load_file

    from loopmem_pretrain.hf.load import load_hf

    model, _ = load_hf(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert "model.layers.1.memory.local_keys" in weights
    assert all(torch.isfinite(value).all() for value in weights.values())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "10 steps, " in card and "| validation |" in card and f"loopmem eval . --data {sentences}" in card
    # The trained model, not its initial weights: its loss on the validation samples is the run's own.
    from loopmem_pretrain.data.dataset import open_validation

    samples = torch.stack([torch.as_tensor(open_validation(config.data, 8)[index]) for index in range(8)])
    with torch.no_grad():
        logits = model(input_ids=samples[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()
    # Validation under bf16 computes in bf16; the export holds the float32 master weights.
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert loss == pytest.approx(lines(tmp_path / "run")[-1]["validation_loss"], rel=tolerance)
