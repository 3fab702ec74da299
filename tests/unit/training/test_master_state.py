"""What is written into DeepSpeed's optimizers where a start differs from the one that saved."""

from types import SimpleNamespace

import pytest
import torch

from loopmem_pretrain.training.master_state import place_step_counts


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_counts_of_steps_lie_where_the_kernel_reads_them(fused, stage):
    """A fused kernel reads them on the device; `meta` stands for one here. ZeRO 3 empties groups between steps."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    inner = torch.optim.AdamW([parameter], lr=1e-3)
    inner.param_groups[0]["fused"] = fused
    inner.state[parameter] = {"step": torch.tensor(5.0)}
    if stage == 3:
        inner.param_groups[0]["params"] = []
    place_step_counts(SimpleNamespace(optimizer=inner))
    assert inner.state[parameter]["step"].device.type == ("meta" if fused else "cpu")
