"""Which rank does what: one object, made once, handed to whoever needs a rank, a size or a group.

Ranks are numbered with the tensor-parallel rank fastest, then data-parallel, then pipeline stage: ranks that talk most
are neighbours, so that tensor parallelism stays within a node. It is megatron-core's default order and the one of
DeepSpeed's PipeModelDataParallelTopology; `join` asserts that megatron's groups are these.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from loopmem_pretrain.config.parallel import ParallelConfig
from loopmem_pretrain.words import counted


@dataclass(frozen=True)
class Topology:
    """Sizes, this rank's coordinates and the groups it is in; also the `mpu` of DeepSpeed's plain engine."""

    tensor_size: int
    data_size: int
    pipeline_size: int
    rank: int
    groups: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Axis ("tensor", "data", "pipeline", "model" = tensor x pipeline) -> the process group of this rank."""

    @classmethod
    def join(cls, parallel: ParallelConfig) -> "Topology":
        """Make the groups of this run; a collective of all ranks, the world's group being joined already.

        Raises:
            ValueError: the world does not factor; `config/preflight.py` finds that earlier and says what would.
        """
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % (tensor * pipeline):
            raise ValueError(f"{world} ranks do not factor into {tensor} x {pipeline} x data-parallel ranks")
        topology = cls(tensor, world // (tensor * pipeline), pipeline, rank)
        for axis in ("tensor", "data", "pipeline", "model"):
            for ranks in topology.rank_lists(axis):
                group = dist.new_group(ranks)
                if rank in ranks:
                    topology.groups[axis] = group
        if tensor > 1:
            _tell_megatron(topology, parallel.collective_timeout_seconds)
        return topology

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.data_size * self.pipeline_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    def rank_lists(self, axis: str) -> list[list[int]]:
        """The ranks of every group along `axis`, in the order of the groups."""
        fixed = {"tensor": ("data", "pipeline"), "data": ("tensor", "pipeline"), "pipeline": ("tensor", "data")}
        members: dict[Any, list[int]] = {}
        for rank in range(self.world_size):
            place = {
                "tensor": rank % self.tensor_size,
                "data": rank // self.tensor_size % self.data_size,
                "pipeline": rank // (self.tensor_size * self.data_size),
            }
            members.setdefault(tuple(place[other] for other in fixed.get(axis, ("data",))), []).append(rank)
        return list(members.values())

    def describe(self, rank: str = "rank") -> str:
        """For the log: "8 GPUs = TP 2 x PP 2 x DP 2", where a rank is called a GPU."""
        parts = f"TP {self.tensor_size} x PP {self.pipeline_size} x DP {self.data_size}"
        return f"{counted(self.world_size, rank)} = {parts}"

    # What DeepSpeed asks its `mpu`; in the plain engine model parallelism is tensor parallelism.

    def get_data_parallel_group(self) -> Any:
        return self.groups["data"]

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(ranks for ranks in self.rank_lists("data") if self.rank in ranks)

    def get_model_parallel_group(self) -> Any:
        return self.groups["model"]

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank + self.tensor_size * self.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size * self.pipeline_size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.groups["tensor"]

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.pipeline_size


def _tell_megatron(topology: Topology, timeout_seconds: float) -> None:
    """Initialise megatron-core's global state, which its vocabulary-parallel cross-entropy looks up.

    Its groups have a limit of their own, half an hour where none is given: a rank that hangs would hold the others.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        topology.tensor_size,
        topology.pipeline_size,
        distributed_timeout_minutes=timeout_seconds / 60,
        create_gloo_process_groups=False,
    )
    ours = dist.get_process_group_ranks(topology.groups["tensor"])
    theirs = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    if ours != theirs or parallel_state.get_data_parallel_world_size() != topology.data_size:
        raise AssertionError(f"tensor-parallel ranks {ours} here, {theirs} in megatron-core")
