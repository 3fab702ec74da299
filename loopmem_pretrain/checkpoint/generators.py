"""The states of a rank's random generators. Training draws no random numbers today; what may draw some is kept."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopmem_pretrain.errors import CheckpointError


def generators_file(rank: int) -> str:
    """Name of the file, in a checkpoint, with the states of a rank's generators."""
    return f"generators_rank_{rank:05d}.pt"


def generator_states() -> dict[str, Any]:
    """Of torch, of this process's GPU, of numpy and of Python: tensors and plain numbers only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (str(name), torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def restore_generators(checkpoint: Path, rank: int) -> list[str]:
    """Restore this rank's generators; returns the names of those the checkpoint has no state of.

    Raises:
        CheckpointError: the file does not hold states of generators.
    """
    path = checkpoint / generators_file(rank)
    if not path.is_file():
        return ["torch", "cuda", "numpy", "python"]
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
        torch.set_rng_state(states["torch"])
        name, keys, position, has_gauss, gauss = states["numpy"]
        np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
        random.setstate(states["python"])
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except Exception as error:
        raise CheckpointError(f"{path} holds no states of generators: {error}", "use another checkpoint") from error
    return ["cuda"] if states["cuda"] is None and torch.cuda.is_available() else []
