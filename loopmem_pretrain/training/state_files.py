"""DeepSpeed's checkpoint files as states in memory, which we write ourselves: atomically, hashed, in the background."""

import os
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class StateCollector(CheckpointEngine):  # type: ignore[misc]
    """Stands where DeepSpeed would write a file: keeps name and state. Reading reads the file."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "StateCollector"
        self.states: dict[str, Any] = {}
        """By file name, without the folder; the tensors are the live ones."""

    def create(self, info: CheckpointCommitInfo) -> None:
        self.states = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The folder is made by whoever writes the states."""

    def save(self, state_dict: Any, path: str) -> None:
        self.states[os.path.basename(path)] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> None:
        """Publishing is not DeepSpeed's business."""

    def preserves_storage_sharing(self) -> bool:
        return False  # so DeepSpeed need not clone parts of flat buffers before it hands them over
