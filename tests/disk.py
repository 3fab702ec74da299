"""Watches the disk steps of what runs, each of which is still done: what reaches the disk, and in which order."""

import os
from pathlib import Path
from typing import Any

import pytest

Step = tuple[str, str]


def disk_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps from now on: ("flush", path) and ("name", final path), the path as it is called at that moment."""
    steps: list[Step] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(descriptor: int) -> None:
        fsync(descriptor)
        steps.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    def named(function: Any) -> Any:
        def called(source: Any, target: Any) -> None:
            function(source, target)
            steps.append(("name", os.path.abspath(target)))

        return called

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))
    return steps


def assert_in_order(steps: list[Step], *expected: tuple[str, str | Path]) -> None:
    """That these steps are among those taken, in this order."""
    left = iter(steps)
    for kind, path in expected:
        assert (kind, str(path)) in left, f"no {kind} of {path} in its place: {steps}"
