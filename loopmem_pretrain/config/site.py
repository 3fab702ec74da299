"""What a SLURM cluster is like, as far as a job script must know it: slurm/clusters/*.yaml."""

from typing import Literal

from pydantic import Field

from loopmem_pretrain.config.base import Section

TIME = r"^(\d+-)?\d+(:\d+){0,2}$"


class VariableConfig(Section):
    """An environment variable of every rank."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Such as NCCL_IB_HCA."""
    value: str
    """As the program shall see it."""
    reason: str = Field(min_length=1)
    """Why it is set here; becomes a comment of the job script."""


class ContainerConfig(Section):
    """What the ranks run in. The batch script stays outside, where SLURM's commands are."""

    kind: Literal["apptainer", "pyxis"]
    """`apptainer exec` in each task, or enroot through pyxis's options of srun."""
    image: str = Field(min_length=1)
    """File, or for pyxis also a reference to a registry."""
    mounts: tuple[str, ...] = ()
    """Folders that must be seen inside; the run folder is added."""
    python: str = Field(default="python3", min_length=1)
    """Interpreter inside the image that has the package's dependencies."""


class OtherJobsConfig(Section):
    """Jobs beside the training, one task each: preparation of data, conversion, evaluation."""

    partition: str | None = None
    """Of preparation and conversion, which need no GPU; qos, constraint and sbatch are then left out of them. Unset
    takes the cluster's."""
    memory: str = "64G"
    """Of one job."""
    time: str | None = Field(default=None, pattern=TIME)
    """Longest time of one; unset takes the cluster's."""


class SiteConfig(Section):
    """A cluster, or one partition of it."""

    name: str = Field(min_length=1)
    """For people."""
    partition: str | None = None
    """Of the jobs; unset takes the cluster's default."""
    account: str | None = None
    """Whom the time is charged to."""
    qos: str | None = None
    """Quality of service, where the cluster has several."""
    constraint: str | None = None
    """Features that nodes must have."""
    gpus_per_node: int = Field(ge=0)
    """Also the ranks of a node; 0 is a cluster without GPUs."""
    ranks_per_node: int | None = Field(default=None, gt=0)
    """Without GPUs: ranks a node."""
    gpu_request: Literal["gpus-per-node", "gpus-per-task", "gres"] = "gpus-per-node"
    """How GPUs are asked for. Whichever it is, a rank sees all GPUs of its node, as NCCL needs it for NVLink."""
    gpu_memory_gb: float = Field(default=80.0, gt=0)
    """Of one GPU, 1e9 bytes: whether a plan fits is judged by it."""
    cpus_per_node: int = Field(gt=0)
    """Cores that a job may use, divided among the ranks."""
    memory: str = "0"
    """Memory of a node for the job; 0 asks for all."""
    time: str = Field(default="24:00:00", pattern=TIME)
    """Longest time of a job, as sbatch writes it."""
    warning_seconds: int = Field(default=600, ge=60)
    """Before its end a job is warned; a run that has saved before is warned by what its saves took."""
    other_jobs: OtherJobsConfig = OtherJobsConfig()
    """What is different for jobs that do not train."""
    max_nodes: int | None = Field(default=None, gt=0)
    """Most nodes of a job."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as `--exclusive`, which is of the training alone."""
    modules: tuple[str, ...] = ()
    """Loaded in the batch script."""
    environment: tuple[VariableConfig, ...] = ()
    """Of the ranks."""
    container: ContainerConfig | None = None
    """Unset runs on the node as it is."""
    python: str | None = None
    """Interpreter of the batch script, 3.11 or newer; unset takes the one that submits."""
    shared_folders: tuple[str, ...] = ()
    """Run folders must lie below one of these; unset goes by the kind of the filesystem."""
    hardware: str | None = None
    """File of numbers for step times, such as configs/cluster/h100.yaml, relative to the working directory."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or self.ranks_per_node or 1
