"""Under proctrack/cgroup, as on real sites, a signal reaches the top process of a task and no other."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import FREEZER, Cluster, wait_for, why_not
from tests.slurm.runs import Run
from tests.slurm.test_real_runs import RealRun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def strict() -> Iterator[Cluster]:
    reason = why_not()
    if not reason and not os.access(FREEZER, os.W_OK):
        reason = f"{FREEZER} cannot be written: no proctrack/cgroup of version 1 here"
    if reason:
        pytest.skip(reason)
    cluster = Cluster(nodes=2, proctrack="cgroup")
    yield cluster
    cluster.stop()


def test_the_warning_and_cancelling(strict, tmp_path):
    run = Run(strict, tmp_path)
    run.submit()
    wait_for(lambda: 12 in run.trained(), 60, run.log)
    strict.run("scancel", "--signal=USR1", "--batch", run.job)
    wait_for(lambda: len(run.trained()) > 20, 60, run.log)
    strict.run("scancel", run.job)
    assert strict.wait(run.job) == "CANCELLED"
    assert run.verdicts()[0] == "interrupted"
    assert run.status()["status"] == "interrupted", "the ranks were told, and had the time to save"


def test_the_warning_under_torchrun(strict, tmp_path, sentences):
    run = RealRun(strict, tmp_path)
    run.start(sentences, LAUNCHER="torchrun", steps=40)
    wait_for(lambda: len(run.lines()) >= 3, 120, run.log)
    strict.run("scancel", "--signal=USR1", "--batch", run.job)
    assert strict.wait(run.job, seconds=240) == "COMPLETED", run.log()
    assert run.verdicts() == ["interrupted", "done"]
