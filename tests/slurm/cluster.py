"""A real SLURM cluster for a test: slurmctld, and a slurmd for each of several nodes, on this one machine.

Everything lives in namespaces of its own, below one process (cluster.sh): every node has its own host name, address,
processes and mounts, and nothing is left when that process ends, which the system sees to when the test session ends.
Files of all nodes are those of this machine, as on a cluster with a shared filesystem. GPUs are made up: SLURM counts,
grants and binds them (CUDA_VISIBLE_DEVICES), there are none behind the numbers.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter", "pgrep")
FREEZER = Path("/sys/fs/cgroup/freezer")
GPUS, CPUS = 2, 8
"""Of a node."""

CONFIG = """\
ClusterName=test
SlurmctldHost=controller(10.213.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired (120 s unless told, 5 at least).
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/spool/%n.pid
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/%n
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
WaitTime=0
CompleteWait=0
MinJobAge=600
BatchStartTimeout=10
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=node[1-{count}] Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=node[1-{count}] MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF
# A large machine that is not there, to ask `sbatch --test-only` about.
NodeName=h[0001-0936] NodeAddr=127.0.0.1 Port=9 CPUs=96 Boards=1 SocketsPerBoard=2 CoresPerSocket=48 \
    RealMemory=1900000 Gres=gpu:8 State=CLOUD
PartitionName=batch Nodes=h[0001-0936] MaxTime=24:00:00 DefaultTime=01:00:00 MaxNodes=384
PartitionName=devel Nodes=h[0001-0010] MaxTime=02:00:00
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=100000
SuspendExcNodes=node[1-{count}]
"""

NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
# sacct does not read AuthInfo: it finds the socket of munge by AccountingStoragePass.
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=controller
AccountingStoragePass={dir}/munge/socket
AccountingStorageTRES=gres/gpu"""
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
DbdHost=controller
SlurmUser={user}
LogFile={dir}/log/slurmdbd
PidFile={dir}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
"""


def why_no_accounting() -> str | None:
    """The same for a cluster with slurmdbd."""
    missing = [program for program in ("slurmdbd", "mariadbd", "sacct") if shutil.which(program, path=_path()) is None]
    said = f"accounting cannot be tried here: no {', '.join(missing)} (tests/slurm/install.sh accounting installs them)"
    return why_not() or (said if missing else None)


def why_not() -> str | None:
    """Why no cluster can be had here, for the reason of a skip; None where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return (
            f"SLURM cannot be tried here: no {', '.join(missing)} (on Debian and Ubuntu: apt-get install "
            "--no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps)"
        )
    probe = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
    return f"SLURM cannot be tried here: no new namespaces: {probe.stderr.strip()}" if probe.returncode else None


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _unshare() -> list[str]:
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["unshare", *own_user, *spaces]


class Cluster:
    """Starts in about half a second, with `accounting` in ten; `stop`, or the end of the tests, ends all of it."""

    def __init__(self, nodes: int = 2, proctrack: str = "linuxproc", accounting: bool = False) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        # Paths of its sockets must stay below 108 characters, so not below pytest's own folders.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self._write_files(proctrack, accounting)
        # A job of the developer's, inside which the tests may run, must not show through.
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.env |= {"SLURM_CONF": str(self.dir / "slurm.conf"), "PATH": _path()}
        command = ["setpriv", "--pdeathsig", "KILL", *_unshare(), str(HERE / "cluster.sh"), "up", str(self.dir)]
        with (self.dir / "log" / "cluster.sh").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(nodes)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env
            )
        try:
            wait_for(lambda: bool(self._children()), 10, "the first process")
            patience = 150 if accounting else 30  # a database is made first
            wait_for(self.is_up, patience, lambda: f"the nodes to come up\n{self.logs()}", pause=0.05)
        except BaseException:
            self.stop()
            raise

    def _write_files(self, proctrack: str, accounting: bool) -> None:
        for name in ("munge", "state", "spool", "log", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.dir / name).mkdir()
        os.mkfifo(self.dir / "commands")
        (self.dir / "munge").chmod(0o755)
        self.dir.chmod(0o755)
        key = self.dir / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for number in range(GPUS):  # a character device that slurmd may look at; what it is does not matter to it
            (self.dir / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        addresses = [f"10.213.0.{10 + number} {node}" for number, node in enumerate(self.nodes, start=1)]
        hosts = ["127.0.0.1 localhost", "10.213.0.1 controller", *addresses, ""]
        (self.dir / "hosts").write_text("\n".join(hosts))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        lines = [
            f"NodeName={node} NodeAddr=10.213.0.{10 + number} CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{GPUS} State=UNKNOWN"
            for number, node in enumerate(self.nodes, start=1)
        ]
        values = {"dir": self.dir, "user": user, "proctrack": proctrack, "count": len(self.nodes)}
        values["accounting"] = ACCOUNTING.format(**values) if accounting else NO_ACCOUNTING
        if accounting:
            path = self.dir / "slurmdbd.conf"
            path.touch(0o600)
            path.write_text(SLURMDBD.format(**values))
        (self.dir / "slurm.conf").write_text(CONFIG.format(nodes="\n".join(lines), **values))
        devices = f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={self.dir}/dev/nvidia[0-{GPUS - 1}]"
        (self.dir / "gres.conf").write_text(f"AutoDetect=off\n{devices}\n")
        (self.dir / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")

    def _children(self) -> list[str]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if self.process.poll() is not None:
            raise RuntimeError(f"the cluster has ended:\n{self.logs()}")
        return path.read_text().split()

    def logs(self) -> str:
        """The end of every log, for the message of a failure."""
        files = sorted((self.dir / "log").iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def stop(self) -> None:
        """End every process of the cluster and remove its files."""
        self.process.kill()  # unshare --kill-child takes the first process of the namespace along, and that all others
        self.process.wait()
        for node in self.nodes:  # proctrack/cgroup leaves its empty folders
            for folder, _, _ in os.walk(FREEZER / f"slurm_{node}", topdown=False):
                os.rmdir(folder)
        shutil.rmtree(self.dir, ignore_errors=True)

    def run(self, *command: Any, check: bool = True, **variables: Any) -> str:
        """What a command says that a user gives on the login node; `variables` are added to its environment."""
        env = {**self.env, **{name: str(value) for name, value in variables.items()}}
        own_user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", self._children()[0], *own_user, "--net", "--uts", "--mount", "--pid"]
        enter += [f"--wd={os.getcwd()}"]
        result = subprocess.run(
            [*enter, "--", *map(str, command)], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        if check and result.returncode:
            raise AssertionError(f"{command} ended with {result.returncode}: {result.stdout}{result.stderr}")
        return (result.stdout + result.stderr).strip()

    def is_up(self) -> bool:
        said = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T", check=False).splitlines()
        return {line.split()[0] for line in said if line.endswith((" idle", " mixed", " allocated"))} == {*self.nodes}

    def sbatch(self, *arguments: Any, **variables: Any) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **variables).splitlines()[-1].split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        said = self.run("scontrol", "show", "job", "-o", job)
        return dict(item.split("=", 1) for item in said.split() if "=" in item)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until the job is in one of the states, any final one unless told."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        last = ""

        def reached() -> bool:
            nonlocal last
            last = self.state(job)
            return last in wanted

        wait_for(reached, seconds, lambda: f"job {job} to be {' or '.join(wanted)}; it is {last}\n{self.log(job)}")
        return last

    def log(self, job: str) -> str:
        """The output of a job."""
        path = Path(self.show(job).get("StdOut", "/dev/null"))
        return path.read_text(errors="replace") if path.exists() else ""

    def off(self, node: str) -> None:
        """Power loss. SLURM takes 15 s to notice; here it is told."""
        self.run("kill", "-KILL", (self.dir / f"{node}.pid").read_text().strip())
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=off")

    def on(self, node: str) -> None:
        """Start a node that is off, unless it runs, and take it back into service."""
        if not self.pids(node):
            self._tell(f"{HERE}/cluster.sh node {self.dir} {node.removeprefix('node')}")
        self._tell(f"ip link set v{node.removeprefix('node')} up")
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def pids(self, node: str) -> list[int]:
        """Every process of a node, as this process sees them."""
        first = (self.dir / f"{node}.pid").read_text().strip()
        space = self.run("readlink", f"/proc/{first}/ns/pid", check=False)  # nothing where the node is off
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "pid") == space:
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
        return found

    def freeze(self, node: str) -> None:
        """Every process of it stands still."""
        for pid in self.pids(node):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        for pid in self.pids(node):
            os.kill(pid, signal.SIGCONT)

    def cut(self, node: str) -> None:
        """Pull its network cable; the disk that all share stays within its reach.

        Waits until it is out: SLURM, told too early that the node is gone, would end the job's processes there.
        """
        done = self.dir / f"{node}.cut"
        self._tell(f"ip link set v{node.removeprefix('node')} down && touch {done}")
        wait_for(done.exists, 20, f"the cable of {node} to be out", pause=0.05)
        done.unlink()

    def _tell(self, command: str) -> None:
        """Let the cluster's first process run a command; does not wait for it."""
        (self.dir / "commands").write_text(command + "\n")

    def restart_controller(self) -> None:
        """As an administrator does; jobs go on meanwhile."""
        self.stop_controller()
        time.sleep(2)
        self.start_controller()

    def stop_controller(self) -> None:
        self.run("sh", "-c", f"kill $(cat {self.dir}/slurmctld.pid)")
        wait_for(lambda: not (self.dir / "slurmctld.pid").exists(), 20, "slurmctld to end")

    def start_controller(self) -> None:
        self.run("slurmctld")

    def freeze_controller(self) -> None:
        """It takes calls and does not answer, as when it is busy."""
        self.run("sh", "-c", f"kill -STOP $(cat {self.dir}/slurmctld.pid)")

    def thaw_controller(self) -> None:
        self.run("sh", "-c", f"kill -CONT $(cat {self.dir}/slurmctld.pid)")

    def clean(self) -> None:
        """Between tests: no jobs, all nodes in service."""
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", job, check=False)
        for node in self.nodes:
            self.thaw(node)
            self.on(node)
        wait_for(lambda: not self.run("squeue", "-h"), 30, "the queue to be empty", pause=0.1)
        wait_for(self.is_up, 30, lambda: f"the nodes to come back\n{self.run('sinfo', '-N', '-l')}", pause=0.1)


def wait_for(
    condition: Callable[[], bool], seconds: float, what: str | Callable[[], str] = "it", pause: float = 0.1
) -> None:
    """Return when `condition()` holds; fail after `seconds`, saying what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what if isinstance(what, str) else what()}")
        time.sleep(pause)
