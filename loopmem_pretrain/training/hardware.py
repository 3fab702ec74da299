"""Device choice and peak arithmetic rates."""

import time

import torch

from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import EnvironmentFault

# Dense bf16 TFLOP/s from the makers' data sheets; the first name contained in the device's name counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
}


def choose_device(config: RunConfig, local_rank: int) -> torch.device:
    """The device of this rank.

    Raises:
        EnvironmentFault: a GPU was asked for and there is none for this rank.
    """
    wanted, available = config.training.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if local_rank >= available:
        raise EnvironmentFault(
            f"training.device is '{wanted}' and this is local rank {local_rank}, but {available} GPUs are visible",
            "start at most one rank per visible GPU (see CUDA_VISIBLE_DEVICES and nvidia-smi), "
            "or set training.device=cpu",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def peak_flops(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """(FLOP/s of one device, where the number is from). On CPU a float32 matmul is timed: 0.3 s, once a start."""
    if config.logging.peak_tflops:
        return config.logging.peak_tflops * 1e12, "logging.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12, f"data sheet of {key}, dense bf16"
        raise EnvironmentFault(
            f"no peak rate is known for the GPU '{name}', so MFU cannot be computed",
            "set logging.peak_tflops to its dense bf16 TFLOP/s",
        )
    return _measured_matmul_flops(), "measured float32 matmul on this rank"


def _measured_matmul_flops() -> float:
    size = 768
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
