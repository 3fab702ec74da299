"""A checkpoint as whole parameters, whatever ranks wrote it: for export, and to go on with other ranks.

DeepSpeed's ZeRO files hold flat slices of each rank's part; its converter merges them into three tensors a parameter,
float32: the weight and both moments of Adam. How tensor-parallel parts are put together is what
`training/pipeline.py:universal_checkpoint_info` wrote into the checkpoint. The merged form is

    STATE/PUBLIC.NAME.safetensors    for each STATE and parameter: one tensor, `value`

either temporary, or a checkpoint of its own (`reshape.py`), in its folder `merged/`. Before the first step there are no
moments (`first.py`).
"""

import contextlib
import io
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopmem_pretrain.checkpoint.manifest import MANIFEST, read_manifest
from loopmem_pretrain.checkpoint.safe_load import check_pickles, load, pickles, weights_only
from loopmem_pretrain.checkpoint.store import verify
from loopmem_pretrain.data.files import disk_faults
from loopmem_pretrain.errors import CheckpointError, EnvironmentFault

State = Literal["fp32", "exp_avg", "exp_avg_sq"]
STATES: tuple[State, ...] = ("fp32", "exp_avg", "exp_avg_sq")
MERGED = "merged"
"""Value of the manifest's `form`, and folder of the files, of a checkpoint in merged form."""


class Merged:
    """The merged form of a checkpoint in `folder`, read a parameter at a time."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        manifest = read_manifest(checkpoint)
        self.checkpoint, self.folder = checkpoint, folder
        self.names: list[str] = list(manifest["parameter_names"].values())
        """Public names, in the model's order."""
        self.shapes: dict[str, list[int]] = manifest["parameter_shapes"]

    def read(self, public_name: str, state: State) -> Tensor:
        """One whole parameter, or moment of it, mapped from the disk: only what is used of it is read.

        Raises:
            CheckpointError: the checkpoint has no such parameter, or not of the recorded shape.
        """
        if public_name not in self.shapes:
            raise CheckpointError(f"{self.checkpoint} has no parameter {public_name}", "use another checkpoint")
        path = _file(self.folder, public_name, state)
        if not path.is_file():
            raise CheckpointError(
                f"{state} of parameter {public_name} is missing in {self.checkpoint}", "use another checkpoint"
            )
        tensor, shape = load_file(path)["value"], self.shapes[public_name]
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{state} of parameter {public_name} has the shape {list(tensor.shape)}, not {shape}",
                "use another checkpoint, and report this one as a bug",
            )
        return tensor


def _file(folder: Path, public_name: str, state: State) -> Path:
    return folder / state / f"{public_name}.safetensors"


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write (public name, float32 tensor) as the weights of a merged form in `folder`, which must not exist.

    Raises:
        EnvironmentFault: disk full, no permission.
    """
    with disk_faults(folder):
        (folder / STATES[0]).mkdir(parents=True)
    for public_name, value in weights:
        path = _file(folder, public_name, STATES[0])
        try:
            save_file({"value": value.contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise EnvironmentFault(f"cannot write {path}: {error}", "free space or mend permissions there") from error


def read_weights(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """What `write_weights` wrote, mapped from the disk."""
    for public_name in names:
        yield public_name, load_file(_file(folder, public_name, STATES[0]))["value"]


def is_merged(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is kept in merged form, not in DeepSpeed's files."""
    return manifest.get("form") == MERGED


def merge(checkpoint: Path, folder: Path) -> Merged:
    """Write the merged form of `checkpoint` into `folder`, which must not exist. One process; a parameter at a time.

    The checkpoint must have been verified. Its files are mapped, not read as a whole: docs/operations.md has the
    memory and space this takes.

    Raises:
        EnvironmentFault: too little space where `folder` is.
        CheckpointError: DeepSpeed could not merge it, or a file holds more than weights.
    """
    manifest = read_manifest(checkpoint)
    names: dict[str, str] = manifest["parameter_names"]
    shapes: dict[str, list[int]] = manifest["parameter_shapes"]
    needed = 24 * sum(math.prod(shape) for shape in shapes.values())  # slices and merged, three float32 states
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise EnvironmentFault(
            f"merging {checkpoint} takes {needed / 1e9:,.2f} GB of {folder.parent}, {free / 1e9:,.2f} are free",
            "free space there, or (export only) set TMPDIR to a folder with more",
        )
    folder.mkdir()
    try:
        _merge_into(folder, checkpoint, names, shapes)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not (checkpoint / MANIFEST).exists():
            raise CheckpointError(
                f"{checkpoint} was removed while it was read: a training that goes on removes old ones",
                "try again with the newest one; raise checkpoint.keep_last or set checkpoint.keep_every_steps to keep "
                "them longer",
            ) from error
        raise EnvironmentFault(
            f"cannot merge {checkpoint} in {folder.parent}: {error}",
            "free space there, or (export only) set TMPDIR to a folder with more",
        ) from error
    return Merged(checkpoint, folder)


def _merge_into(folder: Path, checkpoint: Path, names: Mapping[str, str], shapes: Mapping[str, list[int]]) -> None:
    from deepspeed.checkpoint import ds_to_universal

    universal = folder / "universal"
    arguments = SimpleNamespace(
        input_folder=str(checkpoint),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    noise = io.StringIO()
    try:
        _check_names(checkpoint, names)
        with (
            weights_only(checkpoint),
            _mapped(),
            _tied_once(),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            ds_to_universal.main(arguments)
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"DeepSpeed could not merge the ZeRO slices of {checkpoint}: {error}",
            "if `loopmem` of the version that wrote it can read it, report this as a bug",
        ) from error
    for state in STATES:
        (folder / state).mkdir()
        for name, public_name in names.items():
            _rewrite(universal / "zero" / name / f"{state}.pt", _file(folder, public_name, state), shapes[public_name])
    shutil.rmtree(universal)
    (folder / "latest_universal").unlink()  # DeepSpeed's pointer to the folder just removed


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Inside, DeepSpeed maps files instead of reading them whole, and copies no rank's moments.

    It would do that to cut the padding off their end, which the slices it takes of them do not reach.
    """
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    original = DeepSpeedCheckpoint.get_zero_checkpoint_state
    DeepSpeedCheckpoint.get_zero_checkpoint_state = partialmethod(original, strip_tensor_paddings=False)
    try:
        with torch.utils.serialization.config.patch("load.mmap", True):  # type: ignore[attr-defined]
            yield
    finally:
        DeepSpeedCheckpoint.get_zero_checkpoint_state = original


@contextlib.contextmanager
def _tied_once() -> Iterator[None]:
    """Inside, DeepSpeed takes tied modules from the first stage alone, which has all of them.

    Other stages may cut them over other data-parallel ranks: the pieces of all stages would be put together.
    """
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    original = DeepSpeedCheckpoint.get_checkpoint_info

    def completed(self: Any, key: str) -> Any:
        found = original(self, key)
        if key == "universal_checkpoint_info":
            return found | {"pipeline_replicated_parameter_patterns": [r"tied_modules\."]}
        return found

    DeepSpeedCheckpoint.get_checkpoint_info = completed
    try:
        yield
    finally:
        DeepSpeedCheckpoint.get_checkpoint_info = original


def _check_names(checkpoint: Path, names: Mapping[str, str]) -> None:
    """See that every parameter name is one of the manifest's and fit to be a path: DeepSpeed makes a folder of each."""
    known = {name for pair in names.items() for name in pair if re.fullmatch(r"\w+(\.\w+)*", name)}
    met = {name for pair in names.items() for name in pair}
    for path in pickles(checkpoint):
        content: Any = load(path)
        optimizer = content.get("optimizer_state_dict") or {}
        tables = [*(content.get("param_shapes") or []), *optimizer.get("param_slice_mappings", [])]
        met |= {name for table in [*tables, content.get("module") or {}] for name in table}
    if met - known:
        raise CheckpointError(
            f"{checkpoint} names parameters that its manifest does not: {sorted(map(str, met - known))}",
            "use a checkpoint that `loopmem train` wrote, untouched",
        )


def _rewrite(source: Path, target: Path, shape: list[int]) -> None:
    """One tensor of DeepSpeed's merged form as ours; the source goes, so that the disk holds one copy."""
    if not source.is_file():
        return  # said by Merged.read, of the parameter that is asked for
    stored: Any = load(source)
    tensor = stored["param"] if isinstance(stored, dict) else stored
    whole = tensor.numel() == math.prod(shape)  # if not, Merged.read says what shape it has
    save_file({"value": (tensor.reshape(shape) if whole else tensor).float().contiguous()}, target)
    source.unlink()


class Weights(Mapping[str, Tensor]):
    """The float32 weights of a merged form by public name, in the model's order; each mapped when it is asked for."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged

    def __getitem__(self, public_name: str) -> Tensor:
        if public_name not in self.merged.shapes:
            raise KeyError(public_name)
        return self.merged.read(public_name, "fp32")

    def __iter__(self) -> Iterator[str]:
        return iter(self.merged.names)

    def __len__(self) -> int:
        return len(self.merged.names)


@contextlib.contextmanager
def mapped_weights(checkpoint: Path) -> Iterator[Weights]:
    """The weights of a checkpoint, mapped from the disk; inside the block only, where they had to be merged first."""
    verify(checkpoint)
    if is_merged(read_manifest(checkpoint)):
        yield Weights(Merged(checkpoint, checkpoint / MERGED))
        return
    check_pickles(pickles(checkpoint))
    with tempfile.TemporaryDirectory(prefix="loopmem-universal-") as folder:
        yield Weights(merge(checkpoint, Path(folder) / MERGED))


def fp32_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(public name, float32 tensor) of every parameter, one at a time, in the model's order."""
    with mapped_weights(checkpoint) as weights:
        for public_name, value in weights.items():
            yield public_name, value.clone()
