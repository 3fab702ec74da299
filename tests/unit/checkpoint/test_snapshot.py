"""States copied to host memory: equal, apart from what they were copied from, in buffers that are used again."""

import io
from collections import OrderedDict
from dataclasses import dataclass

import torch

from loopmem_pretrain.checkpoint.snapshot import HostBuffers, compact


@dataclass
class Scaler:
    scale: float


def state():
    weights = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(2, dtype=torch.int64))
    weights._metadata = {"": {"version": 1}}
    shared = torch.ones(3, dtype=torch.bfloat16)
    return {"module": weights, "groups": [shared, (shared, None)], "scaler": Scaler(1.0), "step": 7, 3: "text"}


def test_a_copy_is_equal_and_apart():
    original = state()
    copied = HostBuffers(pin_memory=False).copy("file", original)
    original["module"]["a"].zero_()
    original["groups"][0].zero_()
    original["groups"].append(1)
    original["scaler"].scale = 2.0
    expected = state()
    assert torch.equal(copied["module"]["a"], expected["module"]["a"]) and copied["module"]["b"] == 2
    assert type(copied["module"]) is OrderedDict and copied["module"]._metadata == {"": {"version": 1}}
    assert copied["groups"][0] is copied["groups"][1][0] and torch.equal(copied["groups"][0], expected["groups"][0])
    assert len(copied["groups"]) == 2 and copied["scaler"] == Scaler(1.0)
    assert copied["step"] == 7 and copied[3] == "text"


def test_buffers_are_used_again():
    buffers = HostBuffers(pin_memory=False)
    first, second = (buffers.copy("file", state()) for _ in range(2))
    assert first["module"]["a"].data_ptr() == second["module"]["a"].data_ptr()
    other = buffers.copy("other file", state())
    assert other["module"]["a"].data_ptr() != first["module"]["a"].data_ptr()
    grown = buffers.copy("file", {"x": torch.zeros(9)})
    assert grown["x"].shape == (9,)


def test_a_part_is_not_written_with_its_whole():
    whole = torch.zeros(1000)
    with io.BytesIO() as written:
        torch.save(compact({"part": whole[:10], "whole": whole[:10].clone()}), written)
        assert len(written.getvalue()) < 2500
    kept = torch.zeros(5)
    assert compact([kept])[0].data_ptr() == kept.data_ptr()  # nothing is copied that need not be


def test_enumerations_are_written_as_their_numbers():
    """Python 3.11.2 would pickle them as a call of getattr."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    state = compact({"optimizer_state_dict": {"zero_stage": ZeroStageEnum.weights, "paddings": [True, 1]}})
    assert type(state["optimizer_state_dict"]["zero_stage"]) is int
    assert state == {"optimizer_state_dict": {"zero_stage": 3, "paddings": [True, 1]}}
