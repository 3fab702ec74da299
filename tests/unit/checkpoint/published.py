"""A small published checkpoint: real files, a real manifest, nothing in them that DeepSpeed wrote."""

from pathlib import Path
from typing import Any

from loopmem_pretrain.checkpoint.store import CheckpointStore, hash_files, list_files


def publish(run_dir: Path, step: int, **facts: Any) -> Path:
    """Publish a checkpoint of `step`; keyword arguments add to its manifest or replace what is in it."""
    store = CheckpointStore(run_dir)
    folder = store.folder / store.incomplete_name(step)
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"w" * 100)
    (folder / "inner" / "state.pt").write_bytes(b"s" * 50)
    dataset = {"path": "tokens", "manifest_sha256": "a" * 64, "tokens": 1000, "samples": 62, "weight": 1.0}
    content: dict[str, Any] = {
        "position": {"step": step, "samples": 8 * step, "tokens": 128 * step},
        "world_size": 2,
        "zero_stage": 1,
        "data": {"order": "feistel", "seed": 42, "seq_length": 16, "datasets": [dataset]},
        "tokenizer_sha256": "b" * 64,
        "parameter_names": {"0.weight": "model.embed.weight"},
        "parameter_shapes": {"model.embed.weight": [96, 32]},
        "stage_bounds": [0, 2],
        "seconds": {"files": 1.5},
    }
    return store.publish(step, hash_files(folder, list_files(folder)), content | facts)
