"""Files that are whole or absent."""

from pathlib import Path

from loopmem_pretrain.data.files import write_file
from tests.disk import disk_steps


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    path = tmp_path / "pointer"
    steps = disk_steps(monkeypatch)
    write_file(path, b"step_00000005\n")
    (kind, temporary), *rest = steps
    assert kind == "flush" and Path(temporary).name.startswith(".pointer.tmp-")
    assert rest == [("name", str(path)), ("flush", str(tmp_path))]
