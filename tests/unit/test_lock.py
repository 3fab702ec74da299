"""Locks of folders."""

import fcntl

import pytest

from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.lock import take_lock


def test_one_process_at_a_time(tmp_path):
    with take_lock(tmp_path / "lock", "busy", "wait"), pytest.raises(EnvironmentFault, match="busy"):
        take_lock(tmp_path / "lock", "busy", "wait")
    take_lock(tmp_path / "lock", "busy", "wait").close()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(stream, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(EnvironmentFault, match=r"cannot lock .*lock: No locks available") as told:
        take_lock(tmp_path / "lock", "busy", "wait")
    assert "flock" in told.value.fix
