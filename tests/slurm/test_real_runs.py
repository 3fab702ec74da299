"""Training through sbatch, with real ranks: it computes what one process computes, and goes on exactly."""

import itertools
import json
import sys

import pytest

from loopmem_pretrain.config.load import dump_config
from tests.e2e.test_training import config_for, exact
from tests.e2e.test_training import run as run_here
from tests.slurm.cluster import wait_for
from tests.slurm.runs import Run

SECTIONS = {"logging": {"interval_steps": 1}, "checkpoint": {"interval_steps": 5}}


class RealRun(Run):
    """The tiny model on CPU ranks: `nodes` x `each`."""

    def start(self, sentences, *arguments, nodes=2, each=1, steps=20, options=(), **variables):
        config = self.folder.parent / "config.yaml"
        sections = {**SECTIONS, "training": {"train_steps": steps, "micro_batch_size": 2}}  # 4 ranks have no larger
        config.write_text(dump_config(config_for(self.folder, sentences, **sections)))
        shape = (f"--nodes={nodes}", f"--ntasks-per-node={each}", f"--gpus-per-node={each}")
        values = {"CONFIG": config, "RANK_PYTHON": sys.executable, "OMP_NUM_THREADS": 1, "HEALTH": "none"}
        return self.submit(*arguments, options=(*shape, *options), **{**values, **variables})

    def lines(self):
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sentences):
    """The last line of the same run on one process, without SLURM."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_here(config_for(folder, sentences, **SECTIONS), ranks=1)[0] == "done"
    return exact(folder)[-1]


@pytest.mark.parametrize(
    ("nodes", "each", "launcher"),
    [
        (2, 1, "srun"),
        pytest.param(4, 1, "srun", marks=pytest.mark.slow),
        pytest.param(2, 2, "torchrun", marks=pytest.mark.slow),
        pytest.param(2, 2, "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_that_of_one_process(cluster, tmp_path, sentences, alone, nodes, each, launcher):
    run = RealRun(cluster, tmp_path)
    run.start(sentences, nodes=nodes, each=each, LAUNCHER=launcher)
    assert cluster.wait(run.job, seconds=180) == "COMPLETED", run.log()
    assert run.verdicts() == ["done"]
    for key in ("loss", "validation_loss", "expected_loops"):
        assert exact(run.folder)[-1][key] == pytest.approx(alone[key], rel=1e-4), key
    logs = sorted(path.name for path in (run.folder / "logs" / f"{run.job}.0").glob("rank-*.log"))
    assert logs == [f"rank-{rank:05d}.log" for rank in range(nodes * each)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_run_in_two_starts_is_bit_identical(cluster, tmp_path, sentences, launcher):
    whole, halves = (RealRun(cluster, tmp_path / name) for name in ("whole", "halves"))
    whole.start(sentences, LAUNCHER=launcher)
    assert cluster.wait(whole.job, seconds=180) == "COMPLETED", whole.log()
    halves.start(sentences, LAUNCHER=launcher)
    wait_for(lambda: len(halves.lines()) >= 3, 120, halves.log)
    cluster.run("scancel", "--signal=USR1", "--batch", halves.job)
    assert cluster.wait(halves.job, seconds=240) == "COMPLETED", halves.log()
    assert halves.verdicts() == ["interrupted", "done"]
    assert exact(whole.folder)[-1] == exact(halves.folder)[-1]


@pytest.mark.slow
def test_a_rank_that_is_killed(cluster, tmp_path, sentences):
    run = RealRun(cluster, tmp_path)
    run.start(sentences)
    wait_for(lambda: len(run.lines()) >= 7, 120, run.log)
    cluster.run("scancel", "--signal=KILL", f"{run.job}.0")
    assert cluster.wait(run.job, seconds=240) == "COMPLETED", run.log()
    assert run.verdicts() == ["crashed", "done"]


@pytest.mark.slow
def test_a_cut_off_rank_ends_without_writing(cluster, tmp_path, sentences):
    """Rank 0's node loses its network and SLURM starts the run again on other nodes: no second writer."""
    run = RealRun(cluster, tmp_path)
    run.start(sentences, steps=100)
    wait_for(lambda: len(run.lines()) >= 7, 120, run.log)
    cluster.cut("node1")
    cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=cut")
    assert cluster.wait(run.job, seconds=300) == "COMPLETED", run.log()
    assert run.verdicts()[-1] == "done" and "crashed" not in run.verdicts()
    old = (run.folder / "logs" / f"{run.job}.0" / "rank-00000.log").read_text()
    assert f"start {run.job}.1 has taken over the run folder" in old
    steps = [line["step"] for line in run.lines()]
    back = next(index for index, (a, b) in enumerate(itertools.pairwise(steps)) if b <= a)
    assert steps[back + 1 :] == list(range(steps[back + 1], 101)), "the cut-off rank wrote in between"


@pytest.mark.slow
def test_a_step_to_stop_at_ends_the_job(cluster, tmp_path, sentences):
    run = RealRun(cluster, tmp_path)
    run.start(sentences, "--stop-at-step", 3)
    assert cluster.wait(run.job, seconds=180) == "COMPLETED", run.log()
    assert run.verdicts() == ["stopped"]


@pytest.mark.slow
def test_a_wrong_number_of_ranks_is_refused_for_good(cluster, tmp_path, sentences):
    run = RealRun(cluster, tmp_path)
    run.start(sentences, nodes=3)
    assert cluster.wait(run.job, seconds=120) == "FAILED"
    assert cluster.show(run.job)["ExitCode"] == "2:0"
    assert "training.global_batch_size 8" in run.log()
