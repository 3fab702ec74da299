"""What a run has cost by `sacct`, with a real slurmdbd and database."""

import sys
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, wait_for, why_no_accounting
from tests.slurm.runs import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def accounted() -> Iterator[Cluster]:
    reason = why_no_accounting()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(nodes=2, accounting=True)
    yield cluster
    cluster.stop()


def status(run):
    return run.cluster.run(sys.executable, "-m", "loopmem_pretrain", "slurm", "status", run.folder)


def test_a_run_over_its_restarts(accounted, tmp_path):
    run = Run(accounted, tmp_path)
    run.submit("steps=60")
    wait_for(lambda: 12 in run.trained(), 60, run.log)
    accounted.run("scancel", "--signal=USR1", "--batch", run.job)
    assert accounted.wait(run.job) == "COMPLETED", run.log()
    wait_for(lambda: "; 1 REQUEUED, 1 COMPLETED" in status(run), 30, lambda: status(run), pause=1)
    said = status(run)
    ends = [line.split()[-3:] for line in said.splitlines() if "node[1-2]" in line]
    assert ends == [["node[1-2]", "4", "REQUEUED"], ["node[1-2]", "4", "COMPLETED"]], said
    assert "GPU hours; " in said and "2 starts" in said


def test_without_accounting_the_records_do(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    run.submit()
    assert cluster.wait(run.job) == "COMPLETED", run.log()
    said = status(run)
    assert "own records, as there is no accounting: Slurm accounting storage is disabled" in said, said
