"""What a job makes of the end of its ranks, with programs in the place of SLURM's that say what the test wants."""

import errno
import json
import os
import signal

import pytest

from loopmem_pretrain import control
from loopmem_pretrain.cluster import records
from loopmem_pretrain.cluster.job import MAX_STARTS, Ending, Job, parser, patiently, step_command
from loopmem_pretrain.errors import ConfigError, EnvironmentFault, TrainingGaveUp

SCONTROL = """#!/bin/sh
case "$2" in
    hostnames) echo n1; echo n2 ;;
    job) cat "{folder}/job" ;;
esac
"""
SQUEUE = "#!/bin/sh\necho RUNNING\n"
SRUN = """#!/bin/sh
for folder; do :; done
for node in n1 n2; do echo '{"problems": [], "clock": 0}' > "$folder/$node.json"; done
"""
SCANCEL = '#!/bin/sh\necho "$@" >> "{folder}/cancelled"\n'
STATUS = {"status": "interrupted", "reason": "stopped by SIGTERM"}
LOST = EnvironmentFault.exit_code


@pytest.fixture
def make_job(tmp_path, monkeypatch):
    """A job of two nodes with a rank each, which runs and may be put back; later arguments are options."""
    for name, text in {"scontrol": SCONTROL, "squeue": SQUEUE, "srun": SRUN, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(text.replace("{folder}", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NTASKS": "2", "TASKS_PER_NODE": "1(x2)"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def make(*options, state="RUNNING", more=""):
        (tmp_path / "job").write_text(f"JobId=7 JobState={state} Requeue=1 EndTime=5000 {more}\n")
        run_dir = tmp_path / "run"
        job = Job(parser().parse_args(["--run-dir", str(run_dir), "--config", "c.yaml", *options]))
        job.folder.mkdir(parents=True)
        control.take_over(run_dir, "7.0")
        return job

    return make


def ranks_end(job, *codes):
    """As each rank says itself; the one of the last code was the first to end."""
    for rank, code in enumerate(codes):
        (job.folder / f"rank-{rank:05d}.exit").write_text(json.dumps({"code": code, "time": 100.0 - rank}))


def write_status(job, **status):
    (job.run_dir / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize(
    ("status", "state", "more", "verdict"),
    [
        ({"status": "done"}, "RUNNING", "", "done"),
        (STATUS, "RUNNING", "", "interrupted"),
        ({"status": "interrupted", "reason": f"{control.AT_STEP} 5"}, "RUNNING", "", "stopped"),
        ({"status": "running"}, "RUNNING", "", "crashed"),
        ({"status": "running"}, "RUNNING", "PreemptTime=2026-01-01T00:00:00", "preempted"),
        ({"status": "running"}, "CANCELLED", "", "ended"),
        (STATUS, "CANCELLED", "", "ended"),
        ({"status": "done"}, "CANCELLED", "", "done"),
    ],
)
def test_the_verdict_is_by_what_the_ranks_and_slurm_say(make_job, status, state, more, verdict):
    job = make_job(state=state, more=more)
    write_status(job, **status)
    ranks_end(job, LOST, LOST)
    assert job._judge(1, False, {}).verdict == verdict


def test_what_the_start_before_has_said_does_not_count(make_job):
    """Its ranks were interrupted and saved; those of this start were killed before they could say anything."""
    job = make_job()
    write_status(job, **STATUS)
    assert job._judge(1, False, dict(STATUS)).verdict == "crashed"


def test_who_was_told_to_end_has_not_crashed(make_job):
    job = make_job()
    job.was_terminated = True
    ranks_end(job, LOST, LOST)
    assert job._judge(1, False, {}).verdict == "preempted"


@pytest.mark.parametrize("kind", [ConfigError, TrainingGaveUp])
def test_an_error_that_would_come_again_is_final_whoever_ended_first(make_job, kind):
    job = make_job()
    ranks_end(job, kind.exit_code, LOST)  # rank 1 lost contact, and was gone first
    ending = job._judge(1, False, {})
    assert (ending.verdict, ending.code) == ("failed", kind.exit_code)


@pytest.mark.parametrize("first", range(3))
def test_the_exit_code_is_of_the_rank_that_ended_first(make_job, first):
    """Whichever file a folder lists first."""
    job = make_job()
    for rank in range(3):
        end = {"code": 1, "time": 100.0} if rank == first else {"code": LOST, "time": 100.5}
        (job.folder / f"rank-{rank:05d}.exit").write_text(json.dumps(end))
    assert job._judge(1, False, {}).code == 1


@pytest.mark.parametrize(("before", "verdict"), [(2, "crashed"), (3, "failed")])
def test_so_many_crashes_are_allowed(make_job, before, verdict):
    job = make_job("--max-crashes", "3")
    for _ in range(before):
        records.append(job.run_dir, {"event": "end", "verdict": "crashed", "checkpoint": -1})
    ranks_end(job, LOST, LOST)
    assert job._judge(1, False, {}).verdict == verdict


def test_a_start_that_was_replaced_decides_nothing(make_job):
    job = make_job()
    control.take_over(job.run_dir, "7.1")
    write_status(job, status="done")
    assert job._judge(0, False, {}).verdict == "ended"


def test_starts_that_bring_nothing_end_the_run(make_job):
    """Interruptions are no crashes: without this bound a run that is always cut off before its first save goes on."""
    job = make_job()
    for number in range(MAX_STARTS):
        records.append(job.run_dir, {"event": "start", "start": f"{number}.0", "checkpoint": -1})
        records.append(job.run_dir, {"event": "end", "start": f"{number}.0", "verdict": "interrupted"})
    assert job.run() == EnvironmentFault.exit_code
    assert records.read(job.run_dir)[-1]["verdict"] == "failed"


def test_a_run_that_gave_up_is_counted_anew():
    starts = [{"event": "start", "checkpoint": 10}] * MAX_STARTS
    for verdict in ("failed", "stopped"):
        assert records.starts_in_vain([*starts, {"event": "end", "verdict": verdict}, starts[0]], 10) == 1
    assert records.starts_in_vain([*starts, {"event": "start", "checkpoint": 20}], 20) == 1


def test_another_job_of_the_run_is_left_alone(make_job):
    job = make_job()
    job._refuse_if_busy()  # job 7 was put back, and is the one that SLURM says runs
    control.take_over(job.run_dir, "9.0")
    with pytest.raises(EnvironmentFault, match="job 9 trains"):
        job._refuse_if_busy()


def test_too_few_healthy_nodes_are_not_trained_on(make_job, monkeypatch):
    job = make_job()
    monkeypatch.setattr("loopmem_pretrain.cluster.health.check_nodes", lambda *_: {"n2": ["3 GPUs of 4"]})
    ending = job._check_and_train()
    assert (ending.verdict, ending.bad_nodes) == ("lost nodes", ["n2"])


def test_the_ranks_are_gone_before_the_job_ends(make_job):
    assert make_job()._environment()[control.END_TIME] == "4970.0"


@pytest.mark.parametrize(("launcher", "cpus"), [("srun", 8), ("torchrun", 32)])
def test_one_launcher_of_a_node_has_the_cores_of_all_its_ranks(make_job, launcher, cpus):
    job = make_job("--launcher", launcher)
    here = job.here._replace(tasks_per_node=4, cpus_per_task=8)
    assert f"--cpus-per-task={cpus}" in step_command(job.options, here, here.nodes)


@pytest.mark.parametrize(("state", "dropped"), [("CANCELLED by 1000", True), ("TIMEOUT", False), ("FAILED", False)])
def test_the_next_job_is_cancelled_with_this_one_only(make_job, tmp_path, state, dropped):
    job = make_job("--continue", "chain", state=state)
    job.successor = "8"
    job._go_on(Ending("ended", "SLURM has ended the job", 1))
    assert (tmp_path / "cancelled").exists() == dropped


def test_a_full_disk_is_not_waited_for():
    answers = [OSError(errno.ENOSPC, "No space left on device"), None]

    def action():
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    with pytest.raises(OSError, match="No space"):
        patiently(action)
