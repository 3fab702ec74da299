"""Which device a rank takes, and what its peak is."""

import pytest
import torch

from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.training.hardware import choose_device, gpus_given, peak_flops
from tests.configs import tiny_run

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@no_gpu
@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_VISIBLE_DEVICES", "0,1"), ("SLURM_GPUS_ON_NODE", "8")], ids=["visible", "slurm"]
)
def test_gpus_that_torch_does_not_see_are_told(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentFault) as caught:
        choose_device(tiny_run(training={"device": "auto"}), 0)
    assert caught.value.problem.startswith(f"{variable}={value} says that this process has GPUs, and torch")
    assert "training.device=cpu" in caught.value.fix
    assert choose_device(tiny_run(training={"device": "cpu"}), 0).type == "cpu"


@no_gpu
@pytest.mark.parametrize("value", [None, "", "-1", "NoDevFiles"])
def test_auto_without_gpus(monkeypatch, value):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpus_given({"SLURM_GPUS_ON_NODE": "0"}) == ""
    assert choose_device(tiny_run(training={"device": "auto"}), 3).type == "cpu"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peak_of_a_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(tiny_run(logging={"peak_tflops": None}), torch.device("cuda", 0))[0] == tflops * 1e12
