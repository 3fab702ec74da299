"""The checkpoint of step 0: weights from elsewhere, from which a new run begins as if it resumed.

It is in merged form, so that ranks of any sizes read it, and holds weights only: the moments of an optimizer that has
made no step are zero.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from typing import Any

from loopmem_pretrain.checkpoint.position import Position
from loopmem_pretrain.checkpoint.reshape import not_in_training
from loopmem_pretrain.checkpoint.store import LOCK, RUN_ID, CheckpointStore, hash_files, is_run_folder, list_files
from loopmem_pretrain.checkpoint.universal import MERGED
from loopmem_pretrain.config.load import dump_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.data.dataset import BlendedDataset
from loopmem_pretrain.data.files import disk_faults, sync_folder, write_file
from loopmem_pretrain.errors import ConfigError


def check_new_run(run_dir: Path) -> None:
    """Refuse a folder in which a run has been started.

    Raises:
        ConfigError: it holds a run's config.yaml or checkpoints, or is a file.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir {run_dir} is a file", "name a folder to begin the run in")
    if is_run_folder(run_dir):
        raise ConfigError(f"{run_dir} is a run folder already", "choose another run_dir: a run begins only once")


@contextlib.contextmanager
def first_checkpoint(
    config: RunConfig, dataset: BlendedDataset, shapes: Mapping[str, Sequence[int]], origin: Mapping[str, Any]
) -> Iterator[Path]:
    """A folder that is published as the checkpoint of step 0 when the block ends, and is gone where it raises.

    The block writes MERGED/fp32/ (`universal.write_weights`), and what else belongs to the checkpoint.

    Args:
        config: of the run that begins.
        dataset: the run's training data.
        shapes: of every parameter, by public name, in the model's order.
        origin: where the weights come from, for the manifest.

    Raises:
        ConfigError: a run has been started in config.run_dir.
        EnvironmentFault: disk full, no permission, or a process is training there.
    """
    run_dir = Path(config.run_dir)
    store = CheckpointStore(run_dir)
    made = [path for path in (store.folder, run_dir, *run_dir.parents) if not path.exists()]
    with disk_faults(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with not_in_training(run_dir):
            check_new_run(run_dir)
            with _vanishing(store, alone=run_dir in made) as folder:
                yield folder
                with disk_faults(run_dir):
                    _publish(config, store, folder, _facts(config, dataset, shapes, origin))
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: others write there
                path.rmdir()
        raise


@contextlib.contextmanager
def _vanishing(store: CheckpointStore, alone: bool) -> Iterator[Path]:
    """The incomplete folder, which goes where the block raises, and what is ours in a run folder that we made."""
    folder = store.folder / store.incomplete_name(0)
    store.discard_incomplete()
    with disk_faults(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for name in (RUN_ID, LOCK) if alone else ():
            (store.folder.parent / name).unlink(missing_ok=True)
        raise


def _facts(
    config: RunConfig, dataset: BlendedDataset, shapes: Mapping[str, Sequence[int]], origin: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "run_id": token_hex(8),
        "form": MERGED,
        "origin": dict(origin),
        "position": asdict(Position()),
        "world_size": 1,
        "zero_stage": config.parallel.zero_stage,
        "versions": {name: version(name) for name in ("loopmem-pretrain", "torch")},
        "data": dataset.describe(),
        "tokenizer_sha256": dataset.datasets[0].stream.manifest.tokenizer.sha256,
        "parameter_names": {name: name for name in shapes},
        "parameter_shapes": {name: list(shape) for name, shape in shapes.items()},
    }


def _publish(config: RunConfig, store: CheckpointStore, folder: Path, facts: Mapping[str, Any]) -> None:
    text = dump_config(config).encode()
    write_file(folder / "config.yaml", text)
    files = hash_files(folder, list_files(folder))
    for each in (folder / MERGED, *(folder / MERGED).iterdir()):
        sync_folder(each)
    run_dir = store.folder.parent
    write_file(run_dir / RUN_ID, f"{facts['run_id']}\n".encode())
    store.publish(0, files, facts)
    write_file(run_dir / "config.yaml", text)  # last: now it is a run folder
