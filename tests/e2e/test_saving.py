"""Checkpoints written while training goes on: whole, of one moment; a save that fails is told and tried again."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from loopmem_pretrain.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from loopmem_pretrain.checkpoint.store import hash_files
from loopmem_pretrain.config.load import dump_config
from tests.e2e.test_training import config_for, exact, lines, run

SLOWLY = """
import threading, time, torch, loopmem_pretrain.checkpoint.saving as saving
copy, write, wait_for_copy = saving._Save._copy, saving._Save._write, saving.Saver._wait_for_copy
update = threading.Event()
saving.Saver._wait_for_copy = lambda saver: (update.set(), wait_for_copy(saver))[1]
saving._Save._copy = lambda save: (update.clear(), update.wait(0 if save.buffers is None else 5), copy(save))[2]
saving._Save._write = lambda save: (time.sleep(1), write(save))[1]
"""
TO_A_FILE = "import logging; logging.getLogger('loopmem_pretrain').addHandler(logging.FileHandler({!r}))"


def newest(run_dir):
    return (run_dir / "checkpoints" / "latest").read_text().strip()


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        ({}, "bf16"),
        ({"zero_stage": 2}, "fp32"),
        ({"zero_stage": 3}, "bf16"),
        ({"pipeline_model_parallel_size": 2}, "fp32"),
        pytest.param({"tensor_model_parallel_size": 2}, "bf16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_written_late_is_of_the_step_it_was_taken_at(tmp_path, sentences, parallel, precision):
    config = config_for(tmp_path, sentences, parallel=parallel, training={"precision": precision})
    # Step 11 is about to change the weights when step 10's are copied; steps 11 to 20 are done before a byte is there.
    assert run(config, first=SLOWLY) == ("done", None)
    whole = exact(tmp_path)
    probe = json.loads((tmp_path / "checkpoints" / "step_00000010" / "probe.json").read_text())
    assert len(probe["tokens"]) == config.training.micro_batch_size  # of step 11, not the held-out sample
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000020")
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert run(config) == ("done", None)
    assert exact(tmp_path) == [line for line in whole if line["step"] > 10]


def test_saving_without_a_thread_beside_training(tmp_path, sentences):
    impatient = "import loopmem_pretrain.training.hooks as hooks; hooks.LONG_ENOUGH = 0; hooks.MUCH = 1e-6\n"
    for asynchronous in (True, False):
        config = config_for(tmp_path / str(asynchronous), sentences, checkpoint={"asynchronous": asynchronous})
        logged = TO_A_FILE.format(str(tmp_path / f"log {asynchronous}"))
        assert run(config, first=impatient + logged) == ("done", None)
        said = (tmp_path / f"log {asynchronous}").read_text()
        assert said.count("s for checkpoints, more than") == 1
        assert ("checkpoint.asynchronous=true" in said) is not asynchronous
    for step in ("step_00000010", "step_00000020"):
        manifests = [read_manifest(tmp_path / each / "checkpoints" / step) for each in ("True", "False")]
        files, others = (manifest["files"] for manifest in manifests)
        assert list(files) == list(others) and len(files) > 5
        assert {"loss_on_sample", "collect", "copy", "write", "flush_and_hash"} == set(manifests[0]["seconds"])
        assert manifests[0]["validation_loss"] == pytest.approx(manifests[1]["validation_loss"])
    assert lines(tmp_path / "True")[-1]["saving_seconds"] > 0


FAILS_ONCE = """
import loopmem_pretrain.checkpoint.saving as saving
saving.GRACE = 1
write = saving._Save._write
def failing(save):
    if save.rank == 1 and save.step in {steps}:
        raise OSError(28, "No space left on device")
    write(save)
saving._Save._write = failing
"""


def test_a_save_that_fails_is_told_and_tried_again(tmp_path, sentences):
    config = config_for(tmp_path / "run", sentences, checkpoint={"interval_steps": 4}, logging={"interval_steps": 1})
    logged = TO_A_FILE.format(str(tmp_path / "log"))
    # Twice, but not in a row: what was written between was whole, and less than two intervals could be lost.
    assert run(config, first=FAILS_ONCE.format(steps={8, 16}) + logged) == ("done", None)
    said = (tmp_path / "log").read_text()
    assert "cannot save the checkpoint of step 8" in said and "rank 1: OSError: [Errno 28]" in said
    assert "the run goes on and tries again" in said
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert steps == ["step_00000004", "step_00000012", "step_00000020"]


def test_saves_that_fail_twice_in_a_row_end_the_run(tmp_path, sentences):
    config = config_for(tmp_path, sentences, checkpoint={"interval_steps": 4}, logging={"interval_steps": 1})
    _, error = run(config, first=FAILS_ONCE.format(steps={8, 12, 16}))
    assert error.exit_code == 6
    assert "step 12" in error.problem and "No space left" in error.problem
    assert newest(tmp_path) == "step_00000004"
    assert run(config) == ("done", None)


def test_a_folder_that_cannot_be_written_in_the_middle(tmp_path, sentences):
    config = config_for(tmp_path, sentences, checkpoint={"interval_steps": 5})
    first = """
import os, loopmem_pretrain.checkpoint.saving as saving
make = saving.make_folder
def read_only(store, step, token):
    if step == 10:
        raise saving.EnvironmentFault(f"cannot save the checkpoint of step {step}", "")
    make(store, step, token)
saving.make_folder = read_only
"""
    assert run(config, first=first) == ("done", None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == [
        "step_00000005",
        "step_00000015",
        "step_00000020",
    ]


GIVES_UP = """
from loopmem_pretrain.errors import TrainingGaveUp
train_batch = trainer.engine.train_batch
def failing(batches, step):
    if step == {step}:
        raise TrainingGaveUp("enough", "")
    return train_batch(batches, step)
trainer.engine.train_batch = failing
"""


def test_a_run_that_gives_up_leaves_the_save_under_way_whole(tmp_path, sentences):
    config = config_for(tmp_path, sentences)
    no_update_follows = SLOWLY.replace("else 5", "else 1")
    _, error = run(config, first=no_update_follows, before=GIVES_UP.format(step=10))
    assert error.exit_code == 7
    assert newest(tmp_path) == "step_00000010"
    assert not (tmp_path / "checkpoints" / "step_00000010" / "probe.json").exists()  # no step has followed
    assert run(config) == ("done", None)


SLOWLY_AND_TOLD_TO_GO = """
import os, signal, threading, time
import loopmem_pretrain.checkpoint.saving as saving
rank_0, write, close = os.environ["RANK"] == "0", saving._Save._write, saving.Saver.close
def closing(saver):
    if rank_0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    close(saver)
saving._Save._write = lambda save: (time.sleep(2 if rank_0 else 2.5), write(save))
saving.GRACE, saving.Saver.close = 5, closing
"""


def test_a_save_comes_to_its_end_though_the_launcher_says_sigterm(tmp_path, sentences):
    """As it does when the first rank of a run that gave up has gone; the others may take longer to write."""
    _, error = run(config_for(tmp_path, sentences), first=SLOWLY_AND_TOLD_TO_GO, before=GIVES_UP.format(step=10))
    assert error.exit_code == 7
    assert newest(tmp_path) == "step_00000010"


def test_waiting_for_a_copy_is_no_training_time(tmp_path, sentences):
    slow_copy = """
import time, loopmem_pretrain.checkpoint.saving as saving
copy = saving._Save._copy
saving._Save._copy = lambda save: (time.sleep(4 if save.step == 10 else 0), copy(save))
"""
    assert run(config_for(tmp_path, sentences, logging={"interval_steps": 5}), first=slow_copy) == ("done", None)
    after = next(line for line in lines(tmp_path) if line["step"] == 15)
    assert after["saving_seconds"] > 3
    assert 5 * after["seconds_per_step"] < 3


def test_a_save_that_fails_while_the_run_gives_up_is_told(tmp_path, sentences):
    config = config_for(tmp_path / "run", sentences, checkpoint={"interval_steps": 4})
    logged = TO_A_FILE.format(str(tmp_path / "log"))
    _, error = run(config, first=FAILS_ONCE.format(steps={8}) + logged, before=GIVES_UP.format(step=8))
    assert error.exit_code == 7
    said = (tmp_path / "log").read_text()
    assert "the checkpoint of step 8 is not saved: rank 1: OSError: [Errno 28] No space left on device" in said
    assert newest(tmp_path / "run") == "step_00000004"


def test_a_save_that_another_rank_does_not_finish_is_told(tmp_path, sentences):
    config = config_for(tmp_path / "run", sentences)
    silent = """
import os, loopmem_pretrain.checkpoint.saving as saving
saving.GRACE = 1
if os.environ["RANK"] == "1":
    saving._Save._write = lambda save: None
"""
    first = silent + TO_A_FILE.format(str(tmp_path / "log"))
    _, error = run(config, first=first, before=GIVES_UP.format(step=10))
    assert error.exit_code == 7
    told = "the checkpoint of step 10 is not saved: rank 0: 1 of 2 ranks have not written their part"
    assert told in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_weights_that_give_no_finite_loss_are_not_saved(tmp_path, sentences):
    """Finite, but too large: every loss is NaN, so no step is applied and no weight changes."""
    config = config_for(tmp_path, sentences, checkpoint={"interval_steps": 4})
    before = """
import torch
train_batch = trainer.engine.train_batch
def spoiled(batches, step):
    if step == 6:
        with torch.no_grad():
            for parameter in trainer.engine.engine.module.parameters():
                parameter.mul_(1e25)
    return train_batch(batches, step)
trainer.engine.train_batch = spoiled
"""
    _, error = run(config, before=before)
    # The second save in a row: the micro-batch after the first might have been to blame.
    assert error.exit_code == 7 and "step 12" in error.problem and "not saved" in error.problem
    assert newest(tmp_path) == "step_00000004"
    assert run(config) == ("done", None)


def test_what_one_rank_alone_does_not_see_is_no_damage(tmp_path, sentences):
    """A shared file system may be behind: nothing is renamed, the start ends and may be repeated."""
    config = config_for(tmp_path, sentences)
    assert run(config, stop_at_step=10) == ("interrupted", None)
    behind = """
import os, loopmem_pretrain.checkpoint.choose as choose
if os.environ["RANK"] == "1":
    choose.damage = lambda *_: ["probe.json: missing"]
"""
    _, error = run(config, first=behind)
    assert (
        error.exit_code == 6 and "other ranks see damage where rank 0 sees none: probe.json: missing" in error.problem
    )
    assert newest(tmp_path) == "step_00000010"
    assert run(config) == ("done", None)


def test_an_older_checkpoint_chosen_by_hand_leaves_the_later_branch(tmp_path, sentences):
    config = config_for(tmp_path, sentences, checkpoint={"interval_steps": 5})
    assert run(config, stop_at_step=15) == ("interrupted", None)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000005\n")
    assert run(config, stop_at_step=7) == ("interrupted", None)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*step*"))
    aside = ["abandoned-step_00000010-at-5", "abandoned-step_00000015-at-5"]
    assert names == [*aside, "step_00000005", "step_00000007"]


@pytest.fixture
def stopped(tmp_path, sentences):
    wandb, four_ranks = {"wandb": "offline"}, {"micro_batch_size": 2}
    config = config_for(tmp_path / "run", sentences, logging=wandb, training=four_ranks)
    assert run(config, stop_at_step=10) == ("interrupted", None)
    return config, tmp_path / "run" / "checkpoints" / "step_00000010"


def rehash(checkpoint, name):
    """As if the file had been written like this."""
    manifest = read_manifest(checkpoint)
    manifest["files"] |= hash_files(checkpoint, [name])
    (checkpoint / MANIFEST).write_bytes(encode_manifest(manifest))


def test_a_model_that_computes_something_else_is_refused(stopped):
    config, checkpoint = stopped
    probe = json.loads((checkpoint / "probe.json").read_text())
    assert [len(row) for row in probe["tokens"]] == [17]
    probe["loss"] *= 1.01
    (checkpoint / "probe.json").write_text(json.dumps(probe))
    rehash(checkpoint, "probe.json")
    _, error = run(config)
    assert error.exit_code == 4
    assert "on the stored sample" in error.problem


def test_what_else_is_restored_and_what_is_not(stopped, tmp_path):
    config, _ = stopped
    wandb_id = tmp_path / "run" / "wandb_id"
    before = wandb_id.read_text()
    wandb_id.unlink()
    drawn = """
import random, torch, numpy
open(f'{folder}/{trainer.rank}', 'w').write(repr((random.random(), torch.rand(2).tolist(), numpy.random.rand())))
"""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / "run", tmp_path / f"run {name}")
        moved = config.model_copy(update={"run_dir": str(tmp_path / f"run {name}")})
        disturbed = "import random, torch, numpy; random.seed(5); torch.manual_seed(5); numpy.random.seed(5)"
        draw = drawn.replace("{folder}", str(tmp_path / name))
        assert run(moved, first=disturbed if name == "b" else "", before=draw) == ("done", None)
        assert (tmp_path / f"run {name}" / "wandb_id").read_text() == before
    for rank in ("0", "1"):
        assert (tmp_path / "a" / rank).read_text() == (tmp_path / "b" / rank).read_text()

    logged = TO_A_FILE.format(str(tmp_path / "log"))
    assert run(config, ranks=4, first=logged) == ("done", None)
    said = (tmp_path / "log").read_text()
    assert "not restored: states of the random generators torch, cuda, numpy, python of rank 3" in said
    assert "not restored: states of the random generators torch, cuda, numpy, python of rank 1" not in said


def test_interrupted_twice_during_a_save_ends_at_once(tmp_path, sentences):
    """The thread that writes is inside torch then, which aborts a process that ends in order."""
    config = config_for(tmp_path / "run", sentences, checkpoint={"interval_steps": 4}, logging={"interval_steps": 1})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    code = """
import os, signal, sys, time, torch, loopmem_pretrain.checkpoint.saving as saving
def write(save):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        torch.save(torch.zeros(1_000_000), save.folder / "large")
saving._Save._write = write
from loopmem_pretrain.cli import main
sys.exit(main(["train", "--config", sys.argv[1]]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert ended.returncode == 130 and "interrupted at once" in ended.stderr
