"""The float32 weights of a checkpoint, through DeepSpeed's universal form.

DeepSpeed's ZeRO files hold flat slices; its converter merges them into one file per parameter, for every stage and
number of ranks. The merged form is temporary: it is made beside nothing of value and removed after reading.
"""

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loopmem_pretrain.checkpoint.store import read_manifest, verify
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault


@contextlib.contextmanager
def universal_form(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal form, in a temporary folder; verified first, as DeepSpeed unpickles."""
    from deepspeed.checkpoint import ds_to_universal

    verify(checkpoint)
    parameters = sum(math.prod(shape) for shape in read_manifest(checkpoint)["parameter_shapes"].values())
    needed, free = 24 * parameters, shutil.disk_usage(tempfile.gettempdir()).free  # 24: slices and merged, 3 states
    if free < needed:
        raise EnvironmentFault(
            f"merging {checkpoint} takes {needed / 1e9:,.2f} GB of {tempfile.gettempdir()}, {free / 1e9:,.2f} are free",
            "free space there, or set TMPDIR to a folder with more",
        )
    with tempfile.TemporaryDirectory(prefix="loopmem-universal-") as folder:
        output = Path(folder) / "universal"
        arguments = SimpleNamespace(
            input_folder=str(checkpoint),
            output_folder=str(output),
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
        yield output


def fp32_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(public name, float32 tensor) of every parameter, one at a time, in the model's order."""
    manifest = read_manifest(checkpoint)
    names: dict[str, str] = manifest["parameter_names"]
    shapes: dict[str, list[int]] = manifest["parameter_shapes"]
    with universal_form(checkpoint) as folder:
        for positional, public in names.items():
            path = folder / "zero" / positional / "fp32.pt"
            if not path.is_file():
                raise CheckpointError(
                    f"parameter {public} ({positional}) is missing in {checkpoint}", "use another checkpoint"
                )
            stored: Any = torch.load(path, map_location="cpu", weights_only=True)
            tensor = stored["param"] if isinstance(stored, dict) else stored
            yield public, tensor.reshape(shapes[public]).float()
