"""`loopmem checkpoint list | show | verify`: what is in a run's checkpoints and whether it is what was written.

Reads manifests and hashes bytes; nothing is unpickled, no torch.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loopmem_pretrain.checkpoint.manifest import DamagedCheckpoint, read_manifest
from loopmem_pretrain.checkpoint.store import CheckpointStore, checkpoint_at, damage, list_files, step_of
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.files import require_folder
from loopmem_pretrain.errors import CheckpointError
from loopmem_pretrain.progress import ProgressBar
from loopmem_pretrain.tools.tables import human, human_bytes, human_seconds, table

HEADINGS = ["step", "saved", "size", "ranks", "TP", "PP", "ZeRO", "validation loss", "state", "kept as"]


def list_checkpoints(run_dir: str | Path, hashes: bool = False) -> str:
    """A table of a run's checkpoints, and what else lies beside them; `hashes` reads every file.

    Raises:
        CheckpointError: the run folder has no checkpoints.
        ConfigError: no such folder; or RUN/config.yaml, which says what is kept, is there and cannot be read.
    """
    store = _store_of(run_dir)
    recorded = store.folder.parent / "config.yaml"
    reasons = store.kept(load_config(RunConfig, recorded).checkpoint) if recorded.exists() else {}
    candidates = store.candidates()
    newest = candidates.paths[0] if candidates.paths and not candidates.doubt else None
    wrong = _check([store.folder / store.name(step) for step in store.steps()], hashes)
    rows = [HEADINGS]
    for path, problems in wrong.items():
        step = step_of(path.name) or 0
        state = "damaged" if problems else "whole" if hashes else "sizes fit"
        kept = ", ".join(reason for reason in reasons.get(step, []) if reason != "damaged") or "-"
        named = " <- latest" if path == newest else ""
        rows.append([f"{step:,}", *_columns(path), state, kept + named])
    lines = table(rows) if len(rows) > 1 else ["  no whole checkpoint"]
    for path, problems in wrong.items():
        lines += [f"{path.name} is damaged:", *(f"    {problem}" for problem in problems)] if problems else []
    if candidates.doubt:
        lines.append(f"{candidates.doubt}: the newest whole one would be resumed")
    known = {path.name for path in wrong} | {"latest"}
    for path in sorted(store.folder.iterdir()):
        if path.name not in known and path.is_dir():
            lines.append(f"beside them: {path.name} ({human_bytes(_size(path))})")
    return "\n".join(lines)


def show_checkpoint(path: str | Path) -> str:
    """What one checkpoint's manifest says, for a reader.

    Raises:
        ConfigError: no such folder.
        CheckpointError: there is none, or its manifest is damaged.
    """
    checkpoint = checkpoint_at(path)
    manifest = read_manifest(checkpoint)
    position, data = manifest["position"], manifest["data"]
    files, shapes = manifest["files"], manifest["parameter_shapes"]
    rows = [
        ("checkpoint", str(checkpoint)),
        ("saved", manifest.get("saved", "-")),
        ("step", f"{manifest['step']:,}"),
        ("samples", f"{position['samples']:,}"),
        ("tokens", f"{position['tokens']:,}"),
        ("skipped steps", f"{manifest.get('skipped_steps', 0):,}"),
        ("validation loss", _loss(manifest)),
        ("ranks", f"{manifest['world_size']:,}"),
        *((name, f"{value}") for name, value in zip(("TP", "PP", "ZeRO"), _layout(manifest), strict=True)),
        ("banks", manifest.get("memory_placement", "replicated")),
        ("parameters", f"{sum(map(math.prod, shapes.values())):,} in {len(shapes):,} tensors"),
        ("sequence length", f"{data['seq_length']:,}"),
        ("order of samples", f"{data['order']}, seed {data['seed']}"),
    ]
    if manifest.get("origin"):
        rows.append(("began from", f"{manifest['origin']['folder']} ({manifest['origin']['model_type']})"))
    for dataset in data["datasets"]:
        share = f"{dataset['weight']:.1%} of the samples, {human(dataset['tokens'])} tokens"
        rows.append(("data", f"{dataset['path']}: {share}"))
    rows += [("version", f"{name} {version}") for name, version in manifest.get("versions", {}).items()]
    rows += [
        ("time", f"{name.replace('_', ' ')} {human_seconds(value)}")
        for name, value in manifest.get("seconds", {}).items()
    ]
    sizes = Counter({name: entry["bytes"] for name, entry in files.items()})
    rows.append(("files", f"{len(files):,}, {human_bytes(sizes.total())}"))
    width = max(len(key) for key, _ in rows)
    lines = [f"{key:{width}}  {value}" for key, value in rows]
    return "\n".join([*lines, *table([[name, human_bytes(size)] for name, size in sizes.most_common()])])


def verify_checkpoints(path: str | Path) -> str:
    """Hash every file of a checkpoint, or of all checkpoints of a run folder.

    Raises:
        ConfigError: no such folder.
        DamagedCheckpoint: naming every file that is missing, differs or does not belong there.
        CheckpointError: there is no checkpoint, or a file may not be read.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir() or folder.absolute().name == "checkpoints":
        store = _store_of(folder)
        store.candidates()  # complains where all are gone
        checkpoints = [store.folder / store.name(step) for step in store.steps()]
    else:
        checkpoints = [checkpoint_at(folder)]
    wrong = _check(checkpoints, hashes=True)
    lines = [f"{checkpoint}: {line}" for checkpoint, problems in wrong.items() for line in problems]
    if lines:
        whole = ", ".join(checkpoint.name for checkpoint, problems in wrong.items() if not problems) or "none"
        raise DamagedCheckpoint(
            "damaged:\n    " + "\n    ".join(lines),
            f"restore the files; a resume goes on with the newest whole checkpoint (whole: {whole})",
        )
    return "\n".join(f"{checkpoint}: whole, {human_bytes(_size(checkpoint))}" for checkpoint in wrong)


def _store_of(run_dir: str | Path) -> CheckpointStore:
    """Of a run folder, or of the checkpoints/ in it."""
    store = CheckpointStore(run_dir)
    if not store.folder.is_dir() and Path(run_dir).absolute().name == store.folder.name:
        store = CheckpointStore(Path(run_dir).absolute().parent)
    require_folder(run_dir, "give a run folder")
    if not store.folder.is_dir():
        raise CheckpointError(f"{run_dir} has no checkpoints/", "give a run folder")
    return store


def _check(checkpoints: list[Path], hashes: bool) -> dict[Path, list[str]]:
    """What is wrong with each, with a progress bar where files are read."""
    manifests: dict[Path, dict[str, Any] | None] = {}
    wrong: dict[Path, list[str]] = {}
    for path in checkpoints:
        try:
            manifests[path], wrong[path] = read_manifest(path), []
        except CheckpointError as error:  # also one of a later version: the others are shown nevertheless
            manifests[path], wrong[path] = None, [error.problem]
    total = sum(entry["bytes"] for manifest in manifests.values() if manifest for entry in manifest["files"].values())
    bar = ProgressBar("verify", total, unit="B") if hashes else None
    count = _counter(bar)
    for path, manifest in manifests.items():
        if manifest is not None:
            wrong[path] += damage(path, manifest, hashes=hashes, on_bytes=count)
            if step_of(path.name) not in (None, manifest["step"]):
                wrong[path].append(f"manifest.json: is of step {manifest['step']:,}")
    if bar:
        bar.close()
    return {path: problems for path, problems in wrong.items() if path.is_dir()}  # a training may have removed some


def _counter(bar: ProgressBar | None) -> Callable[[int], None]:
    """Adds up what was read."""
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        if bar:
            bar.update(done)

    return count


def _columns(checkpoint: Path) -> list[str]:
    """From `saved` to `validation loss`."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:  # also of a later version, see `_check`
        return ["-", human_bytes(_size(checkpoint)), *"-----"]
    saved = manifest.get("saved", "-")[:16].replace("T", " ")
    layout = [str(manifest["world_size"]), *map(str, _layout(manifest))]
    return [saved, human_bytes(_size(checkpoint)), *layout, _loss(manifest)]


def _layout(manifest: dict[str, Any]) -> tuple[int, int, int]:
    """TP, PP, ZeRO stage."""
    tensor = manifest.get("tensor_model_parallel_size", 1)
    return tensor, manifest.get("pipeline_model_parallel_size", 1), manifest["zero_stage"]


def _loss(manifest: dict[str, Any]) -> str:
    loss = manifest.get("validation_loss")
    return "-" if loss is None else f"{loss:.4f}"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder as they are now, links not followed."""
    total = 0
    for name in list_files(folder):
        with contextlib.suppress(FileNotFoundError):  # a training that goes on renames and removes files
            total += (folder / name).lstat().st_size
    return total
