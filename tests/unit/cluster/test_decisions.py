"""What is decided from files and variables: places of ranks, budgets, fences, health, the summary of a run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from loopmem_pretrain import control
from loopmem_pretrain.checkpoint.store import CheckpointStore
from loopmem_pretrain.cluster import accounting, burn_in, chain, health, manage, records
from loopmem_pretrain.cluster.rank import node_command, place
from loopmem_pretrain.cluster.slurm import Allocation, end_time, job_fields, sbatch_environment, was_cancelled
from loopmem_pretrain.cluster.step import Heartbeat, what_ranks_said
from loopmem_pretrain.cluster.submit import seconds_of
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from tests.configs import tiny_run

TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8"}
TASK["LOOPMEM_RANKS_PER_NODE"] = "4"


@pytest.mark.parametrize(
    ("visible", "device"), [(None, "1"), ("", "1"), ("0,1,2,3", "1"), ("3", "0"), ("GPU-aa,GPU-bb,GPU-cc,GPU-dd", "1")]
)
def test_the_device_is_one_that_the_task_sees(visible, device):
    variables = TASK if visible is None else {**TASK, "CUDA_VISIBLE_DEVICES": visible}
    assert place(variables) == {"RANK": "5", "LOCAL_RANK": device, "WORLD_SIZE": "8"}


def test_too_few_devices_are_refused():
    with pytest.raises(EnvironmentFault, match="rank 5 sees GPUs 0,1 and there are 4 ranks on this node"):
        place({**TASK, "CUDA_VISIBLE_DEVICES": "0,1"})


def test_ranks_that_are_dealt_out_to_nodes_in_turn_are_refused():
    with pytest.raises(EnvironmentFault, match="rank 5 is task 2 of node 1: those of a node do not follow"):
        place({**TASK, "SLURM_LOCALID": "2"})


def test_what_a_launcher_has_set_counts():
    set_by_torchrun = {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}
    assert place({**TASK, **set_by_torchrun}) == set_by_torchrun


@pytest.mark.parametrize(
    ("unfit", "nodes", "blames"),
    [
        ({"n2": [health.SILENT]}, ["n1", "n2"], True),
        ({"n1": [health.SILENT], "n2": [health.SILENT]}, ["n1", "n2"], False),
        ({}, ["n1", "n2"], False),
        ({"n1": [health.SILENT]}, ["n1"], False),
        ({"n1": ["GPU 3: 2 uncorrected memory errors"]}, ["n1"], True),
    ],
)
def test_what_all_nodes_have_in_common_is_no_fault_of_theirs(unfit, nodes, blames):
    assert health.blames_nodes(unfit, nodes) is blames


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-1", 176400), ("1-0:30", 88200), ("1-00:00:01", 86401)],
)
def test_times_as_sbatch_takes_them(time, seconds):
    assert seconds_of(time) == seconds


def test_what_may_be_a_secret_is_not_written_down():
    names = ("SLURM_JWT", "SLURM_JOB_ID", "NCCL_DEBUG", "SBATCH_ACCOUNT", "SLURM_REST_TOKEN", "NCCL_IB_PKEY")
    assert [name for name in names if chain.is_recorded(name)] == [
        *("SLURM_JOB_ID", "NCCL_DEBUG", "SBATCH_ACCOUNT", "NCCL_IB_PKEY")
    ]


@pytest.mark.parametrize(
    ("launcher", "module"), [("torchrun", "torch.distributed.run"), ("deepspeed", "deepspeed.launcher.launch")]
)
def test_a_node_starts_its_ranks(launcher, module):
    variables = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "20001"}
    command = node_command({**TASK, **variables, "LOOPMEM_LAUNCHER": launcher}, ["train", "a b"])
    assert command[2] == module
    assert command[-3:] == ["loopmem_pretrain.cluster.rank", "train", "a b"]


def test_deepspeed_gives_ranks_the_devices_that_slurm_has_granted(tmp_path):
    """Its launcher, with a program that says what it is given in the place of the rank."""
    said = "import os; open(os.environ['LOCAL_RANK'], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    (tmp_path / "says.py").write_text(said)
    variables = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "20001"}
    variables |= {"LOOPMEM_RANKS_PER_NODE": "2", "LOOPMEM_LAUNCHER": "deepspeed"}
    variables["CUDA_VISIBLE_DEVICES"] = "4,GPU-bb,6"
    command = [*node_command(variables, [])[:-1], "says"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables, "PYTHONPATH": str(tmp_path)}, check=True)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4,GPU-bb"] * 2
    with pytest.raises(EnvironmentFault, match="node 1 is to start 2 ranks and sees GPUs 3"):
        node_command({**variables, "CUDA_VISIBLE_DEVICES": "3"}, [])


def test_ranks_meet_at_another_port_in_each_start():
    """Of 20 restarts of a job, and of the jobs around it."""
    jobs = [(number, restart) for number in range(12_345_670, 12_345_690) for restart in range(20)]
    ports = {Allocation(str(job), restart, ["a"], 1, None).port for job, restart in jobs}
    assert len(ports) == len(jobs) and min(ports) >= 20_000 and max(ports) < 30_000


def crash(checkpoint):
    return {"event": "end", "verdict": "crashed", "checkpoint": checkpoint}


def test_the_budget_counts_crashes_without_progress():
    lines = [crash(10), crash(10), {"event": "end", "verdict": "lost nodes", "checkpoint": 20}, crash(20)]
    assert records.crashes_in_vain(lines, 20) == 1
    assert records.crashes_in_vain(lines, 30) == 0
    gave_up = {"event": "end", "verdict": "failed", "checkpoint": 20}
    assert records.crashes_in_vain([*lines, gave_up, crash(20)], 20) == 1, "somebody has submitted it again"


def test_half_a_line_of_the_records_is_left_out(tmp_path):
    records.append(tmp_path, crash(10))
    with records.starts_file(tmp_path).open("a") as file:
        file.write('{"event": "end", "verd')
    assert len(records.read(tmp_path)) == 1
    records.append(tmp_path, crash(20))
    assert [line["checkpoint"] for line in records.read(tmp_path)] == [10, 20], "the next line is whole"


def test_a_start_that_was_replaced_may_not_write(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.discard_incomplete()
    monkeypatch.setenv(control.START, "7.0")
    control.take_over(tmp_path, "7.0")
    store.discard_incomplete()
    control.take_over(tmp_path, "7.1")
    changes = [store.discard_incomplete, lambda: store.go_back_to(1), lambda: store.fall_back(tmp_path, [])]
    for change in [*changes, lambda: store.publish(1, {}, {})]:
        with pytest.raises(EnvironmentFault, match=r"start 7\.1 has taken over"):
            change()
    monkeypatch.delenv(control.START)
    store.discard_incomplete()


def test_requests_by_file(tmp_path, monkeypatch):
    assert control.stop_request(tmp_path) == "" and not control.save_request(tmp_path)
    monkeypatch.setenv(control.STOP_FILE, str(tmp_path / "mine"))
    assert control.stop_request(tmp_path) == ""
    (tmp_path / "mine").write_text("time is over\n")
    assert control.stop_request(tmp_path) == "stopped: time is over"
    (tmp_path / "PAUSE").touch()
    assert control.stop_request(tmp_path).endswith("/PAUSE")
    (tmp_path / "SAVE").touch()
    assert control.save_request(tmp_path)
    control.save_begins(tmp_path)
    assert not control.save_request(tmp_path)


def test_nodes_are_judged_together():
    fit = {"problems": [], "clock": 7200.1}
    reports = {
        "a": fit,
        "b": fit,
        "c": {"problems": [], "clock": 7000.0},
        "d": {"problems": ["3 GPUs of 4"], "clock": 7200},
    }
    assert health.judge(["a", "b", "c", "d", "e"], reports) == {
        "c": ["its clock is 200 s behind the others"],
        "d": ["3 GPUs of 4"],
        "e": ["gave no sign of life"],
    }


def measured(node, tflops, **more):
    return {"node": node, "tflops": tflops, **more}


def test_nodes_are_judged_by_their_slowest_rank():
    reports = [measured(node, speed) for node in ("a", "b", "c") for speed in (600.0, 610.0)]
    assert burn_in.judge(["a", "b", "c"], 2, reports) == {}
    reports[3] = measured("b", 475.0)
    assert burn_in.judge(["a", "b", "c"], 2, reports) == {
        "b": ["a matrix product runs at 475 TFLOP/s, 600 is usual here"]
    }
    reports[3] = measured("b", 485.0)
    assert burn_in.judge(["a", "b", "c"], 2, reports) == {}, "less than a fifth slower"
    unfinished = burn_in.judge(["a", "b", "c", "d"], 2, [*reports[:5], measured("d", 600.0, gb_per_second=9.0)])
    assert unfinished == {
        "c": ["1 of 2 ranks did not finish a matrix product"],
        "d": ["1 of 2 ranks did not finish a matrix product"],
    }
    assert set(burn_in.judge(["a", "b"], 2, [])) == {"a", "b"}, "no rank got so far"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPUs are used")
@pytest.mark.parametrize(
    ("device", "variables", "is_unfit"),
    [
        ("auto", {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ("auto", {"CUDA_VISIBLE_DEVICES": "GPU-aa"}, True),
        ("auto", {"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": ""}, False),
        ("cpu", {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, False),
    ],
)
def test_a_rank_without_the_gpus_it_was_granted_is_unfit(tmp_path, monkeypatch, device, variables, is_unfit):
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_run(tmp_path / "run", "data")))
    problem = burn_in.missing_gpus(str(config), ["--stop-at-step", "5", f"training.device={device}"])
    assert ("GPUs were granted" in problem and "and torch finds none: " in problem) if is_unfit else problem == ""
    unfit = burn_in.judge(["a", "b"], 1, [{"node": "a", "problem": problem or "x"}, measured("b", 600.0)])
    assert unfit == {"a": [problem or "x"]}


def test_a_node_reports_on_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "here")
    health.report_on_this_node(tmp_path)
    report = json.loads((tmp_path / "here.json").read_text())
    assert report["problems"] == [] and abs(report["clock"]) < 5
    monkeypatch.setattr(health, "FREE_BYTES", 1 << 60)
    health.report_on_this_node(tmp_path)
    assert "GB are free in" in json.loads((tmp_path / "here.json").read_text())["problems"][0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0, 81559, 0, Not Active, Not Active", "1 GPUs of 2"),
        (
            "0, 81559, 2, Not Active, Not Active\n1, 81559, 0, Not Active, Not Active",
            "GPU 0: 2 uncorrected memory errors",
        ),
        (
            "0, 81559, 0, Not Active, Not Active\n1, 81559, [N/A], Active, Not Active",
            "GPU 1: slowed down by heat or power",
        ),
        ("0, 81559, 0, Not Active, Not Active\n1, 40960, 0, Not Active, Not Active", "GPUs of different memory"),
        ("exit 9", "nvidia-smi fails"),
    ],
)
def test_gpus_are_judged_by_nvidia_smi(tmp_path, monkeypatch, rows, said):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n" if rows == "exit 9" else f"#!/bin/sh\ncat <<END\n{rows}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert health._gpu_problems()[0].startswith(said)


def test_a_heartbeat_that_stands_still(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    beat = tmp_path / "heartbeat.json"
    beat.write_text("of the start before")
    watch = Heartbeat(beat, start_seconds=100, hang_seconds=10)
    found = []
    for now in range(1, 200):
        if now == 100:
            beat.write_text("1")
        if watch.stands_still():
            found.append(now)
    assert found == list(range(111, 200))


def test_who_was_stopped_cannot_say_that_others_stood_still(tmp_path, monkeypatch):
    """A job that is suspended and resumed, and a disk that makes its reader wait."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    beat = tmp_path / "heartbeat.json"
    beat.write_text("0")
    watch = Heartbeat(beat, start_seconds=100, hang_seconds=20)
    beat.write_text("1")
    assert not watch.stands_still()
    now = 500.0
    assert not watch.stands_still(), "the ranks were stopped, too"
    found = []
    for now in range(501, 525):
        if watch.stands_still():
            found.append(now)
    assert found == list(range(521, 525))


def test_sbatch_is_told_who_asks(monkeypatch):
    for name in ("SLURM_JWT", "SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")
    assert [name for name in sbatch_environment() if name.startswith("SLURM")] == [
        "SLURM_JWT",
        "SLURM_CLUSTERS",
        "SLURM_CONF",
    ]


def test_nvidia_smi_that_hangs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SMI_SECONDS", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert health._gpu_problems() == ["nvidia-smi has not answered within 0.2 s"]
    assert health._topology() == ""


def test_what_cannot_be_said_ends_nothing():
    with open("/dev/full", "w") as full:
        command = [
            sys.executable,
            "-c",
            "from loopmem_pretrain.cluster import job; job.say('x'); print('y', file=job.sys.stderr)",
        ]
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=True).stderr == "y\n"


def test_the_ranks_errors_are_told_once(tmp_path):
    for rank in range(3):
        text = "loopmem: error: bad key\n  what to do: mend it\n" if rank else "all well\n"
        (tmp_path / f"rank-{rank:05d}.log").write_text(text)
    assert what_ranks_said(tmp_path) == ["rank-00001 and 1 more: bad key\n  what to do: mend it"]


@pytest.mark.parametrize(
    ("job", "cancelled"),
    [
        ({"JobState": "CANCELLED"}, True),
        ({"JobState": "COMPLETING", "Reason": "None"}, True),
        ({"JobState": "COMPLETING", "Reason": "NodeDown"}, False),
        ({"JobState": "COMPLETING", "Reason": "None", "PreemptTime": "2026-01-01T00:00:00"}, False),
        ({"JobState": "NODE_FAIL", "Reason": "NodeDown"}, False),
    ],
)
def test_cancelled_or_ended_by_slurm(job, cancelled):
    assert was_cancelled(job) is cancelled


def test_a_finish_time_that_cannot_be_read(tmp_path, monkeypatch):
    """Two things that a cluster of the tests never says."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for said, expected in (("Unknown", None), ("in a minute", "EndTime=in a minute")):
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'JobId=7 EndTime={said}'\n")
        (tmp_path / "scontrol").chmod(0o755)
        if expected is None:
            assert end_time("7") is None
        else:
            with pytest.raises(EnvironmentFault, match=expected):
                end_time("7")


SHOWN = """\
JobId=71 JobName=wrap
   Priority=4294901754 Nice=5 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:02 TimeLimit=00:10:00 TimeMin=N/A
   Partition=debug AllocNode:Sid=controller:0
   ReqNodeList=(null) ExcNodeList=node4
   NumNodes=2 NumCPUs=16 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:1
   TRES=cpu=16,mem=4G,node=2,billing=16
   MinCPUsNode=2 MinMemoryNode=2G MinTmpDiskNode=0
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Comment=a b 
   StdErr=/home/me/my run/o-71
   StdOut=/home/me/my run/o-71
   Power=
   TresPerNode=gres:gpu:2,gres:nvme:1
"""  # noqa: W291


def test_options_of_a_job_by_what_slurm_says_of_it():
    job = job_fields(SHOWN)
    assert job["AllocNode:Sid"] == "controller:0" and job["Comment"] == "a b" and "QOS" not in job
    given = chain.options_of("71", job, {"SLURM_GPUS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "1"})
    assert given == [
        *("--time=00:10:00", "--partition=debug", "--exclude=node4", "--mem=2G", "--tmp=0", "--gres=nvme:1"),
        *("--nice=5", "--comment=a b", "--output=/home/me/my run/o-%j", "--cpus-per-task=1", "--gpus-per-node=2"),
        *("--open-mode=append", "--no-requeue", "--exclusive"),
    ]
    assert "--gres=gpu:2,nvme:1" in chain.options_of("71", job, {})
    exclusive_of_each_other = {"SLURM_MEM_PER_GPU": "9G", "SLURM_HINT": "nomultithread", "SLURM_THREADS_PER_CORE": "1"}
    given = chain.options_of("71", job, exclusive_of_each_other)
    assert {"--mem-per-gpu=9G", "--hint=nomultithread"} < {*given} and not {"--mem=2G", "--threads-per-core=1"} & {
        *given
    }


# sacct 22.05: a job that was requeued, one that failed at once, one that waits, and one whose GPUs are not accounted.
SACCT = """\
1|REQUEUED|2026-11-23T05:23:42|3600|2|node[1-2]|billing=2,cpu=2,gres/gpu=4,mem=2000000M,node=2
2|FAILED|2026-11-23T05:23:47|0|1|node1|billing=1,cpu=1,mem=1000000M,node=1
3|PENDING|Unknown|0|1|None assigned|
1|COMPLETED|2026-11-23T05:23:53|7200|2|node[1-2]|billing=2,cpu=2,gres/gpu=4,mem=2000000M,node=2
"""


def test_hours_by_accounting():
    found = accounting.parse(SACCT)
    assert [(held.job, held.state, held.gpus) for held in found] == [
        ("1", "REQUEUED", 4),
        ("2", "FAILED", 0),
        ("1", "COMPLETED", 4),
    ]
    assert accounting.hours(found) == "6.00 node hours, 12.00 GPU hours; 1 REQUEUED, 1 FAILED, 1 COMPLETED"
    assert accounting.rows(found)[-1].split() == ["1", "11-23", "05:23", "2.00", "node[1-2]", "4", "COMPLETED"]
    assert "GPUs are not accounted" in accounting.hours(accounting.parse(SACCT.splitlines()[1]))
    cancelled = accounting.parse("4|CANCELLED by 1000|2026-11-23T05:23:53|9|1|node1|cpu=2")
    assert cancelled[0].state == "CANCELLED"


def test_the_summary_of_a_run(tmp_path):
    def begin(start, time, checkpoint):
        return {
            "event": "start",
            "start": start,
            "time": time,
            "nodes": ["a", "b"],
            "ranks": 4,
            "checkpoint": checkpoint,
        }

    lines = [
        begin("1.0", 1000, -1),
        {"event": "end", "start": "1.0", "time": 4600, "verdict": "crashed", "checkpoint": 10},
    ]
    lines += [
        begin("1.1", 4700, 10),
        {"event": "end", "start": "1.1", "time": 8300, "verdict": "done", "checkpoint": 30},
    ]
    records.starts_file(tmp_path).parent.mkdir()
    records.starts_file(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [(5, 100.0), (10, 100.0), (15, 100.0), (15, 90.0), (20, 90.0), (30, 90.0)]
    text = "".join(json.dumps({"step": step, "seconds_per_step": seconds}) + "\n" for step, seconds in steps)
    torn = b'{"step": 11, "seconds_per\n\0\0\xff\n'
    (tmp_path / "metrics.jsonl").write_bytes(torn + text.encode() + torn)
    said = manage.status(str(tmp_path))
    assert "2 starts, 8.00 rank hours, 39% of them in steps that count; 5 steps trained again" in said
    assert "ends: 1 crashed, 1 done" in said
    assert "hours by the run's own records, as there is no accounting: " in said
    assert "crashed" in said.splitlines()[-7]


def test_a_run_that_slurm_did_not_start(tmp_path):
    """It has a verdict, and can be stopped; jobs and logs it has none."""
    with pytest.raises(ConfigError, match="is no run folder"):
        manage.stop(str(tmp_path))
    (tmp_path / "config.yaml").touch()
    (tmp_path / "status.json").write_text('{"status": "done", "reason": "all steps trained"}')
    assert manage.status(str(tmp_path)).splitlines() == [
        f"{tmp_path}: done, all steps trained",
        "not started by SLURM: no job of it is known",
    ]
    for ask in (lambda: manage.cancel(str(tmp_path)), lambda: manage.log_path(str(tmp_path), 0)):
        with pytest.raises(ConfigError, match="was not started by SLURM") as caught:
            ask()
        assert f"loopmem slurm stop {tmp_path}" in caught.value.fix
    assert manage.stop(str(tmp_path)) == f"nothing to stop: {tmp_path} is done"
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "status.json").write_text('{"status": "running", "reason": "training"}')
    assert str(tmp_path / "STOP") in manage.stop(str(tmp_path))
    (tmp_path / "status.json").write_text("")
    assert manage.status(str(tmp_path)).startswith(f"{tmp_path}: unknown, status.json is damaged")
    assert (tmp_path / "STOP").exists()
