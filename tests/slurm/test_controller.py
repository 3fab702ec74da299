"""What is asked of a controller that is away, or too busy to answer."""

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import ROOT, Run
from tests.slurm.test_life_cycle import reaches

PREAMBLE = "import sys\nfrom loopmem_pretrain.cluster import slurm\njob = sys.argv[1]\n"


def sleeping(cluster: Cluster) -> str:
    """A job that runs."""
    job = cluster.sbatch("--requeue", "--output=/dev/null", "--wrap=sleep 100")
    cluster.wait(job, "RUNNING", seconds=20)
    return job


@contextlib.contextmanager
def unanswering(cluster: Cluster, fault: str) -> Iterator[None]:
    """The controller is away, or too busy to answer."""
    is_away = fault == "away"
    (cluster.stop_controller if is_away else cluster.freeze_controller)()
    try:
        yield
    finally:
        (cluster.start_controller if is_away else cluster.thaw_controller)()


class Asking:
    """Python code that asks SLURM about a job, under way."""

    def __init__(self, cluster: Cluster, folder: Path, code: str, job: str) -> None:
        self.output = folder / "said"
        words = ("sh", "-c", 'exec "$@" >"$0" 2>&1', self.output, sys.executable, "-c", code, job)
        self.end = ThreadPoolExecutor().submit(cluster.run, *words, check=False, PYTHONPATH=ROOT)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def result(self) -> str:
        self.end.result()
        return self.said()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "complaint"), [("away", "Unable to contact"), ("busy", "Socket timed out")])
def test_a_controller_that_does_not_answer_is_asked_again(cluster, tmp_path, fault, complaint):
    job = sleeping(cluster)
    with unanswering(cluster, fault):
        asking = Asking(cluster, tmp_path, f"{PREAMBLE}print(slurm.is_running(job), slurm.is_running('4711'))", job)
        wait_for(lambda: "asking again for 900 s" in asking.said(), 40, asking.said)
    assert complaint in asking.result() and asking.said().endswith("\nTrue False\n"), asking.said()


@pytest.mark.parametrize("fault", [pytest.param("away", marks=pytest.mark.slow), "busy"])
def test_a_job_is_put_back_when_the_controller_answers(cluster, tmp_path, fault):
    """A busy one may hear what it is told and be too late with its answer: the next attempt is refused then."""
    job = sleeping(cluster)
    with unanswering(cluster, fault):
        asking = Asking(cluster, tmp_path, f"{PREAMBLE}slurm.put_back(job)", job)
        wait_for(lambda: "scontrol requeue" in asking.said(), 40, asking.said)
    assert len(asking.result().splitlines()) == 1, "more than that it asks again"
    assert cluster.show(job)["Restarts"] == "1"


def test_a_node_that_cannot_be_left_out_leaves_the_job_held_and_says_so(cluster, tmp_path):
    job = sleeping(cluster)
    said = Asking(cluster, tmp_path, f"{PREAMBLE}slurm.HELD = 1\nslurm.hold_without(job, ['nowhere'])", job).result()
    assert f"job {job} is in the queue, held, and could not be told to leave out nowhere" in said, said
    assert f"ExcNodeList=nowhere, then scontrol release {job}" in said, said
    cluster.wait(job, "PENDING", seconds=20)
    assert cluster.show(job)["Reason"] == "job_requeued_in_held_state"


@pytest.mark.slow
def test_a_controller_that_is_away_for_long_does_not_end_a_run(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    run.submit("steps=200")
    reaches(run, 12)
    with unanswering(cluster, "away"):
        (run.folder / "logs" / f"{run.job}.0" / "stop").write_text("what the warning becomes\n")
        wait_for(lambda: run.status()["status"] == "interrupted", 30, run.log)
        time.sleep(80)
    assert cluster.wait(run.job, seconds=90) == "COMPLETED", run.log()
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == list(range(1, 201))
