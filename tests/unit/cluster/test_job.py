"""The batch script of a training job: what it starts, and what becomes of it, without SLURM."""

import signal

import pytest
import yaml

from loopmem_pretrain.cluster import health, slurm
from loopmem_pretrain.cluster.job import Ending, Job, parser, step_command, train_command
from loopmem_pretrain.cluster.slurm import Allocation
from loopmem_pretrain.cluster.step import environment
from loopmem_pretrain.errors import EnvironmentFault

HERE = Allocation(job="7", restart=0, nodes=["n1", "n2"], tasks_per_node=4, cpus_per_task=8)


def test_every_task_sees_all_gpus_of_its_node(monkeypatch):
    """NCCL finds NVLink between GPUs that one process sees."""
    options = parser().parse_args(["--run-dir", "/runs/a #1: b", "--config", "c.yaml"])
    assert not any("gpus" in word for word in step_command(options, HERE, HERE.nodes))
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    command = step_command(options, HERE, HERE.nodes)
    assert "--gpus-per-node=4" in command and "SLURM_GPUS_PER_TASK" not in environment(HERE, HERE.nodes)


@pytest.mark.parametrize(
    ("asked", "terminated", "state", "verdict"),
    [
        ("the job was asked to end (SIGTERM)", True, "RUNNING", "preempted"),
        ("the time of the job is nearly over (SIGUSR1)", False, "RUNNING", "interrupted"),
        ("", False, "CANCELLED", "ended"),  # steps may be told before the batch script
        ("", False, "RUNNING", "failed"),
    ],
)
def test_a_burn_in_that_is_cut_off_does_not_speak_of_the_network(
    tmp_path, monkeypatch, asked, terminated, state, verdict
):
    job = Job.__new__(Job)
    job.options, job.run_dir, job.here, job.folder, job.nodes = None, tmp_path, HERE, tmp_path, HERE.nodes
    job.asked, job.was_terminated = "", False

    def cut_off(options, here, folder):
        job.asked, job.was_terminated = asked, terminated
        raise EnvironmentFault("the network between them does not work", "see NCCL_DEBUG=INFO")

    monkeypatch.setattr(health, "check_nodes", cut_off)
    monkeypatch.setattr("loopmem_pretrain.cluster.slurm.show_job", lambda number: {"JobState": state})
    assert job._check_and_train().verdict == verdict


@pytest.mark.parametrize(
    ("mode", "verdict", "bad_nodes", "told", "code"),
    [
        ("requeue", "done", [], [], 5),
        ("requeue", "interrupted", [], ["requeue 7", "end"], None),
        ("requeue", "lost nodes", ["n1"], ["requeue 7 without n1", "end"], None),
        ("requeue", "paused", [], ["requeue 7, hold", "end"], None),
        ("requeue", "ended", [], [], 5),
        ("chain", "failed", [], ["scancel 8"], 5),
        ("chain", "interrupted", [], [], 5),
        ("chain", "lost nodes", ["n1"], ["scontrol update JobId=8 ExcNodeList=n1"], 5),
        ("chain", "paused", [], ["scontrol hold 8"], 0),
        ("chain", "ended", [], ["scancel 8"], 5),
        ("no", "interrupted", [], [], 5),
        ("no", "paused", [], [], 5),
    ],
)
def test_what_becomes_of_the_job(tmp_path, monkeypatch, mode, verdict, bad_nodes, told, code):
    job = Job.__new__(Job)
    job.options = parser().parse_args(["--run-dir", str(tmp_path), "--config", "c.yaml", "--continue", mode])
    job.run_dir, job.here, job.successor = tmp_path, HERE, "8" if mode == "chain" else None
    said = []

    def end():
        said.append("end")
        raise SystemExit

    monkeypatch.setattr("loopmem_pretrain.cluster.job._wait_for_the_end", end)
    monkeypatch.setattr(slurm, "show_job", lambda number: {"JobState": "CANCELLED"})
    monkeypatch.setattr(slurm, "complaint_after", lambda *command: said.append(" ".join(command)) or "")
    monkeypatch.setattr(slurm, "put_back", lambda number, hold=False: said.append(f"requeue {number}{', hold' * hold}"))
    monkeypatch.setattr(slurm, "hold_without", lambda number, bad: said.append(f"requeue {number} without {bad[0]}"))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    try:
        assert job._go_on(Ending(verdict, "a reason", 5, bad_nodes)) == code
    except SystemExit:
        assert code is None
    assert said == told


def test_a_run_folder_with_signs_of_yaml():
    options = parser().parse_args(["--run-dir", "/runs/a #1: b", "--config", "c.yaml"])
    assert yaml.safe_load(train_command(options)[-1].removeprefix("run_dir=")) == "/runs/a #1: b"
