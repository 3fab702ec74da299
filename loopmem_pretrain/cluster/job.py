"""The batch script of a training job, after its settings: checks, starts the ranks, watches them, decides what is next.

    python -m loopmem_pretrain.cluster.job --run-dir RUN --config FILE [options] -- [key=value ...]

How the ranks ended is told by RUN/status.json and their exit files, not by srun's exit code. docs/slurm.md has a table
of every outcome. Standard library only: this runs outside of the container.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args

from loopmem_pretrain import control
from loopmem_pretrain.cluster import chain, health, rank, records, slurm, step
from loopmem_pretrain.cluster.step import TICK, Heartbeat, srun, what_ranks_said
from loopmem_pretrain.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    EnvironmentFault,
    HangDetected,
    LoopMemError,
    TrainingGaveUp,
)

T = TypeVar("T")

Launcher = Literal["srun", "torchrun", "deepspeed"]
Mode = Literal["requeue", "chain", "no"]
LAUNCHERS, MODES = get_args(Launcher), get_args(Mode)
STEP = "train"
"""Name of the job step with the ranks."""
SLACK = 30.0
"""Seconds before the job's end at which the ranks shall be gone."""
MAX_STARTS = 20
"""Starts from one checkpoint, whatever ended them, after which the run gives up."""
FINAL = tuple(kind.exit_code for kind in (ConfigError, DataError, CheckpointError, ConversionError, TrainingGaveUp))
"""Exit codes of a rank that the same start would end with again."""
OVER: tuple[records.Verdict, ...] = ("done", "stopped", "failed")
"""Verdicts with which nothing goes on by itself."""
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk for which nobody waits."""
FLIGHT_RECORDER = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where torch is to write the last collectives of each rank after a timeout: the variable's name now, and before."""
STACKS = 5.0
"""Seconds for hanging ranks to write where they are."""


class Ending(NamedTuple):
    """How the step ended."""

    verdict: records.Verdict
    reason: str
    code: int = 0
    """Exit code of the batch script, where the run does not go on."""
    bad_nodes: Sequence[str] = ()


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m loopmem_pretrain.cluster.job", description=__doc__)
    add = options.add_argument
    add("--run-dir", required=True, help="run folder, on a filesystem that all nodes share")
    add("--config", required=True, help="config file of the run")
    add(
        "--launcher",
        choices=LAUNCHERS,
        default="srun",
        help="of the ranks; srun starts a task for each",
    )
    add("--continue", dest="mode", choices=MODES, default="requeue", help="how the run goes on when this job is over")
    add("--max-crashes", type=int, default=3, help="crashes without a new checkpoint before the run gives up")
    add("--health", choices=health.LEVELS, default="node", help="what is checked on every node before training")
    add("--spare-nodes", type=int, default=0, help="nodes of the job that are left idle while all are healthy")
    add("--hang-seconds", type=int, default=600, help="end the ranks when heartbeat.json stands still for so long")
    add("--start-seconds", type=int, default=1800, help="the same before there is a heartbeat")
    add("--python", default=sys.executable, help="interpreter of the ranks, inside the container where there is one")
    add("--wrap", default="", help='what the ranks run in, such as "apptainer exec --nv image.sif"')
    add("--srun", default="", help='more options for srun, such as "--container-image=image.sqsh"')
    add("arguments", nargs="*", help="more for `loopmem train`, after --: the arguments of the batch script")
    return options


class Job:
    """One start of a run, seen from its first node."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.run_dir = Path(options.run_dir).absolute()
        self.here = slurm.allocation()
        self.folder = self.run_dir / "logs" / self.here.start
        self.nodes = self.here.nodes[: len(self.here.nodes) - options.spare_nodes]
        if not self.nodes:
            raise EnvironmentFault(
                f"{options.spare_nodes} spare nodes of {len(self.here.nodes)}",
                "ask for more nodes, or fewer spare ones",
            )
        self.stop_file = self.folder / "stop"
        self.was_terminated = False
        self.asked = ""
        """Why the ranks are to save and stop."""
        self.is_passed_on = False
        self.successor: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """From the first check to what becomes of the job; returns the exit code of the batch script."""
        if patiently(self._is_over):
            return 0
        patiently(self._refuse_if_busy)
        self._refuse_if_it_cannot_go_on()
        patiently(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        newest = patiently(lambda: records.newest_checkpoint(self.run_dir))
        vain = records.starts_in_vain(patiently(lambda: records.read(self.run_dir)), newest)
        if self.options.mode == "chain":
            self._submit_successor()
        patiently(lambda: control.take_over(self.run_dir, self.here.start))
        begin: records.Record = {"event": "start", "start": self.here.start, "nodes": self.here.nodes}
        begin |= {"ranks": len(self.nodes) * self.here.tasks_per_node, "checkpoint": newest}
        patiently(lambda: records.append(self.run_dir, {**begin, "successor": self.successor}))
        patiently(lambda: chain.record_environment(self.here, self.folder))
        before = time.monotonic()
        if vain >= MAX_STARTS:
            ending = Ending("failed", f"{vain} starts have brought no new checkpoint", EnvironmentFault.exit_code)
        else:
            ending = self._check_and_train()
        try:
            patiently(lambda: self._record(ending, time.monotonic() - before))
        except OSError as error:  # what was trained is saved, and the next start is counted when it begins
            say(f"the verdict could not be written to {records.starts_file(self.run_dir)}: {error}")
        say(f"{ending.verdict}: {ending.reason}")
        return self._go_on(ending)

    def _record(self, ending: Ending, seconds: float) -> None:
        end: records.Record = {"event": "end", "start": self.here.start}
        end |= {"verdict": ending.verdict, "reason": ending.reason}
        end |= {"checkpoint": records.newest_checkpoint(self.run_dir), "seconds": round(seconds, 1)}
        records.append(self.run_dir, {**end, "bad_nodes": list(ending.bad_nodes)})

    def _is_over(self) -> bool:
        """Whether there is nothing to start, so that a chain that is queued behind a finished run burns through."""
        if records.read_json(self.run_dir / "status.json").get("status") == "done":
            say(f"nothing to do: {self.run_dir} is done")
        elif (self.run_dir / control.STOP).exists():
            say(f"nothing is started while {self.run_dir / control.STOP} is there")
        elif (self.run_dir / control.PAUSE).exists():
            say(f"held: remove {self.run_dir / control.PAUSE}, then `scontrol release {self.here.job}`")
            slurm.put_back(self.here.job, hold=True)
            _wait_for_the_end()
        else:
            return False
        return True

    def _refuse_if_busy(self) -> None:
        """Two jobs of one run would take the folder from each other for ever."""
        other = control.owner(self.run_dir).partition(".")[0]
        if other and other != self.here.job and slurm.is_running(other):
            raise EnvironmentFault(
                f"job {other} trains in the run folder {self.run_dir}",
                "wait for it, cancel it, or choose another run_dir",
            )

    def _refuse_if_it_cannot_go_on(self) -> None:
        """Better now than when the time is over."""
        if self.options.mode == "requeue" and slurm.show_job(self.here.job).get("Requeue") == "0":
            raise EnvironmentFault(
                f"job {self.here.job} may not be put back into the queue (--no-requeue, or the site's rule), and "
                "CONTINUE=requeue needs that",
                "submit with --requeue, or with CONTINUE=chain (`loopmem slurm submit --continue chain`)",
            )

    def _submit_successor(self) -> None:
        """The next job of a chain; a refusal does not keep this one from training, and it is asked for again later."""
        try:
            self.successor = chain.submit_successor(self.here, self.run_dir, self.options.arguments)
            say(f"job {self.successor} will go on when this one is over")
        except (EnvironmentFault, OSError) as fault:
            say(f"no job that goes on could be submitted: {fault}")

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.asked = "the time of the job is nearly over (SIGUSR1)"
        else:
            self.was_terminated = True
            self.asked = f"the job was asked to end ({signal.Signals(number).name})"
        self._ask_to_stop()
        say(f"{self.asked}: asking the ranks to save and stop")

    def _ask_to_stop(self) -> None:
        """Pass on what this process was asked for; called again while the ranks run, if that does not succeed."""
        try:
            if self.folder.is_dir() and not self.stop_file.exists():
                temporary = self.stop_file.with_name(".stop.tmp")
                temporary.write_text(self.asked + "\n", encoding="utf-8")
                os.replace(temporary, self.stop_file)
            self.is_passed_on = self.folder.is_dir()
        except OSError as error:
            say(f"the ranks cannot be asked to stop: {error}")

    # ------------------------------------------------------------------------------------------------ the ranks

    def _check_and_train(self) -> Ending:
        shared = health.disk_problems(self.run_dir)
        if shared:
            return Ending("failed", "; ".join(shared), EnvironmentFault.exit_code)
        bad: dict[str, list[str]] = {}
        failure: Ending | None = None
        try:
            bad = patiently(lambda: health.check_nodes(self.options, self.here, self.folder))
        except EnvironmentFault as fault:
            failure = Ending("failed", f"{fault.problem}; {fault.fix}", fault.exit_code)
        if self.asked or failure:  # the end of the job may be why nodes did not answer, or ranks did not finish
            job = slurm.show_job(self.here.job)
            if job["JobState"] != "RUNNING":
                return Ending("ended", f"SLURM says {job['JobState']}, reason {job.get('Reason')}; {self.asked}", 1)
        if self.asked:
            verdict: records.Verdict = "preempted" if self.was_terminated else "interrupted"
            return Ending(verdict, f"{self.asked}, before the ranks were started")
        if failure:
            return failure
        for node, problems in bad.items():
            say(f"{node} is left out: {'; '.join(problems)}")
        healthy = [node for node in self.here.nodes if node not in bad]
        if not healthy and len(bad) > 1:
            return Ending("failed", "no node is fit, so it is not the nodes", EnvironmentFault.exit_code)
        if len(healthy) < len(self.nodes):
            reason = f"{len(self.nodes)} nodes are needed and {len(healthy)} are healthy"
            return Ending("lost nodes", reason, EnvironmentFault.exit_code, list(bad))
        self.nodes = healthy[: len(self.nodes)]
        code, hangs, before = self._train()
        return patiently(lambda: self._judge(code, hangs, before))

    def _train(self) -> tuple[int, bool, records.Record]:
        """Start the ranks and wait for their end: srun's exit code, whether they hung, status.json before."""
        before = patiently(lambda: records.read_json(self.run_dir / "status.json"))
        command = step_command(self.options, self.here, self.nodes)
        say(f"{len(self.nodes) * self.here.tasks_per_node} ranks on {','.join(self.nodes)}: {shlex.join(command)}")
        say(f"logs: {rank.log_file(self.folder, 0)} and its neighbours")
        ranks = subprocess.Popen(command, env=self._environment(), stdin=subprocess.DEVNULL)
        watch = Heartbeat(self.run_dir / "heartbeat.json", self.options.start_seconds, self.options.hang_seconds)
        hangs = False
        while ranks.poll() is None:
            time.sleep(TICK)
            if self.asked and not self.is_passed_on:
                self._ask_to_stop()
            if watch.stands_still() and not hangs:
                hangs = True
                say(f"{watch}: ending the ranks; where they were is in their logs")
                self._end_ranks(ranks)
        return ranks.returncode, hangs, before

    def _environment(self) -> dict[str, str]:
        end = None
        try:
            end = slurm.end_time(self.here.job)
        except EnvironmentFault as fault:  # the warning before the end still comes
            say(f"the ranks do not know when the job ends: {fault}")
        values = {
            **step.environment(self.here, self.nodes),
            control.START: self.here.start,
            control.STOP_FILE: str(self.stop_file),
            rank.LOG_DIR: str(self.folder),
            rank.LAUNCHER: self.options.launcher,
        }
        for name in FLIGHT_RECORDER:
            values.setdefault(name, f"{self.folder}/nccl-")
        if end is not None:
            values[control.END_TIME] = str(end - SLACK)
        if self.here.cpus_per_task:
            values.setdefault("OMP_NUM_THREADS", str(self.here.cpus_per_task))
        return values

    def _end_ranks(self, ranks: "subprocess.Popen[bytes]") -> None:
        """Stacks first, then no mercy: what hangs answers to nothing else."""
        if self.options.launcher == "srun":  # launchers would die of it
            for running in slurm.steps(self.here.job, STEP):
                slurm.complaint_after("scancel", "--signal=QUIT", running)  # refused or not, they end
            time.sleep(STACKS)
        step.end(ranks, self.here.job, STEP)

    # ------------------------------------------------------------------------------------------------ afterwards

    def _judge(self, code: int, hangs: bool, before: records.Record) -> Ending:
        owner = control.owner(self.run_dir)
        if owner != self.here.start:  # this node was cut off and is back: the job that SLURM knows is another start
            gone = f"{self.run_dir / control.FENCE} is gone, which says whether another start has taken over"
            reason = f"start {owner} has taken over" if owner else gone
            return Ending("ended", reason, EnvironmentFault.exit_code)
        status = records.read_json(self.run_dir / "status.json")
        fresh = {} if status == before else status
        reason = str(fresh.get("reason", f"srun ended with {code}"))
        if fresh.get("status") == "done":
            return Ending("done", reason)
        job = slurm.show_job(self.here.job)
        if job["JobState"] != "RUNNING":
            return Ending("ended", f"SLURM says {job['JobState']}, reason {job.get('Reason')}; {reason}", 1)
        if fresh.get("status") == "interrupted":
            asked: tuple[tuple[str, records.Verdict], ...] = ((control.STOP, "stopped"), (control.PAUSE, "paused"))
            for name, verdict in asked:
                if (self.run_dir / name).exists():
                    return Ending(verdict, reason)
            if reason.startswith(control.AT_STEP):
                return Ending("stopped", reason)
            return Ending("interrupted", reason)
        if slurm.was_preempted(job) or self.was_terminated:
            return Ending("preempted", reason)
        return self._judge_crash(code, hangs, reason)

    def _judge_crash(self, code: int, hangs: bool, reason: str) -> Ending:
        said = what_ranks_said(self.folder)
        for text in said:
            say(text)
        if said and reason.startswith("srun ended"):
            reason = said[0].splitlines()[0]
        exits = [record for path in self.folder.glob("rank-*.exit") if (record := records.read_json(path))]
        exits.sort(key=lambda record: record["time"])
        codes = [end["code"] for end in exits]
        final = next((each for each in codes if each in FINAL), None)
        if final is not None:
            return Ending("failed", f"exit code {final}: {reason}", final)
        disk = health.disk_problems(self.run_dir)
        if disk:
            return Ending("failed", "; ".join(disk), EnvironmentFault.exit_code)
        unfit = health.unfit_nodes(self.nodes, self.folder, self.here)
        for node, problems in unfit.items():
            say(f"{node}: {'; '.join(problems)}")
        if health.blames_nodes(unfit, self.nodes):
            why = "; ".join(f"{node}: {', '.join(problems)}" for node, problems in unfit.items())
            return Ending("lost nodes", why, EnvironmentFault.exit_code, list(unfit))
        if not any(self.folder.glob("rank-*.log")):
            reason = f"no rank has begun; see what srun says above, and RANK_PYTHON, WRAP and SRUN_OPTIONS: {reason}"
        last = HangDetected.exit_code if hangs else codes[0] if codes else EnvironmentFault.exit_code
        newest = records.newest_checkpoint(self.run_dir)
        crashes = 1 + records.crashes_in_vain(records.read(self.run_dir), newest)
        counted = f"crash {crashes} without a new checkpoint ({self.options.max_crashes} are allowed): {reason}"
        return Ending("failed" if crashes > self.options.max_crashes else "crashed", counted, last)

    def _go_on(self, ending: Ending) -> int:
        """What becomes of the job, by verdict and mode; returns the exit code of the batch script where it ends here.

        verdict                                       requeue              chain                      no
        done, stopped, failed                         ends                 ends, successor cancelled  ends
        paused                                        held                 successor held             ends
        interrupted, preempted, lost nodes, crashed   back into the queue  successor goes on          ends
        ended                                         ends; successor cancelled where the job was
        """
        mode = self.options.mode
        if ending.verdict == "ended":
            # SLURM has decided; a requeue from here would bring a cancelled job back to life.
            if slurm.was_cancelled(slurm.show_job(self.here.job)):
                self._drop_successor()
        elif ending.verdict in OVER or mode == "no":
            self._drop_successor()
        elif ending.verdict == "paused":
            return self._hold()
        elif mode == "requeue":
            self._requeue(ending.bad_nodes)
        else:
            return self._leave_to_successor(ending)
        return ending.code

    def _hold(self) -> int:
        if not self.successor:
            slurm.put_back(self.here.job, hold=True)
            _wait_for_the_end()
        say(f"held: remove {self.run_dir / control.PAUSE}, then `scontrol release {self.successor}`")
        return try_to("scontrol", "hold", self.successor)

    def _requeue(self, without: Sequence[str]) -> NoReturn:
        if without:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            slurm.hold_without(self.here.job, without)
        else:
            slurm.put_back(self.here.job)
        _wait_for_the_end()

    def _leave_to_successor(self, ending: Ending) -> int:
        if not self.successor:
            self._submit_successor()
        if not self.successor:
            say("the run has ended early: submit it again")
            return EnvironmentFault.exit_code
        if ending.bad_nodes:
            nodes = ",".join(ending.bad_nodes)
            try_to("scontrol", "update", f"JobId={self.successor}", f"ExcNodeList={nodes}")
        return ending.code

    def _drop_successor(self) -> None:
        if self.successor:
            try_to("scancel", self.successor)


def _wait_for_the_end() -> NoReturn:
    """The job is back in the queue, so SLURM ends this process now."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(60)
    sys.exit(1)


def step_command(options: argparse.Namespace, here: slurm.Allocation, nodes: Sequence[str]) -> list[str]:
    """srun with a task for each rank, or for each node where a launcher starts the ranks."""
    tasks = here.tasks_per_node if options.launcher == "srun" else 1
    cpus = here.cpus_per_task and here.cpus_per_task * here.tasks_per_node // tasks
    # Rank 0 ends last, and a site may have it killed a few seconds after the others (WaitTime): not with --wait=0.
    command = [*srun(STEP, nodes, tasks, cpus), "--wait=0", "--kill-on-bad-exit=1", "--unbuffered"]
    command += shlex.split(options.srun)
    return [*command, *shlex.split(options.wrap), options.python, *train_command(options)]


def train_command(options: argparse.Namespace) -> list[str]:
    """What a rank runs, after its interpreter."""
    folder = str(Path(options.run_dir).absolute())
    # A value is read as YAML, where # may begin a comment and a colon a mapping.
    value = folder if re.fullmatch(r"[\w/.+-]+", folder) else json.dumps(folder)
    return ["-m", rank.MODULE, "train", "--config", options.config, *options.arguments, f"run_dir={value}"]


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns; repeated while the disk does not answer: that of a run may be away for a while.

    Raises:
        OSError: for slurm.PATIENCE, or one that time does not mend.
    """
    deadline, told = time.monotonic() + slurm.PATIENCE, False
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno in LASTING or time.monotonic() > deadline:
                raise
            if not told:
                say(f"{error}; trying again for {slurm.PATIENCE:.0f} s")
                told = True
        time.sleep(slurm.PAUSE)


def say(text: str) -> None:
    """A line of the job's output, not buffered: a signal may come in the middle of another line."""
    with contextlib.suppress(OSError):  # a full disk below the output is no reason to end a run
        os.write(1, f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n".encode())


def try_to(*command: str) -> int:
    """Tell SLURM something that the run does not depend on; says a refusal, and returns the exit code for it."""
    complaint = slurm.complaint_after(*command)
    if complaint:
        say(f"SLURM refused: {complaint}")
    return EnvironmentFault.exit_code if complaint else 0


def main(arguments: Sequence[str]) -> int:
    os.environ["SLURM_EXPORT_ENV"] = "ALL"  # or srun withholds from ranks what `sbatch --export` withheld from this job
    try:
        return Job(parser().parse_args(arguments)).run()
    except (LoopMemError, OSError) as error:
        fix = "see that the disk of the run folder answers and has space, then submit it again"
        fault = error if isinstance(error, LoopMemError) else EnvironmentFault(f"the job cannot go on: {error}", fix)
        print(f"loopmem: error: {fault}", file=sys.stderr, flush=True)
        return fault.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
