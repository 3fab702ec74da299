"""No file of a checkpoint runs code, however DeepSpeed asks for it to be read."""

import os
import pickle

import pytest
import torch

from loopmem_pretrain.checkpoint.safe_load import allowed_classes, check_pickles, weights_only
from loopmem_pretrain.errors import CheckpointError


class Payload:
    """Unpickled by calling os.system: leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


class Foreign:
    pass


def zipped(path, content):
    torch.save(content, path)


def unzipped(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(path, content):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [zipped, unzipped, bare])
def test_a_payload_does_not_run(tmp_path, write):
    path, mark = tmp_path / "file.pt", tmp_path / "mark"
    write(path, {"weight": torch.zeros(2), "x": Payload(mark)})
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        check_pickles([path])
    with pytest.raises(CheckpointError), weights_only(path):
        torch.load(path, weights_only=False)
    assert not mark.exists()
    torch.load(path, weights_only=False) if write is not bare else pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have run


class Named:
    """Pickled as Python 3.11.2 does a member of an enumeration: by getattr."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_an_enumeration_by_name_is_read_and_no_other_attribute(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "file.pt"
    zipped(path, {"zero_stage": Named(ZeroStageEnum, "weights")})
    check_pickles([path])
    with weights_only(path):
        assert torch.load(path, weights_only=False) == {"zero_stage": ZeroStageEnum.weights}
    for of, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (torch.Tensor, "weights")):
        zipped(path, {"x": Named(of, name)})
        with pytest.raises(CheckpointError), weights_only(path):
            torch.load(path, weights_only=False)


def test_a_class_is_named(tmp_path):
    torch.save({"x": Foreign()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt names tests\.unit\.checkpoint\.test_safe_load\.Foreign"):
        check_pickles([tmp_path / "file.pt"])


def test_code_of_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="torchscript"):
        check_pickles([tmp_path / "file.pt"])


@pytest.mark.parametrize(
    "before", [{}, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}]
)
def test_the_environment_cannot_switch_it_off_and_comes_back(tmp_path, monkeypatch, before):
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    path, mark, kept = tmp_path / "file.pt", tmp_path / "mark", dict(os.environ)
    torch.save(Payload(mark), path)
    with pytest.raises(CheckpointError), weights_only(path):
        torch.load(path)
    assert not mark.exists()
    assert dict(os.environ) == kept


def test_allowed_classes_do_not_decide_how_they_are_unpickled():
    for each in allowed_classes():
        own = {name for kind in each.__mro__[:-1] for name in vars(kind) if not kind.__module__.startswith("enum")}
        assert not own & {"__setstate__", "__reduce__", "__reduce_ex__", "__setattr__"}, each
