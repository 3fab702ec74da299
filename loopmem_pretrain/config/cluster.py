"""The numbers of a cluster that `loopmem estimate --cluster` computes step times from."""

from pydantic import Field

from loopmem_pretrain.config.base import Section


class ClusterConfig(Section):
    """A cluster of equal nodes. Units: TFLOP/s = 1e12 a second, GB = 1e9 bytes, us = 1e-6 seconds."""

    name: str = Field(min_length=1)
    """Name of the hardware, for the output."""
    gpus_per_node: int = Field(gt=0)
    """GPUs connected by the fast links; ranks are numbered within a node first."""
    gpu_memory_gb: float = Field(gt=0)
    """Memory of one GPU."""
    peak_tflops: float = Field(gt=0)
    """Peak rate of one GPU for dense matrix multiplication in the run's precision."""
    achievable_fraction: float = Field(gt=0, le=1)
    """Share of peak_tflops that one rank's kernels reach while they run, waiting not counted."""
    memory_gb_per_s: float = Field(gt=0)
    """Bandwidth of a GPU's own memory; the optimizer step is bound by it."""
    intra_node_gb_per_s: float = Field(gt=0)
    """Bandwidth from one GPU to others in its node, one direction."""
    inter_node_gb_per_s: float = Field(gt=0)
    """Bandwidth from one GPU to other nodes, one direction."""
    bandwidth_fraction: float = Field(gt=0, le=1)
    """Share of both bandwidths that collectives reach."""
    intra_node_latency_us: float = Field(ge=0)
    """Latency of one message within a node."""
    inter_node_latency_us: float = Field(ge=0)
    """Latency of one message between nodes."""
