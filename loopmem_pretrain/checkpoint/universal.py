"""A checkpoint as whole parameters, whatever ranks wrote it: for export, and to go on with other ranks.

DeepSpeed's ZeRO files hold flat slices of each rank's part; its converter merges them into three files a parameter,
float32: the weight and both moments of Adam. How tensor-parallel parts are put together is what
`training/pipeline.py:universal_checkpoint_info` wrote into the checkpoint. The merged form is temporary.
"""

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from loopmem_pretrain.checkpoint.manifest import read_manifest
from loopmem_pretrain.checkpoint.store import verify
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault

State = Literal["fp32", "exp_avg", "exp_avg_sq"]
STATES: tuple[State, ...] = ("fp32", "exp_avg", "exp_avg_sq")


class Merged:
    """The merged form of a checkpoint in `folder`, read a parameter at a time."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        manifest = read_manifest(checkpoint)
        self.checkpoint, self.folder = checkpoint, folder
        self.names: dict[str, str] = {public: name for name, public in manifest["parameter_names"].items()}
        self.shapes: dict[str, list[int]] = manifest["parameter_shapes"]

    def read(self, public_name: str, state: State) -> Tensor:
        """One whole parameter, or moment of it, mapped from the disk: only what is used of it is read.

        Raises:
            CheckpointError: the checkpoint has no such parameter, or not of the recorded shape.
        """
        if public_name not in self.names:
            raise CheckpointError(f"{self.checkpoint} has no parameter {public_name}", "use another checkpoint")
        path = self.folder / "zero" / self.names[public_name] / f"{state}.pt"
        if not path.is_file():
            raise CheckpointError(
                f"{state} of parameter {public_name} ({path.parent.name}) is missing in {self.checkpoint}",
                "use another checkpoint",
            )
        stored: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensor, shape = stored["param"] if isinstance(stored, dict) else stored, self.shapes[public_name]
        if tensor.numel() != math.prod(shape):
            raise CheckpointError(
                f"{state} of parameter {public_name} has {tensor.numel()} numbers, its shape {shape} wants "
                f"{math.prod(shape)}",
                "use another checkpoint, and report this one as a bug",
            )
        return tensor.reshape(shape).float()


def merge(checkpoint: Path, folder: Path) -> Merged:
    """Write the merged form of `checkpoint` into `folder`, which must not exist. One process; a parameter at a time.

    The checkpoint must have been verified: DeepSpeed unpickles its files.

    Raises:
        EnvironmentFault: too little space where `folder` is.
        CheckpointError: DeepSpeed could not merge it.
    """
    from deepspeed.checkpoint import ds_to_universal

    parameters = sum(math.prod(shape) for shape in read_manifest(checkpoint)["parameter_shapes"].values())
    needed, free = 24 * parameters, shutil.disk_usage(folder.parent).free  # slices and merged, three float32 states
    if free < needed:
        raise EnvironmentFault(
            f"merging {checkpoint} takes {needed / 1e9:,.2f} GB of {folder.parent}, {free / 1e9:,.2f} are free",
            "free space there, or (export only) set TMPDIR to a folder with more",
        )
    arguments = SimpleNamespace(
        input_folder=str(checkpoint),
        output_folder=str(folder),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            ds_to_universal.main(arguments)
    except Exception as error:
        raise CheckpointError(
            f"DeepSpeed could not merge the ZeRO slices of {checkpoint}: {error}",
            "if `loopmem` of the version that wrote it can read it, report this as a bug",
        ) from error
    return Merged(checkpoint, folder)


def fp32_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(public name, float32 tensor) of every parameter, one at a time, in the model's order."""
    verify(checkpoint)
    with tempfile.TemporaryDirectory(prefix="loopmem-universal-") as folder:
        merged = merge(checkpoint, Path(folder) / "merged")
        for public_name in merged.names:
            yield public_name, merged.read(public_name, "fp32").clone()
