"""Weights of a Hugging Face folder begin a run at any sizes: the same bits, the same loss, and training goes on."""

import hashlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from loopmem_pretrain.checkpoint.manifest import read_manifest
from loopmem_pretrain.checkpoint.reshape import reshape
from loopmem_pretrain.checkpoint.store import CheckpointStore, verify
from loopmem_pretrain.checkpoint.universal import fp32_weights
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.data.dataset import open_training
from loopmem_pretrain.errors import ConfigError, DataError, EnvironmentFault
from loopmem_pretrain.hf.convert import convert_run, history, import_from_hf, open_checkpoint
from loopmem_pretrain.hf.source import open_source
from loopmem_pretrain.lock import take_lock
from loopmem_pretrain.tools.checkpoints import show_checkpoint
from tests.dense_models import dense_model, save_dense
from tests.distributed import run_command
from tests.e2e.test_reshape import LAYOUTS
from tests.e2e.test_training import config_for, lines, run

# A vocabulary that is no multiple of two tensor-parallel ranks, biases everywhere, norms before the rotation.
DENSE = {"vocab_size": 321, "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_bias": True}


def run_config(run_dir, sentences, source, layout="one", **sections):
    """A run whose model is that of the folder, with loops and banks."""
    parallel, ranks = LAYOUTS[layout]
    fields = {**open_source(source).fields, "ponder_weight": 0.0}
    if "max_loops" not in fields:
        fields |= {"max_loops": 3, "local_slots": 8, "global_slots": 4}
    batches = {"train_steps": 5, "micro_batch_size": 2, "global_batch_size": 12}
    sections["training"] = batches | sections.get("training", {})
    config = config_for(
        run_dir,
        sentences,
        model=fields,
        parallel=parallel,
        optimizer={"lr": 3e-3},
        logging={"interval_steps": 1, "peak_tflops": 0.05},
        **sections,
    )
    return config, ranks


def begin(tmp_path, config, source):
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    return import_from_hf(source, file)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "qwen3", "qwen3", **DENSE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sentences, dense):
    """The run that the dense model began, exported before its first step."""
    folder = tmp_path_factory.mktemp("exported")
    begin(folder, run_config(folder / "run", sentences, dense)[0], dense)
    convert_run(folder / "run", folder / "out")
    return folder / "out"


# ----------------------------------------------------------------------------------------------------- there and back


def test_export_import_export_changes_no_bit(tmp_path, sentences, exported):
    config, _ = run_config(tmp_path / "run", sentences, exported)
    said = begin(tmp_path, config, exported)
    assert "exit_threshold" not in said
    assert "logits differ by at most 0.0e+00" in said and "this is step 0 of a new run" in said
    assert f"the tokenizer in {exported} gives the tokens of {sentences}" in said
    verify(tmp_path / "run" / "checkpoints" / "step_00000000")
    convert_run(tmp_path / "run", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(exported) != {}


def test_an_export_that_leaves_layers_early(tmp_path, sentences, exported):
    """How it generates is no part of what a run trains, and says nothing of its weights."""
    source = shutil.copytree(exported, tmp_path / "early")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "exit_threshold": 0.5, "exit_rule": "confidence"}))
    said = begin(tmp_path, run_config(tmp_path / "run", sentences, source)[0], source)
    assert "logits differ by at most 0.0e+00" in said
    assert "exit_threshold 0.5 of its config.json is not taken over" in said


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tp2 zero3"]


@pytest.mark.parametrize("layout", ["tp2 zero3", *SLOW])
def test_any_sizes_load_and_save_the_same_bits(tmp_path, sentences, exported, layout):
    config, ranks = run_config(tmp_path / "run", sentences, exported, layout)
    begin(tmp_path, config, exported)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000000"
    before = dict(fp32_weights(checkpoint))
    save_and_stop = "trainer.saver.save(wait=True); trainer.stop_at_step = 0"
    assert run(config, ranks, before=save_and_stop) == ("interrupted", None)
    assert "form" not in read_manifest(checkpoint)
    assert read_manifest(checkpoint)["origin"] == {"folder": str(exported.resolve()), "model_type": "loopmem"}
    after = dict(fp32_weights(checkpoint))
    assert set(before) == set(after)
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


# -------------------------------------------------------------------------------------------------------- training on


def first_loss(config, model):
    """Mean cross-entropy of a model of transformers over the run's first batch."""
    dataset = open_training(config.data, config.training.seed, config.model.vocab_size)
    batch = torch.stack([torch.as_tensor(dataset[index]) for index in range(config.training.global_batch_size)])
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("tp2 pp2", "fp32"),
        pytest.param("one", "fp32", marks=pytest.mark.slow),
        pytest.param("tp2 sharded", "fp32", marks=pytest.mark.slow),
        pytest.param("dp3 zero3", "fp32", marks=pytest.mark.slow),
        pytest.param("tp2 dp2 zero3", "bf16", marks=pytest.mark.slow),
        pytest.param("dp2 zero2", "bf16", marks=pytest.mark.slow),
    ],
)
def test_training_begins_with_the_dense_loss_and_goes_on(tmp_path, sentences, dense, layout, precision):
    config, ranks = run_config(tmp_path / "run", sentences, dense, layout, training={"precision": precision})
    begin(tmp_path, config, dense)
    assert run(config, ranks) == ("done", None)
    logged = lines(tmp_path / "run")
    expected = first_loss(config, dense_model("qwen3", **DENSE))
    assert logged[0]["step"] == 1
    assert logged[0]["loss"] == pytest.approx(expected, abs=1e-5 if precision == "fp32" else 3e-2)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3
    assert logged[0]["expected_loops"] == pytest.approx([1 + 4.54e-5] * 4, abs=1e-6)
    assert CheckpointStore(tmp_path / "run").steps()[-1] == 5
    # Where the run began is still known: after its training, and in the form that other sizes read.
    origin = {"folder": str(dense.resolve()), "model_type": "qwen3"}
    for last in (CheckpointStore(tmp_path / "run").latest(), reshape(tmp_path / "run", tmp_path / "merged")):
        assert read_manifest(last)["origin"] == origin
        assert history(open_checkpoint(last)).origin == origin
        assert f"began from        {dense.resolve()} (qwen3)" in show_checkpoint(last)


@pytest.mark.slow
def test_the_first_steps_are_those_of_a_fresh_optimizer(tmp_path, sentences, dense):
    """Steps after an import are bit for bit those of a run whose own initial weights are the imported ones."""
    config, _ = run_config(tmp_path / "run", sentences, dense, training={"train_steps": 3})
    begin(tmp_path, config, dense)
    fresh = config.model_copy(update={"run_dir": str(tmp_path / "fresh")})
    assert run(config, 1) == ("done", None)
    weights = dict(fp32_weights(tmp_path / "run" / "checkpoints" / "step_00000000"))
    torch.save(weights, tmp_path / "weights.pt")
    initial = f"""
import torch, loopmem_pretrain.training.engine as engine
weights = torch.load({str(tmp_path / "weights.pt")!r})
def initialize(named, *rest):
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(weights[name])
engine.initialize = initialize
"""
    assert run(fresh, 1, first=initial) == ("done", None)
    losses = [[(line["loss"], line["grad_norm"]) for line in lines(tmp_path / name)] for name in ("run", "fresh")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_run_begins_only_once(tmp_path, sentences, dense):
    config, _ = run_config(tmp_path / "run", sentences, dense)
    begin(tmp_path, config, dense)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match="is a run folder already"):
        begin(tmp_path, config, dense)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_a_file_in_place_of_the_run(tmp_path, sentences, dense):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        begin(tmp_path, run_config(tmp_path / "run", sentences, dense)[0], dense)


def test_not_under_a_process_that_trains(tmp_path, sentences, dense):
    (tmp_path / "run").mkdir()
    config, _ = run_config(tmp_path / "run", sentences, dense)
    with (
        take_lock(tmp_path / "run" / ".lock", "", ""),
        pytest.raises(EnvironmentFault, match="is training") as refusal,
    ):
        begin(tmp_path, config, dense)
    assert "--out" not in refusal.value.fix, "which convert --from-hf does not have"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_vocabulary_that_is_too_small(tmp_path, sentences):
    source = save_dense(tmp_path / "small", "llama", vocab_size=300)
    config, _ = run_config(tmp_path / "deep" / "run", sentences, source)
    with pytest.raises(DataError, match=r"wrong tokenizer: .* has 320 tokens, the weights .* have rows for 300"):
        begin(tmp_path, config, source)
    assert not (tmp_path / "deep").exists()


def test_another_tokenizer(tmp_path, sentences, exported):
    source = shutil.copytree(exported, tmp_path / "other")
    values = json.loads((source / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:20]
    (source / "tokenizer.json").write_text(json.dumps(values))
    config, _ = run_config(tmp_path / "deep" / "run", sentences, source)
    with pytest.raises(DataError, match=r"wrong tokenizer: .* give other tokens for validation sample 0"):
        begin(tmp_path, config, source)
    assert not (tmp_path / "deep").exists()


def test_two_at_once_leave_each_other_alone(tmp_path, sentences, dense):
    config, _ = run_config(tmp_path / "run", sentences, dense)
    incomplete = tmp_path / "run" / "checkpoints" / ".incomplete-step_00000000"
    incomplete.mkdir(parents=True)
    with take_lock(tmp_path / "run" / ".lock", "", ""), pytest.raises(EnvironmentFault, match="is training"):
        begin(tmp_path, config, dense)
    assert incomplete.exists()
    begin(tmp_path, config, dense)  # left by one that was killed
    assert sorted(path.name for path in incomplete.parent.iterdir()) == ["latest", "step_00000000"]


@pytest.mark.parametrize("failure", ["compare", "publish"])
def test_nothing_is_left_of_an_import_that_fails(tmp_path, sentences, dense, monkeypatch, failure):
    config, _ = run_config(tmp_path / "deep" / "run", sentences, dense)
    if failure == "compare":
        monkeypatch.setattr("loopmem_pretrain.hf.importing.LOSS_TOLERANCE", -1.0)
        error, message = "ConversionError", "computes something else"
    else:
        monkeypatch.setattr("loopmem_pretrain.checkpoint.first.hash_files", lambda *given: 1 / 0)
        error, message = "ZeroDivisionError", "division"
    with pytest.raises(Exception, match=message) as caught:
        begin(tmp_path, config, dense)
    assert type(caught.value).__name__ == error
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_the_command(tmp_path, sentences, dense):
    config, _ = run_config(tmp_path / "run", sentences, dense)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    wrong = run_command("convert", "--from-hf", dense, file, "model.qk_norm=none")
    assert wrong.returncode == 2 and "model.qk_norm: none, the weights need before_rope" in wrong.stderr
    done = run_command("convert", "--from-hf", dense, file, f"run_dir={tmp_path}/named")
    assert done.returncode == 0, done.stderr
    assert f"loopmem train --config {file} run_dir={tmp_path}/named` continues from here" in done.stdout
    shown = run_command("checkpoint", "show", tmp_path / "named")
    assert f"{dense.resolve()} (qwen3)" in shown.stdout
    trained = run_command("train", "--config", file, f"run_dir={tmp_path}/named", "--stop-at-step", "1")
    assert "at step 0; loss on the stored sample" in trained.stderr
    assert run_command("convert", "--from-hf", dense, file, "--dtype", "bfloat16").returncode == 2
    assert run_command("convert", tmp_path / "named", tmp_path / "out", "model.max_loops=2").returncode == 2
