"""Device choice and peak arithmetic rates."""

import os
import re
import time
from collections.abc import Mapping

import torch

from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.errors import EnvironmentFault

# Dense bf16 TFLOP/s from the makers' data sheets; the first name that is a word of the device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
}

_GPUS_GIVEN = {
    "CUDA_VISIBLE_DEVICES": ("", "-1", "NoDevFiles", "none", "void"),
    "SLURM_GPUS_ON_NODE": ("", "0"),
}
"""Variables that tell a process of its GPUs, and their values where it has none."""


def refuse_missing_gpus(config: RunConfig, ranks: int) -> None:
    """
    Raises:
        EnvironmentFault: GPUs are asked for by name, and this machine does not have one for each rank.
    """
    available = torch.cuda.device_count()
    if config.training.device == "cuda" and available < ranks:
        raise EnvironmentFault(
            f"training.device is 'cuda' and {ranks} ranks are to start here, but {available} GPUs are visible",
            "start at most one rank per visible GPU (see CUDA_VISIBLE_DEVICES and nvidia-smi), "
            "or set training.device=cpu",
        )


def choose_device(config: RunConfig, local_rank: int) -> torch.device:
    """The device of this rank.

    Raises:
        EnvironmentFault: a GPU was asked for, or given to this process, and torch sees none for this rank.
    """
    wanted, available = config.training.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = gpus_given(os.environ)
    if wanted == "auto" and given and not available:
        raise EnvironmentFault(
            f"{given} says that this process has GPUs, and torch {torch.__version__} sees none",
            "see nvidia-smi here (a container needs --nv or its like), and that this torch was built for CUDA and the "
            "driver is new enough for it; or set training.device=cpu to train without them",
        )
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


def gpus_given(environment: Mapping[str, str]) -> str:
    """What says that this process was given GPUs, as NAME=VALUE; empty where nothing does."""
    for name, words_for_none in _GPUS_GIVEN.items():
        if environment.get(name, "") not in words_for_none:
            return f"{name}={environment[name]}"
    return ""


def peak_flops(config: RunConfig, device: torch.device) -> tuple[float, str]:
    """(FLOP/s of one device, where the number is from): the config, a data sheet, or a matmul timed here."""
    if config.logging.peak_tflops:
        return config.logging.peak_tflops * 1e12, "logging.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{key}\b", name):
                return tflops * 1e12, f"data sheet of {key}, dense bf16"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _measured_matmul_flops(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matmul on this rank"


def _measured_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of many products of two square matrices: 0.3 s, once a start."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
