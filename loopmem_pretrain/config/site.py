"""What a SLURM cluster is like, as far as a job script must know it: slurm/clusters/*.yaml."""

from typing import Literal

from pydantic import Field

from loopmem_pretrain.config.base import Section

TIME = r"^(\d+-)?\d+(:\d+){0,2}$"


class VariableConfig(Section):
    """An environment variable of every rank."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the variable, such as NCCL_IB_HCA."""
    value: str
    """Its value, exactly as the program will see it."""
    reason: str = Field(min_length=1)
    """Why it is set here; becomes a comment in the job script."""


class ContainerConfig(Section):
    """What the ranks run in. The batch script stays outside, where SLURM's commands are."""

    kind: Literal["apptainer", "pyxis"]
    """`apptainer exec` in each task, or enroot through the options that pyxis adds to srun."""
    image: str = Field(min_length=1)
    """Image file, or for pyxis also a reference to a registry."""
    mounts: tuple[str, ...] = ()
    """Folders that must be visible inside; the run folder is added."""
    python: str = Field(default="python3", min_length=1)
    """Interpreter inside the image, with the package's dependencies installed."""


class OtherJobsConfig(Section):
    """Jobs other than training, one task each: data preparation, conversion, evaluation."""

    partition: str | None = None
    """Partition for preparation and conversion, which need no GPU; with it, their jobs leave out qos, constraint and
    sbatch. Unset takes the cluster's."""
    memory: str = "64G"
    """Memory of one job."""
    time: str | None = Field(default=None, pattern=TIME)
    """Time limit of one job; unset takes the cluster's."""


class SiteConfig(Section):
    """A cluster, or one partition of it."""

    name: str = Field(min_length=1)
    """Name for people to read."""
    partition: str | None = None
    """Partition of the jobs; unset takes the cluster's default."""
    account: str | None = None
    """Account that the time is charged to."""
    qos: str | None = None
    """Quality of service, where the cluster has several."""
    constraint: str | None = None
    """Features that nodes must have."""
    gpus_per_node: int = Field(ge=0)
    """GPUs, and so ranks, on a node; 0 is a cluster without GPUs."""
    ranks_per_node: int | None = Field(default=None, gt=0)
    """Ranks on a node of a cluster without GPUs."""
    gpu_request: Literal["gpus-per-node", "gpus-per-task", "gres"] = "gpus-per-node"
    """How GPUs are requested. In each case a rank sees all GPUs of its node, which NCCL needs for NVLink."""
    gpu_memory_gb: float = Field(default=80.0, gt=0)
    """Memory of one GPU in units of 1e9 bytes; decides whether a plan fits."""
    cpus_per_node: int = Field(gt=0)
    """Cores of a node that a job may use, divided among its ranks."""
    memory: str = "0"
    """Memory requested on each node; 0 requests all of it."""
    time: str = Field(default="24:00:00", pattern=TIME)
    """Time limit of a job, in sbatch's format."""
    warning_seconds: int = Field(default=600, ge=60)
    """How long before its end a job is warned; once a run has saved, `submit` derives this from how long its saves
    took."""
    other_jobs: OtherJobsConfig = OtherJobsConfig()
    """What is different for jobs that do not train."""
    max_nodes: int | None = Field(default=None, gt=0)
    """Largest number of nodes in a job."""
    sbatch: tuple[str, ...] = ()
    """More options for sbatch, such as `--exclusive`, which applies to training jobs only."""
    modules: tuple[str, ...] = ()
    """Environment modules that the batch script loads."""
    environment: tuple[VariableConfig, ...] = ()
    """Environment variables of the ranks."""
    container: ContainerConfig | None = None
    """Container that the ranks run in; unset runs them on the node directly."""
    python: str | None = None
    """Interpreter for the batch script, 3.11 or newer; unset takes the one that submits."""
    shared_folders: tuple[str, ...] = ()
    """Run folders must lie below one of these; unset decides by the type of the filesystem."""
    hardware: str | None = None
    """Hardware numbers for estimated step times: a file such as configs/cluster/h100.yaml, relative to the working
    directory."""

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or self.ranks_per_node or 1
