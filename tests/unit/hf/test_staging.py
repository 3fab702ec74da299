"""A folder appears whole or not at all, and nothing foreign is overwritten."""

import os
import stat
from pathlib import Path

import pytest

from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.hf.staging import check_destination, staged


def make_export(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "loopmem"}')
    (folder / "model.safetensors").write_text("old")
    return folder


def left(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_appears_with_its_files(tmp_path):
    with staged(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "deep" / "out").exists()
    assert left(tmp_path) == ["deep"] and left(tmp_path / "deep") == ["out"]
    assert left(tmp_path / "deep" / "out") == ["config.json"]


def test_others_may_read_it_as_umask_allows(tmp_path):
    with staged(tmp_path / "out"):
        pass
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert left(tmp_path) == []


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert left(tmp_path / "out") == ["config.json"]


def test_earlier_export_is_replaced_when_asked(tmp_path):
    make_export(tmp_path / "out")
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert left(tmp_path) == ["out"] and left(tmp_path / "out") == ["config.json"]


def test_an_error_keeps_the_earlier_export(tmp_path):
    make_export(tmp_path / "out")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert left(tmp_path) == ["out"] and (tmp_path / "out" / "model.safetensors").read_text() == "old"


def test_file_that_appears_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(ConfigError), staged(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert left(tmp_path) == ["out"] and left(tmp_path / "out") == ["notes.txt"]


def refusal(*args) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_destination(*args)
    assert caught.value.fix
    return caught.value


def test_not_empty(tmp_path):
    make_export(tmp_path / "out")
    said = refusal(tmp_path / "out", False)
    assert "holds an exported model: config.json, model.safetensors" in said.problem and "--overwrite" in said.fix
    (tmp_path / "out" / "config.json").unlink()
    said = refusal(tmp_path / "out", False)
    assert "is not empty: model.safetensors" in said.problem and "--overwrite" not in said.fix


def test_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    assert "is a file" in refusal(tmp_path / "out", True).problem


def test_overwriting_what_is_no_export(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert "is no exported loopmem model" in refusal(tmp_path, True).problem


def test_overwriting_another_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is no exported loopmem model" in refusal(tmp_path, True).problem


def test_overwriting_with_foreign_files(tmp_path):
    (make_export(tmp_path / "out") / "notes.txt").write_text("")
    assert "files that no export writes: notes.txt" in refusal(tmp_path / "out", True).problem


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault), staged(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="not allowed"), staged(tmp_path / "out"):
        pass
