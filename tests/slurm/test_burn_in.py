"""`--health full` in a job: matrix products and an all-reduce by real ranks before the stub trains."""

import json
import sys

import pytest

from loopmem_pretrain.config.load import dump_config
from tests.configs import tiny_run
from tests.slurm.runs import ROOT, Run

pytestmark = pytest.mark.slow
FULL = {"HEALTH": "full", "OMP_NUM_THREADS": 1, "SRUN_OPTIONS": "--wait=20"}
"""The ranks that wait for one that has failed are given up soon."""

ONE_RANK = ("--ntasks-per-node=1", "--gpus-per-node=1")

CHECK = """
import argparse, json, pathlib, sys
from loopmem_pretrain.cluster import burn_in, slurm
from loopmem_pretrain.errors import EnvironmentFault
burn_in.LIMIT = 4
here = slurm.allocation()
options = argparse.Namespace(srun="", wrap="", python=sys.argv[1], config="none", arguments=[])
try:
    bad = burn_in.check_nodes(options, here, here.nodes, pathlib.Path(sys.argv[2]))
except EnvironmentFault as fault:
    bad = fault.problem
print(json.dumps([bad, slurm.steps(here.job, burn_in.STEP)]))
"""


@pytest.fixture
def run(cluster, tmp_path):
    """Its GPUs are only counted, so it has a configuration that wants none."""
    (tmp_path / "config.yaml").write_text(dump_config(tiny_run(tmp_path / "run", "data")))
    return Run(cluster, tmp_path)


def reports(run, restart):
    folder = run.folder / "logs" / f"{run.job}.{restart}" / "burn-in"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def test_healthy_nodes_train(run):
    run.submit(**FULL, CONFIG="config.yaml")
    assert run.cluster.wait(run.job, seconds=120) == "COMPLETED"
    assert run.verdicts() == ["done"], run.log()
    assert "all-reduce over 4 ranks: " in run.log()
    assert [report["node"] for report in reports(run, 0)] == ["node1", "node1", "node2", "node2"]
    assert all(report["tflops"] > 0 and report["gb_per_second"] > 0 for report in reports(run, 0))


def test_nodes_whose_gpus_cannot_be_used_are_unfit(run):
    run.submit("training.device=auto", **FULL, CONFIG="config.yaml")
    assert run.cluster.wait(run.job, seconds=120) == "FAILED"
    assert run.verdicts() == ["failed"] and "no node is fit" in run.log()
    assert "node2 is left out: GPUs were granted (CUDA_VISIBLE_DEVICES=0,1)" in run.log()
    assert run.trained() == []


def test_a_slow_node_is_named_and_left_out(run):
    run.fault(node="node2", burn_in="slow", rank=None)
    run.submit(**FULL, CONFIG="config.yaml", options=ONE_RANK)
    assert run.cluster.wait(run.job, seconds=180) == "COMPLETED"
    assert run.verdicts() == ["lost nodes", "done"], run.log()
    assert "node2 is left out: a matrix product runs at " in run.log()
    assert run.starts()[1]["bad_nodes"] == ["node2"] and "node2" not in run.starts()[2]["nodes"]
    assert [report["node"] for report in reports(run, 1)] == run.starts()[2]["nodes"]


def test_a_spare_node_steps_in_for_one_that_fails(run):
    run.fault(node="node1", burn_in="exit", rank=None)
    run.submit(**FULL, CONFIG="config.yaml", SPARE_NODES=1, options=(*ONE_RANK, "--nodes=3"))
    assert run.cluster.wait(run.job, seconds=120) == "COMPLETED"
    assert run.verdicts() == ["done"], run.log()
    assert "node1 is left out: 1 of 1 ranks did not finish a matrix product" in run.log()
    assert "the all-reduce has not come to an end on any rank" in run.log()
    assert "uncorrectable ECC error" in run.log()
    assert "2 ranks on node2,node3" in run.log()


def checked(cluster, folder, script):
    """What comes of `check_nodes` on three nodes of one rank that do as the script says, steps left, and the output."""
    rank = folder / "python"
    rank.write_text(f"#!/bin/sh\n{script}\n")
    rank.chmod(0o755)
    command = ("salloc", "--quiet", "--nodes=3", "--ntasks-per-node=1", sys.executable, "-c", CHECK, rank, folder)
    said = cluster.run(*command, PYTHONPATH=ROOT)
    return *json.loads(next(line for line in said.splitlines() if line.startswith("["))), said


WRITES = """echo '{"node": "'$SLURMD_NODENAME'", %s}' >"$3/rank-0000$SLURM_PROCID.json"\n"""


def test_a_node_that_hangs_is_named_and_its_step_ended(cluster, tmp_path):
    hangs = '[ "$SLURMD_NODENAME" = node2 ] && exec sleep 1000\n'
    bad, steps_left, said = checked(cluster, tmp_path, hangs + WRITES % '"tflops": 1.0, "gb_per_second": 9.0')
    assert bad == {"node2": ["1 of 1 ranks did not finish a matrix product"]}
    assert steps_left == []
    assert "all-reduce over 2 ranks: 9.0 GB/s" in said


def test_a_network_that_does_not_work_is_not_trained_on(cluster, tmp_path):
    bad, steps_left, said = checked(cluster, tmp_path, WRITES % '"tflops": 1.0' + "exec sleep 1000")
    assert bad.startswith("every rank multiplies matrices, but only 0 of 3 have added up a vector: the network")
    assert steps_left == []
    assert "the all-reduce has not come to an end on any rank" in said


SEEN = """
import subprocess
from loopmem_pretrain.cluster import slurm, step
here = slurm.allocation()
for tasks in (here.tasks_per_node, 1):
    command = [*step.srun("look", here.nodes, tasks, None), "sh", "-c", "echo sees $CUDA_VISIBLE_DEVICES"]
    subprocess.run(command, env=step.environment(here, here.nodes), check=True)
"""


@pytest.mark.parametrize("request_", ["--gpus-per-task=1", "--gpus-per-node=2", "--gres=gpu:2"])
def test_every_task_sees_all_gpus_of_its_node(cluster, tmp_path, request_):
    script, said = tmp_path / "script", tmp_path / "said"
    script.write_text(f"#!{sys.executable}\n{SEEN}")
    shape = ("--nodes=2", "--ntasks-per-node=2", request_, f"--output={said}", f"--chdir={tmp_path}")
    assert cluster.wait(cluster.sbatch(*shape, script, PYTHONPATH=ROOT)) == "COMPLETED", said.read_text()
    assert said.read_text().splitlines().count("sees 0,1") == 4 + 2
