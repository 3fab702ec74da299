"""`manifest.json` of a checkpoint: what it is and which files belong to it, read as if a stranger had written it.

Names in it become paths, numbers become positions and shapes, so all of them are checked before anybody uses one. Its
own key `sha256` is the hash of everything else in it, so a flipped bit shows here as it does in the files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from loopmem_pretrain.errors import CheckpointError

MANIFEST: Final = "manifest.json"
FORMAT, VERSION = "loopmem-checkpoint", 1
MOST_BYTES = 64 * 2**20  # some 200 bytes a file and a parameter: room for a hundred thousand of each
_FIX = "restore the file, or use another checkpoint; `loopmem checkpoint list RUN` shows which are whole"

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Both become paths: no way up, no absolute path, no backslash, no hidden file.
_PART = "[A-Za-z0-9_][A-Za-z0-9_.=-]*"
FileName = Annotated[str, StringConstraints(pattern=f"^{_PART}(/{_PART})*$", max_length=1024)]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=1024)]


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written. A resume goes on with an older one; everything else ends."""


class _Part(BaseModel):
    """Exact types, nothing converted; keys of later versions of this package may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Part):
    bytes: Count
    sha256: Sha256


class _Position(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")  # one that is not known cannot be resumed from

    step: Count
    samples: Count
    tokens: Count
    skipped_ranges: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []


class _Losses(_Part):
    window: list[Finite]
    high: list[Finite]
    first_high: Count


class _Statistics(_Part):
    bad_in_a_row: Count
    losses: _Losses


class _Dataset(_Part):
    path: str
    manifest_sha256: Sha256
    tokens: Count
    samples: Count
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Data(_Part):
    order: str
    seed: Count
    seq_length: Size
    datasets: Annotated[list[_Dataset], Field(min_length=1)]


class _Origin(_Part):
    folder: str
    model_type: str


class _Manifest(_Part):
    step: Count
    position: _Position
    world_size: Size
    zero_stage: Literal[1, 2, 3]
    data: _Data
    tokenizer_sha256: Sha256
    parameter_names: dict[ParameterName, ParameterName]
    parameter_shapes: dict[ParameterName, list[Size]]
    files: Annotated[dict[FileName, _File], Field(min_length=1)]
    # Not in every checkpoint.
    skipped_steps: Count = 0
    tensor_model_parallel_size: Size = 1
    pipeline_model_parallel_size: Size = 1
    memory_placement: str = "replicated"
    stage_bounds: list[Count] = []
    validation_loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seconds: dict[str, Seconds] = {}
    versions: dict[str, str] = {}
    statistics: _Statistics | None = None
    wandb_id: str | None = None
    run_id: str | None = None
    form: Literal["merged"] | None = None
    origin: _Origin | None = None
    saved: str = ""
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "_Manifest":
        if self.position.step != self.step:
            raise ValueError(f"step is {self.step}, position.step is {self.position.step}")
        unknown = sorted(set(self.parameter_names.values()) - set(self.parameter_shapes))
        if unknown:
            raise ValueError(f"parameter_shapes has no {unknown[0]}")
        if MANIFEST in self.files:
            raise ValueError(f"{MANIFEST} lists itself")
        return self


def encode_manifest(values: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest that `read_manifest` reads as these values and their hash."""
    content = {"format": FORMAT, "version": VERSION, **values}
    return (json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint, every value of a known key checked.

    Raises:
        DamagedCheckpoint: missing, not what was written, or no manifest at all; with file, key and value.
        CheckpointError: not allowed to read it, or written by a later version of the format.
    """
    path = checkpoint / MANIFEST
    manifest = _parse(path, _read(path))
    version = manifest.get("version")
    if type(version) is int and version > VERSION and "sha256" in manifest:  # its hash holds: no damage
        raise CheckpointError(
            f"{path}: version {version} of the format, this package reads version {VERSION}",
            "use the version of the package that wrote it",
        )
    if type(version) is not int or version != VERSION:
        raise DamagedCheckpoint(f"{path}: version: {version!r:.60} is not {VERSION}", _FIX)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()[:10]]
        raise DamagedCheckpoint(f"{path} is damaged:\n    " + "\n    ".join(lines), _FIX) from None
    return manifest


def _read(path: Path) -> bytes:
    try:
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing" if not path.exists() else f"{path} is no plain file", _FIX)
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "give permission to read it") from None
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error.strerror}", _FIX) from None
    if len(content) > MOST_BYTES:
        raise DamagedCheckpoint(f"{path} is larger than {MOST_BYTES:,} bytes: no manifest", _FIX)
    return content


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    """The content, whose hash holds; not checked further."""
    try:
        manifest = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        intact = not isinstance(manifest, dict) or manifest.get("sha256") in (None, _digest(manifest))
    except RecursionError:
        raise DamagedCheckpoint(f"{path} is nested too deeply: no manifest", _FIX) from None
    except ValueError as error:  # JSON, UTF-8, thousands of digits, a key twice
        raise DamagedCheckpoint(f"{path} is not valid JSON: {error}", _FIX) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path} is no manifest of this format (expected {FORMAT} version {VERSION})", _FIX)
    if not intact or not content.endswith(b"\n"):
        raise DamagedCheckpoint(f"{path}: content differs from its recorded hash", _FIX)
    return manifest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash of all keys but `sha256`, however they are laid out: JSON with sorted keys and no spaces."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe(detail: Any) -> str:
    key = ascii(".".join(str(part) for part in detail["loc"]))[1:-1]
    got = "" if isinstance(detail["input"], dict | list) else f" (got {detail['input']!a:.80})"
    return f"{key:.200}: {detail['msg']:.200}{got}".removeprefix(": ")
