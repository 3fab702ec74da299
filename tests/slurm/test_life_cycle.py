"""What becomes of a job when its time is over, it is cancelled, a rank or a node dies: on a real SLURM, stub ranks."""

import time

import pytest

from loopmem_pretrain.cluster.slurm import job_fields
from tests.slurm.cluster import wait_for
from tests.slurm.runs import Run

ONCE = list(range(1, 41))
"""The steps of a run, each trained once."""


@pytest.fixture
def run(cluster, tmp_path):
    return Run(cluster, tmp_path)


def reaches(run, step):
    wait_for(lambda: step in run.trained(), 30, lambda: f"step {step}\n{run.log()}", pause=0.05)


def test_warning_save_requeue_finish(run):
    run.submit()
    reaches(run, 12)
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == ONCE
    assert "time of the job is nearly over" in run.log()
    assert run.log().count("ranks on node") == 2, "the log of the first start is lost"
    assert sorted(path.name for path in (run.folder / "logs").iterdir()) == [f"{run.job}.0", f"{run.job}.1"]


def test_scancel_stays_cancelled(run):
    run.submit()
    reaches(run, 12)
    run.cluster.run("scancel", run.job)
    assert run.cluster.wait(run.job) == "CANCELLED"
    assert run.status()["status"] == "interrupted", "there was time to save"
    wait_for(lambda: run.verdicts() == ["ended"], 10, run.log)
    assert run.cluster.run("squeue", "-h") == ""


def test_ranks_get_what_the_job_tells_them_however_little_it_was_given(run):
    given = "--export=PATH,PYTHONPATH,CONFIG,RUN_DIR,PYTHON,RANK_PYTHON,SLURM_CONF"
    run.submit(options=(given,))
    assert run.cluster.wait(run.job) == "COMPLETED", run.log()
    assert run.verdicts() == ["done"]


@pytest.mark.slow
def test_without_the_fence_nothing_is_started_again(run):
    run.fault(kind="kill", step=35)
    run.submit()
    reaches(run, 12)
    (run.folder / "fence").unlink()
    assert run.cluster.wait(run.job) == "FAILED"
    assert run.verdicts() == ["ended"]
    assert "fence is gone" in run.log()


@pytest.mark.slow
def test_a_disk_that_is_away_for_a_while(run):
    """Folders in the places of files stand for it."""
    run.submit()
    reaches(run, 12)
    file, request = run.folder / "slurm" / "starts.jsonl", run.folder / "logs" / f"{run.job}.0" / ".stop.tmp"
    file.rename(file.with_name("kept"))
    file.mkdir()
    request.mkdir()
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    wait_for(lambda: "the ranks cannot be asked to stop: " in run.log(), 10, run.log)
    request.rmdir()
    wait_for(lambda: "trying again for 900 s" in run.log(), 30, run.log)
    file.rmdir()
    file.with_name("kept").rename(file)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == ONCE


@pytest.mark.slow
def test_a_full_disk_does_not_keep_a_job_from_going_on(run):
    run.submit()
    reaches(run, 12)
    file = run.folder / "slurm" / "starts.jsonl"
    file.rename(file.with_name("kept"))
    file.symlink_to("/dev/full")
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    wait_for(lambda: "the verdict could not be written" in run.log(), 30, run.log)
    file.unlink()
    file.with_name("kept").rename(file)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["done"]
    assert run.trained() == ONCE


@pytest.mark.slow
@pytest.mark.parametrize(("words", "verdict"), [(("--signal=USR1", "--batch"), "interrupted"), ((), "ended")])
def test_what_is_asked_of_a_job_before_its_ranks_are_started(run, words, verdict):
    """While the nodes are looked at, which takes long here."""
    tools = run.folder.parent / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\ntouch began\nsleep 5\n")
    (tools / "nvidia-smi").chmod(0o755)
    run.submit(PATH=f"{tools}:{run.cluster.env['PATH']}")
    wait_for((run.folder.parent / "began").exists, 30, run.log)
    (tools / "nvidia-smi").unlink()
    run.cluster.run("scancel", *words, run.job)
    wait_for(lambda: run.verdicts()[:1] == [verdict], 60, run.log)
    assert run.cluster.wait(run.job) == ("COMPLETED" if words else "CANCELLED")
    assert run.trained() == (ONCE if words else [])


@pytest.mark.slow
def test_a_killed_rank_is_a_crash_and_the_run_goes_on(run):
    run.fault(kind="kill")
    run.submit()
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["crashed", "done"]
    assert set(run.trained()) == set(ONCE)
    assert run.starts()[2]["checkpoint"] == 10


@pytest.mark.slow
def test_crashes_without_progress_end_the_run(run):
    run.fault(kind="exit", code=6, starts=99)
    run.submit(MAX_CRASHES=1)
    assert run.cluster.wait(run.job) == "FAILED"
    assert run.verdicts() == ["crashed", "failed"]
    assert run.cluster.show(run.job)["ExitCode"] == "6:0"
    assert "rank-00001: as the test wanted" in run.log()


@pytest.mark.slow
def test_progress_renews_the_budget(run):
    run.fault(kind="exit", code=6, starts=1)
    run.submit(MAX_CRASHES=1)
    wait_for(lambda: run.verdicts() == ["crashed"], 30, run.log)
    run.fault(kind="exit", code=6, starts=2, step=25)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["crashed", "crashed", "done"]


@pytest.mark.slow
def test_an_error_that_would_come_again_is_final(run):
    run.fault(kind="exit", code=2, starts=99)
    run.submit()
    assert run.cluster.wait(run.job) == "FAILED"
    assert run.verdicts() == ["failed"]
    assert run.cluster.show(run.job)["ExitCode"] == "2:0"


@pytest.mark.slow
def test_ranks_that_hang_are_ended_and_leave_their_stacks(run):
    run.fault(kind="hang", rank=0)
    run.submit(HANG_SECONDS=3)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["crashed", "done"]
    assert "has stood still for 3 s" in run.log()
    assert "in train" in (run.folder / "logs" / f"{run.job}.0" / "rank-00000.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("node", ["node2", "node1"], ids=["worker", "batch node"])
def test_power_off_is_no_crash(run, node):
    run.submit()
    reaches(run, 12)
    run.cluster.off(node)
    wait_for(lambda: run.cluster.show(run.job).get("Restarts") == "1", 30, run.log)
    run.cluster.on(node)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() in (["done"], ["ended", "done"])
    assert set(run.trained()) == set(ONCE)


@pytest.mark.slow
def test_a_dead_node_that_slurm_has_not_noticed_is_left_out(run):
    run.submit()
    reaches(run, 12)
    pid = (run.cluster.dir / "node2.pid").read_text().strip()
    run.cluster.run("kill", "-KILL", pid)
    assert run.cluster.wait(run.job, seconds=120) == "COMPLETED"
    assert run.verdicts()[-1] == "done" and "crashed" not in run.verdicts()


@pytest.mark.slow
def test_preemption_saves_and_goes_on(run):
    run.submit()
    reaches(run, 12)
    urgent = run.cluster.sbatch("-p", "urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert run.cluster.wait(urgent) == "COMPLETED"
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts()[-1] == "done" and "crashed" not in run.verdicts()
    assert run.trained() == ONCE


@pytest.mark.slow
def test_stop_file(run):
    run.submit()
    reaches(run, 12)
    (run.folder / "STOP").touch()
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["stopped"]
    again = run.submit()
    assert run.cluster.wait(again) == "COMPLETED"
    assert run.verdicts() == ["stopped"], "nothing is started while the file is there"
    (run.folder / "STOP").unlink()
    assert run.cluster.wait(run.submit()) == "COMPLETED"
    assert run.trained() == ONCE


@pytest.mark.slow
def test_pause_file_holds_the_job(run):
    run.submit()
    reaches(run, 12)
    (run.folder / "PAUSE").touch()
    wait_for(lambda: run.cluster.show(run.job).get("Reason") == "job_requeued_in_held_state", 30, run.log)
    (run.folder / "PAUSE").unlink()
    run.cluster.run("scontrol", "release", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["paused", "done"]
    assert run.trained() == ONCE


@pytest.mark.slow
def test_a_chain_of_jobs(run):
    run.submit("steps=60", CONTINUE="chain", options=("--no-requeue",))
    reaches(run, 12)
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    second = str(int(run.job) + 1)
    assert run.cluster.wait(second) == "COMPLETED"
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == list(range(1, 61))
    assert run.cluster.state(str(int(run.job) + 2)) == "CANCELLED"


@pytest.mark.slow
def test_chains_of_two_runs_do_not_wait_for_each_other(cluster, tmp_path):
    one, other = (Run(cluster, tmp_path / name) for name in ("one", "other"))
    for run in (one, other):
        run.submit("steps=400", CONTINUE="chain", options=("--no-requeue",))
        reaches(run, 12)
    cluster.run("scancel", "--signal=USR1", "--batch", one.job)
    wait_for(lambda: len(one.starts()) == 3, 30, one.log)
    assert other.verdicts() == [], "it trains all the time"
    cluster.run("scancel", "--me")


@pytest.mark.slow
def test_a_next_job_that_is_refused_at_first(run):
    """A limit on the number of jobs, for example; what was granted is used, and asked again when it is over."""
    tools = run.folder.parent / "tools"
    tools.mkdir()
    real = run.cluster.run("which", "sbatch").strip()
    submitted, refused = tools / "submitted", tools / "refused"
    (tools / "sbatch").write_text(f"""#!/bin/sh
[ -e {refused} ] && exec {real} "$@"
[ -e {submitted} ] || {{ touch {submitted}; exec {real} "$@"; }}
touch {refused}
echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
exit 1
""")
    (tools / "sbatch").chmod(0o755)
    run.submit("steps=60", CONTINUE="chain", options=("--no-requeue",), PATH=f"{tools}:{run.cluster.env['PATH']}")
    reaches(run, 12)
    assert "no job that goes on could be submitted: sbatch failed: sbatch: error: AssocMaxSubmitJobLimit" in run.log()
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.cluster.wait(str(int(run.job) + 1)) == "COMPLETED"
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == list(range(1, 61))


@pytest.mark.slow
def test_a_job_that_must_not_be_requeued_says_so_before_it_trains(run):
    run.submit(options=("--no-requeue",))
    assert run.cluster.wait(run.job) == "FAILED"
    assert f"job {run.job} may not be put back into the queue" in run.log() and "CONTINUE=chain" in run.log()
    assert run.trained() == []


@pytest.mark.slow
def test_a_job_that_was_suspended_is_not_taken_for_hung(run):
    run.submit("steps=200", HANG_SECONDS=10)
    reaches(run, 12)
    run.cluster.run("scontrol", "suspend", run.job)
    time.sleep(13)
    run.cluster.run("scontrol", "resume", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["done"], run.log()
    assert run.trained() == list(range(1, 201))


@pytest.mark.slow
def test_the_next_job_of_a_chain_has_the_options_of_the_first(run):
    options = ("--no-requeue", "--time=9", "--exclude=node4", "--mem=2G", "--exclusive", "--comment=for the paper")
    options += ("--nice=5", "--switches=1@00:02:00", "--threads-per-core=1", "--gpu-bind=none", "--mail-type=FAIL")
    options += ("--mail-user=me", f"--error={run.folder.parent}/error of %j.err")
    run.submit("steps=60", CONTINUE="chain", options=options)
    reaches(run, 12)
    first, second = (job_fields(run.cluster.run("scontrol", "show", "job", int(run.job) + n)) for n in (0, 1))
    names = ("TimeLimit", "ExcNodeList", "MinMemoryNode", "OverSubscribe", "Comment", "Nice", "Switches", "TresPerNode")
    names += ("ReqB:S:C:T", "TresBind", "MailType", "MailUser", "Requeue", "CPUs/Task", "WorkDir")
    assert {name: second[name] for name in names} == {name: first[name] for name in names}
    assert second["JobName"].startswith("loopmem-run-"), "no job of another run waits for it"
    assert second["StdErr"].endswith(f"error of {second['JobId']}.err")
    assert second["StdOut"].endswith(f"/job-{second['JobId']}.out")
    assert run.cluster.wait(run.job) == "COMPLETED"


@pytest.mark.slow
def test_a_second_job_does_not_disturb_the_first(run):
    first = run.submit("steps=200")
    reaches(run, 12)
    second = run.submit("steps=200")
    assert run.cluster.wait(second) == "FAILED"
    assert f"job {first} trains in the run folder" in run.log()
    assert run.cluster.wait(first) == "COMPLETED"
    assert run.trained() == list(range(1, 201))


@pytest.mark.slow
def test_cancelling_a_job_of_a_chain_cancels_the_next(run):
    run.submit(CONTINUE="chain", options=("--no-requeue",))
    reaches(run, 12)
    run.cluster.run("scancel", run.job)
    assert run.cluster.wait(run.job) == "CANCELLED"
    assert run.cluster.wait(str(int(run.job) + 1)) == "CANCELLED"


@pytest.mark.slow
def test_a_restart_of_the_controller_is_sat_out(run):
    run.submit("steps=200")
    reaches(run, 12)
    run.cluster.restart_controller()
    run.cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["interrupted", "done"]
    assert run.trained() == list(range(1, 201))


@pytest.mark.slow
def test_a_chain_survives_the_loss_of_a_node(run):
    run.submit(CONTINUE="chain", options=("--no-requeue",))
    reaches(run, 12)
    run.cluster.off("node2")
    assert run.cluster.wait(run.job) == "NODE_FAIL"
    assert run.cluster.wait(str(int(run.job) + 1)) == "COMPLETED"
    assert run.verdicts()[-1] == "done" and "crashed" not in run.verdicts()


@pytest.mark.slow
def test_a_cut_off_start_does_not_write_after_the_next_has_begun(run):
    run.submit("steps=400")
    reaches(run, 12)
    run.cluster.cut("node1")  # the batch node, with rank 0
    run.cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=cut")
    wait_for(lambda: len([line for line in run.starts() if line["event"] == "start"]) == 2, 60, run.log)
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert (run.folder / "fence").read_text() == f"{run.job}.1\n"
    old = (run.folder / "logs" / f"{run.job}.0" / "rank-00000.log").read_text()
    assert "has taken over the run folder" in old
    assert run.verdicts()[-1] == "done"


@pytest.mark.slow
def test_a_frozen_node(run):
    run.submit("steps=200")
    reaches(run, 12)
    run.cluster.freeze("node2")
    wait_for(lambda: run.cluster.show(run.job).get("Restarts") == "1", 60, run.log)
    assert run.cluster.wait(run.job, seconds=90) == "COMPLETED"
    assert run.verdicts()[-1] == "done" and "crashed" not in run.verdicts()


@pytest.mark.slow
def test_an_unfit_node_is_left_out(run):
    """What nvidia-smi says of node1 decides; node1 is named, not used again, and the run goes on without it."""
    tools = run.folder.parent / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text("""#!/bin/sh
[ "$1" = topo ] && exit
echo "0, 81559, 0, Not Active, Not Active"
[ "$SLURMD_NODENAME" = node1 ] || echo "1, 81559, 0, Not Active, Not Active"
""")
    smi.chmod(0o755)
    run.submit(PATH=f"{tools}:{run.cluster.env['PATH']}")
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["lost nodes", "done"]
    assert "node1 is left out: 1 GPUs of 2" in run.log()
    assert run.starts()[2]["nodes"] == ["node2", "node3"]


@pytest.mark.slow
def test_a_spare_node_steps_in_at_once(run):
    tools = run.folder.parent / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text("""#!/bin/sh
[ "$1" = topo ] && exit
echo "0, 81559, 0, Not Active, Not Active"
[ "$SLURMD_NODENAME" = node2 ] || echo "1, 81559, 0, Not Active, Not Active"
""")
    smi.chmod(0o755)
    run.submit(PATH=f"{tools}:{run.cluster.env['PATH']}", SPARE_NODES=1, options=("--nodes=3",))
    assert run.cluster.wait(run.job) == "COMPLETED"
    assert run.verdicts() == ["done"]
    assert "4 ranks on node1,node3" in run.log()
    assert run.starts()[0]["ranks"] == 4


@pytest.mark.slow
def test_the_time_limit_itself(run):
    """The real limit, with SLURM's own half minutes between looks at it."""
    run.submit("steps=2000")
    reaches(run, 12)
    soon = run.cluster.run("date", "+%FT%T", "-d", "+70 seconds")
    run.cluster.run("scontrol", "update", f"JobId={run.job}", f"EndTime={soon}")
    wait_for(lambda: run.verdicts() == ["interrupted"], 90, run.log)
    (run.folder / "STOP").touch()
    assert "time of the job is nearly over (SIGUSR1)" in run.log()
    assert run.cluster.wait(run.job) == "COMPLETED"
