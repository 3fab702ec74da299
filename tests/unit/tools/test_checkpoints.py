"""`loopmem checkpoint list | show | verify` on small published checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loopmem_pretrain.checkpoint.manifest import _digest
from loopmem_pretrain.cli import main
from loopmem_pretrain.config.load import dump_config
from tests.configs import tiny_run
from tests.unit.checkpoint.published import publish


@pytest.fixture
def run_dir(tmp_path):
    """A run folder with checkpoints of steps 500, 1,000 and 1,500, the best of them the middle one."""
    config = tiny_run(tmp_path, checkpoint={"keep_last": 2, "keep_best": 1, "keep_every_steps": 500})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for step, loss in ((500, 3.0), (1000, 2.25), (1500, None)):
        publish(tmp_path, step, validation_loss=loss, versions={"torch": "2.13.0"})
    return tmp_path


def said(capsys, code, *arguments):
    assert main(["checkpoint", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_list(run_dir, capsys):
    (run_dir / "checkpoints" / "damaged-step_00000700").mkdir()
    output = said(capsys, 0, "list", run_dir).out.splitlines()
    first, *rows, beside = output
    assert first.split()[:4] == ["step", "saved", "size", "ranks"]
    assert [row.split()[0] for row in rows] == ["500", "1,000", "1,500"]
    assert (
        "sizes fit" in rows[0]
        and "150 B" in rows[0]
        and "3.0000" in rows[0]
        and rows[0].split("  ")[-1].strip() == "every 500"
    )
    assert "last, every 500, best" in rows[1]
    assert rows[2].endswith("last, every 500 <- latest") and " - " in rows[2]
    assert beside == "beside them: damaged-step_00000700 (0 B)"


def test_the_folder_of_the_checkpoints_is_as_good(run_dir, capsys):
    for verb in ("list", "verify"):
        there = said(capsys, 0, verb, run_dir / "checkpoints").out
        assert there == said(capsys, 0, verb, run_dir).out != ""


def test_list_and_verify_name_what_is_damaged(run_dir, capsys):
    folder = run_dir / "checkpoints"
    (folder / "step_00001500" / "weights.pt").write_bytes(b"w" * 99 + b"v")
    (folder / "step_00001000" / "manifest.json").unlink()
    (folder / "latest").write_text("elsewhere")
    output = said(capsys, 0, "list", run_dir, "--verify").out
    assert "step_00001500 is damaged:\n    weights.pt: content differs" in output
    assert "step_00001000 is damaged:" in output and "latest names elsewhere" in output
    assert output.count("  whole  ") == 1 and "<- latest" not in output
    error = said(capsys, 4, "verify", run_dir).err
    assert "step_00001500: weights.pt: content differs from its recorded hash" in error
    assert "step_00001000/manifest.json is missing" in error
    assert "(whole: step_00000500)" in error


def test_verify_one_or_all(run_dir, capsys):
    output = said(capsys, 0, "verify", run_dir)
    assert output.out.count(": whole, 150 B") == 3
    assert "verify: 0.5/0.5 kB" in output.err
    assert said(capsys, 0, "verify", run_dir / "checkpoints" / "step_00000500").out.count("whole") == 1


def test_a_checkpoint_under_another_step_is_damage(run_dir, capsys):
    folder = run_dir / "checkpoints"
    (folder / "step_00001500").rename(folder / "step_00002500")
    assert "manifest.json: is of step 1,500" in said(capsys, 4, "verify", folder / "step_00002500").err


def test_one_of_a_later_version_does_not_hide_the_others(run_dir, capsys):
    path = run_dir / "checkpoints" / "step_00001000" / "manifest.json"
    content = json.loads(path.read_text()) | {"version": 2}
    path.write_text(json.dumps({**content, "sha256": _digest(content)}) + "\n")
    lines = said(capsys, 0, "list", run_dir).out.splitlines()
    assert any("version 2 of the format" in line for line in lines)
    assert any("sizes fit" in line for line in lines)


def test_show(run_dir, capsys):
    newest = said(capsys, 0, "show", run_dir).out
    assert newest == said(capsys, 0, "show", run_dir / "checkpoints" / "step_00001500").out
    words = [line.split() for line in newest.splitlines()]
    for line in (
        ["step", "1,500"],
        ["tokens", "192,000"],
        ["parameters", "3,072", "in", "1", "tensors"],
        ["version", "torch", "2.13.0"],
        ["time", "files", "1.50", "s"],
        ["weights.pt", "100", "B"],
        ["inner/state.pt", "50", "B"],
    ):
        assert line in words, newest


@pytest.mark.parametrize("verb", ["list", "show", "verify"])
@pytest.mark.parametrize("missing", ["no folder", "no checkpoints", "no manifest", "all gone"])
def test_what_is_not_there(tmp_path, capsys, verb, missing):
    path = tmp_path / "run"
    if missing == "no checkpoints":
        path.mkdir()
    elif missing == "no manifest":
        path = tmp_path / "step_00000005"
        path.mkdir()
    elif missing == "all gone":
        (path / "checkpoints").mkdir(parents=True)
        (path / "checkpoints" / "latest").write_text("step_00000005\n")
    assert str(path) in said(capsys, 2 if missing == "no folder" else 4, verb, path).err


def test_torch_is_not_loaded(run_dir):
    program = (
        "import sys; from loopmem_pretrain.cli import main\n"
        f"for verb in ('list', 'show', 'verify'): assert main(['checkpoint', verb, {str(run_dir)!r}]) == 0\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert result.returncode == 0, result.stderr
