"""What SLURM says about the job that this process belongs to, and what the job may ask of SLURM.

Standard library only, like everything that runs in the batch script: there may be a container around the ranks, and the
commands of SLURM are outside of it.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loopmem_pretrain.errors import EnvironmentFault

FIRST_PORT, PORTS = 20_000, 10_000
"""Where ranks meet: below the ephemeral range (32768 and up), from which the system gives ports to anybody."""
STRIDE = 1237
"""Between the ports of two restarts of a job: not those of the jobs after it, which may run on the same nodes."""
PATIENCE, AT_THE_TERMINAL = 900.0, 60.0
"""Seconds for which a controller that does not answer is asked again, by a batch script and for somebody who waits: it
may be busy, restarting, or in maintenance while the jobs go on."""
ANSWER = 60.0
"""Seconds that one command may take, and for which a question that is answered by a complaint is repeated."""
PAUSE = 2.0
"""Seconds between attempts."""
HELD = 20.0
"""Seconds for changing a job that is held: SLURM ends the process that does it soon (KillWait, 30 s unless told)."""
UNANSWERED = re.compile(
    "unable to contact|socket timed out|no answer within|unexpected message received|message (send|receive) failure"
    "|zero bytes were transmitted|communication (connection|shutdown) failure|protocol authentication error"
    "|insane message length|standby mode|connection (refused|reset|timed out)|temporarily un",
    re.IGNORECASE,
)
"""What commands of SLURM say when there was no answer: `scontrol requeue` of 22.05 calls it an unexpected message, and
while munge restarts they complain of authentication."""
UNKNOWN_JOB = "Invalid job id"
REFUSED = "presently disabled"
"""What SLURM says of requeueing a job that must not be."""


class Allocation(NamedTuple):
    """What this job was given."""

    job: str
    restart: int
    """How often SLURM has put the job back into the queue."""
    nodes: list[str]
    tasks_per_node: int
    """Ranks a node."""
    cpus_per_task: int | None

    @property
    def start(self) -> str:
        """Name of this start among all starts of a run."""
        return f"{self.job}.{self.restart}"

    @property
    def port(self) -> int:
        """Another one in each restart: a process that was left over may still hold that of the start before."""
        return FIRST_PORT + (int(self.job) + self.restart * STRIDE) % PORTS


def allocation() -> Allocation:
    """This job, checked: every node has as many tasks as any other, and a GPU for each where GPUs were asked for.

    Raises:
        EnvironmentFault: not in a job, or the numbers do not fit each other.
    """
    environment = os.environ
    job, node_list = environment.get("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
    if not job or not node_list:
        raise EnvironmentFault(
            "this is no job of SLURM: SLURM_JOB_ID or SLURM_JOB_NODELIST is not set",
            "submit with `loopmem slurm submit`, or with sbatch as the head of slurm/pretrain.sbatch says",
        )
    nodes = ask("scontrol", "show", "hostnames", node_list).split()
    each = environment.get("SLURM_TASKS_PER_NODE", "")
    uniform = re.fullmatch(r"(\d+)(\(x\d+\))?", each)
    tasks = int(environment.get("SLURM_NTASKS", "0"))
    per_node = int(uniform[1]) if uniform else 0
    gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
    said = f"{len(nodes)} nodes, SLURM_NTASKS={tasks}, SLURM_TASKS_PER_NODE={each}, SLURM_GPUS_ON_NODE={gpus}"
    if not uniform or per_node * len(nodes) != tasks:
        raise EnvironmentFault(
            f"tasks a node x nodes is not the number of ranks: {said}",
            "give --nodes and --ntasks-per-node, and no --ntasks",
        )
    if gpus.isdecimal() and int(gpus) not in (0, per_node):
        raise EnvironmentFault(
            f"a rank needs one GPU and every GPU a rank: {said}", "make --ntasks-per-node equal to --gpus-per-node"
        )
    return Allocation(
        job=job,
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),  # not set in the first run
        nodes=nodes,
        tasks_per_node=per_node,
        cpus_per_task=int(environment["SLURM_CPUS_PER_TASK"]) if "SLURM_CPUS_PER_TASK" in environment else None,
    )


def ask(*command: str, patience: float = PATIENCE) -> str:
    """What a command of SLURM prints.

    Raises:
        EnvironmentFault: it is not there, fails for a minute, or has no answer for `patience` seconds.
    """
    deadline = time.monotonic() + min(patience, ANSWER)
    while True:
        result = _answer(command, patience)
        if result.returncode == 0:
            return result.stdout
        complaint = result.stderr.strip()
        if time.monotonic() > deadline or UNANSWERED.search(complaint) or UNKNOWN_JOB in complaint:
            fix = "see whether `sinfo` answers, and what `scontrol ping` says"
            raise EnvironmentFault(f"{' '.join(command)} failed: {complaint}", fix)
        time.sleep(PAUSE)


def sbatch(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Submit, once: a submission that is repeated because its answer was lost makes two jobs. The job's id.

    Raises:
        EnvironmentFault: SLURM refuses it.
    """
    result = _run(["sbatch", "--parsable", *arguments], sbatch_environment() if environment is None else environment)
    if result.returncode:
        raise EnvironmentFault(f"sbatch failed: {result.stderr.strip()}", "see docs/slurm.md, and try sbatch by hand")
    return result.stdout.strip().split(";")[0]


def test_only(script: str) -> str:
    """What SLURM would say of the script; empty where it would take it.

    Raises:
        EnvironmentFault: there is no SLURM here.
    """
    result = _run(["sbatch", "--test-only"], sbatch_environment(script), script)
    return result.stderr.strip() or f"exit code {result.returncode}" if result.returncode else ""


def sbatch_environment(script: str = "") -> dict[str, str]:
    """Variables for sbatch, without those that would make another job of the script than it says."""
    left_out = {"SBATCH_WAIT", *overriding(script)}
    # The numbers of the job that this process may belong to are not those of the new one.
    left_out |= {name for name in os.environ if name.startswith("SLURM_") and name not in KEPT}
    return {name: value for name, value in os.environ.items() if name not in left_out}


def overriding(script: str) -> list[str]:
    """SBATCH_* variables that are set here and would take the place of what #SBATCH lines of the script say."""
    options = re.findall(r"^#SBATCH --([\w-]+)", script, flags=re.MULTILINE)
    groups = [next((group for group in SAME if option in group), (option,)) for option in options]
    names = {VARIABLES.get(each, each.upper().replace("-", "_")) for group in groups for each in group}
    return sorted(name for name in os.environ if name.removeprefix("SBATCH_") in names and name.startswith("SBATCH_"))


KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Which SLURM, and who asks."""
SAME = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("gpus", "gpus-per-node", "gpus-per-task", "gres"),
    ("requeue", "no-requeue"),
)
"""Options of sbatch that say the same thing in different ways."""
VARIABLES = {"mem": "MEM_PER_NODE", "time": "TIMELIMIT", "array": "ARRAY_INX", "switches": "REQ_SWITCH"}
"""What comes after SBATCH_ in an option's variable, where it is not the option's name."""


def complaint_after(*command: str, patience: float = PATIENCE) -> str:
    """Run a command of SLURM; an empty string where it succeeds, else what it complains about.

    Repeated for `patience` seconds where there is no answer, so what it asks for may have been done already.
    """
    result = _answer(command, patience)
    return "" if result.returncode == 0 else result.stderr.strip() or f"exit code {result.returncode}"


def _answer(command: Sequence[str], patience: float) -> "subprocess.CompletedProcess[str]":
    """The first result that is an answer of the controller's, or the last one within `patience` seconds."""
    deadline, told = time.monotonic() + patience, False
    while True:
        result = _run(command)
        if result.returncode == 0 or not UNANSWERED.search(result.stderr) or time.monotonic() > deadline:
            return result
        if not told:
            said = f"{' '.join(command)}: {result.stderr.strip()}; asking again for {patience:.0f} s"
            print(said, file=sys.stderr, flush=True)
            told = True
        time.sleep(PAUSE)


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, script: str | None = None
) -> "subprocess.CompletedProcess[str]":
    if environment is None:  # what a user likes to see is not what is read here
        own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        environment = {**own, "SLURM_TIME_FORMAT": "standard"}
    try:
        return subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=ANSWER, check=False, env=environment
        )
    except FileNotFoundError:
        raise EnvironmentFault(
            f"there is no `{command[0]}` here",
            "run this where SLURM's commands are: on a login node, or in a batch script outside of the container",
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {ANSWER:.0f} s")


def show_job(job: str) -> dict[str, str]:
    """What `scontrol show job` says, by key."""
    return job_fields(ask("scontrol", "show", "job", job))


def job_fields(said: str) -> dict[str, str]:
    """Values by key, blanks in them included; what is not set ("(null)", "N/A") is left out."""
    key = r"[A-Z][\w/:]*="
    found = re.findall(rf"(?:^|\s)({key})(.*?)(?=\s+{key}|\s*$)", said, flags=re.MULTILINE)
    return {name.removesuffix("="): value for name, value in found if value not in ("", "(null)", "N/A")}


def is_running(job: str) -> bool:
    """Whether the job trains now; one that SLURM has forgotten does not.

    Raises:
        EnvironmentFault: SLURM does not answer, so that it may.
    """
    try:
        return ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING"
    except EnvironmentFault as fault:
        if UNKNOWN_JOB in fault.problem:
            return False
        raise


def steps(job: str, name: str) -> list[str]:
    """Steps of that name which run in the job."""
    listed = ask("squeue", "-h", "-s", "-j", job, "-o", "%i %j").splitlines()
    return [line.split()[0] for line in listed if line.split()[1:] == [name]]


def was_cancelled(job: Mapping[str, str]) -> bool:
    """Whether somebody has cancelled a job that does not run any more.

    While its processes end SLURM calls any job COMPLETING, but gives reasons for what it does itself.
    """
    if job["JobState"] != "COMPLETING":
        return job["JobState"].startswith("CANCELLED")
    return job.get("Reason") == "None" and not was_preempted(job)


def was_preempted(job: Mapping[str, str]) -> bool:
    """Whether a more urgent job takes the place of this one."""
    return job.get("PreemptTime", "None") not in ("None", "Unknown")


def end_time(job: str) -> float | None:
    """When the job's time is over, in seconds since the epoch; None where it has no limit.

    Raises:
        EnvironmentFault: what SLURM says is no time.
    """
    # Asked for in seconds since the epoch: a local time means two moments when the clock is set back.
    said = job_fields(ask("env", "SLURM_TIME_FORMAT=%s", "scontrol", "show", "job", job)).get("EndTime", "Unknown")
    if said == "Unknown":
        return None
    if not said.isdecimal():
        raise EnvironmentFault(
            f"when job {job} ends cannot be read: EndTime={said}", "see what `scontrol show job` says of it"
        )
    return float(said)


def put_back(job: str, hold: bool = False) -> None:
    """Put a running job back into the queue, where it is held if `hold`; SLURM ends its processes soon.

    Raises:
        EnvironmentFault: SLURM refuses it for a minute.
    """
    deadline = time.monotonic() + ANSWER
    while complaint := complaint_after("scontrol", "requeuehold" if hold else "requeue", job):
        # An attempt whose answer was lost may have been heard; the next one is refused then.
        if show_job(job)["JobState"] != "RUNNING":
            return
        if time.monotonic() > deadline or REFUSED in complaint:
            raise EnvironmentFault(f"job {job} could not be put back into the queue: {complaint}", "submit it again")
        time.sleep(PAUSE)


def hold_without(job: str, nodes: Sequence[str]) -> None:
    """Put the job back into the queue so that it is not given `nodes` again.

    A running job's list cannot be changed, so it is requeued and held, changed, and released. The caller lives until
    then only if it ignores SIGTERM.

    Raises:
        EnvironmentFault: SLURM refuses a step of it; says which.
    """
    refused = list(filter(None, show_job(job).get("ExcNodeList", "").split(",")))
    change = ("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*refused, *nodes])}")
    release = ("scontrol", "release", job)
    put_back(job, hold=True)
    deadline = time.monotonic() + HELD
    while complaint := complaint_after(*change):  # while it ends
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"job {job} is in the queue, held, and could not be told to leave out {','.join(nodes)}: {complaint}",
                f"let it go on without them: {' '.join(change)}, then {' '.join(release)}",
            )
        time.sleep(0.5)
    complaint = complaint_after(*release)
    if complaint:
        raise EnvironmentFault(f"job {job} is in the queue, held: {complaint}", f"let it go on: {' '.join(release)}")
