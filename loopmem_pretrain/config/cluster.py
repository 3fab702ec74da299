"""The numbers of a cluster that `loopmem estimate --cluster` computes step times from."""

from pydantic import Field

from loopmem_pretrain.config.base import Section


class ClusterConfig(Section):
    """A cluster of equal nodes. Units: TFLOP/s = 1e12 a second, GB = 1e9 bytes, us = 1e-6 seconds."""

    name: str = Field(min_length=1)
    """What the numbers describe, for the print-out."""
    gpus_per_node: int = Field(gt=0)
    """GPUs that the fast links connect; ranks are numbered along a node first."""
    gpu_memory_gb: float = Field(gt=0)
    """Memory of one GPU."""
    peak_tflops: float = Field(gt=0)
    """Dense matrix multiplication of one GPU in the run's precision."""
    achievable_fraction: float = Field(gt=0, le=1)
    """Share of peak_tflops that one rank's kernels reach while they run, waiting not counted."""
    memory_gb_per_s: float = Field(gt=0)
    """Bandwidth of a GPU's own memory; the optimizer step is bound by it."""
    intra_node_gb_per_s: float = Field(gt=0)
    """What one GPU sends to others of its node, one direction."""
    inter_node_gb_per_s: float = Field(gt=0)
    """What one GPU sends to other nodes, one direction."""
    bandwidth_fraction: float = Field(gt=0, le=1)
    """Share of both bandwidths that collectives reach."""
    intra_node_latency_us: float = Field(ge=0)
    """Start of one message within a node."""
    inter_node_latency_us: float = Field(ge=0)
    """Start of one message between nodes."""
