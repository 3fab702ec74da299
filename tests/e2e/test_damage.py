"""Damage to any file of a real checkpoint is found before anything is unpickled, and a resume goes on without it."""

import shutil

import pytest

from loopmem_pretrain.checkpoint.manifest import read_manifest
from loopmem_pretrain.checkpoint.store import CheckpointStore, verify
from loopmem_pretrain.cli import main
from loopmem_pretrain.errors import CheckpointError
from tests.e2e.test_training import config_for, lines, run

NEWEST, OLDER = "step_00000015", "step_00000010"
KINDS = ["missing", "truncated", "flipped"]
SAID = "logging.getLogger('loopmem_pretrain').addHandler(logging.FileHandler({!r}))"


def config(run_dir, data_dir):
    """Everything often, so that a step is measured alike whichever start trains it."""
    often = {"checkpoint": {"interval_steps": 5}, "validation": {"interval_steps": 5}, "logging": {"interval_steps": 1}}
    return config_for(run_dir, data_dir, **often)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, sentences):
    """A run of two ranks stopped at step 15 of 20, with checkpoints of steps 5, 10 and 15. Tests copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run(config(folder, sentences), stop_at_step=15) == ("interrupted", None)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, stopped, sentences):
    """The same run, continued to its end without damage; losses by step."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    assert run(config(folder, sentences)) == ("done", None)
    return measured(folder)


def measured(run_dir):
    """What each step computed, bit for bit; of steps that were trained twice, the later line."""
    keys = ("loss", "grad_norm", "validation_loss", "expected_loops", "step_scales")
    return {line["step"]: [line.get(key) for key in keys] for line in lines(run_dir)}


@pytest.fixture
def copied(tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def break_file(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-10])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_damage_to_every_file_is_found(stopped, tmp_path, capsys):
    checkpoint = stopped / "checkpoints" / NEWEST
    names = ["manifest.json", *read_manifest(checkpoint)["files"]]
    assert len(names) >= 6  # two ranks' optimizer states, layers, engine counters, config.yaml
    for name in names:
        for kind in KINDS:
            copy = tmp_path / "copy"
            shutil.copytree(checkpoint, copy)
            break_file(copy / name, kind)
            with pytest.raises(CheckpointError, match=name):
                verify(copy)
            shutil.rmtree(copy)
    assert main(["checkpoint", "verify", str(stopped)]) == 0
    assert capsys.readouterr().out.count("whole") == 3


DAMAGES = [
    ("manifest.json", "missing"),
    ("manifest.json", "flipped"),
    ("*zero_pp_rank_1*", "flipped"),
    ("mp_rank_00_model_states.pt", "missing"),
    ("layer_01*", "truncated"),
    ("config.yaml", "truncated"),
]


@pytest.mark.parametrize(("pattern", "kind"), DAMAGES)
def test_resume_goes_on_from_the_older_one(copied, sentences, whole, pattern, kind):
    folder = copied / "checkpoints"
    file = next((folder / NEWEST).glob(pattern))
    break_file(file, kind)
    assert main(["checkpoint", "verify", str(copied)]) == 4
    said = copied / "said"
    result = run(config(copied, sentences), first=f"import logging; {SAID.format(str(said))}")
    assert result == ("done", None)
    assert f"{folder / NEWEST} is damaged" in said.read_text() and file.name in said.read_text()
    assert f"falling back to {folder / OLDER};" in said.read_text()
    assert (folder / f"damaged-{NEWEST}").is_dir()  # kept
    assert CheckpointStore(copied).steps() == [10, 15, 20]
    assert main(["checkpoint", "verify", str(copied)]) == 0
    assert measured(copied) == whole


def test_several_are_damaged_and_the_next_start_knows(copied, sentences, whole):
    folder = copied / "checkpoints"
    for name in (NEWEST, OLDER):
        break_file(next((folder / name).glob("*zero_pp_rank_0*")), "flipped")
    assert run(config(copied, sentences), stop_at_step=7) == ("interrupted", None)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"damaged-{OLDER}",
        f"damaged-{NEWEST}",
        "latest",
        "step_00000005",
        "step_00000007",
    ]
    assert run(config(copied, sentences)) == ("done", None)
    again = measured(copied)
    again[7][2] = None  # a validation at the stop
    assert again == whole


@pytest.mark.parametrize("content", [None, b"", b"step_00000099\n", b"\xff\x00"])
def test_where_latest_is_damaged_the_newest_whole_one_counts(copied, sentences, whole, content):
    pointer = copied / "checkpoints" / "latest"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    break_file(next((pointer.parent / NEWEST).glob("layer_00*")), "missing")
    assert run(config(copied, sentences)) == ("done", None)
    assert measured(copied) == whole


def test_all_damaged_is_an_error_that_names_them_and_changes_nothing(copied, sentences):
    folder = copied / "checkpoints"
    for path in folder.glob("step_*"):
        break_file(next(path.glob("*zero_pp_rank_1*")), "truncated")
    before = sorted(path.name for path in folder.iterdir())
    _, error = run(config(copied, sentences))
    assert error.exit_code == 4
    assert all(f"step_000000{step}: " in error.problem for step in ("05", "10", "15"))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_file_that_does_not_belong_there_is_damage(copied, sentences, whole):
    """DeepSpeed would read it: it takes every file that its patterns find."""
    folder = copied / "checkpoints" / NEWEST
    states = next(folder.glob("*zero_pp_rank_1*"))
    shutil.copy(states, states.with_name(states.name.replace("rank_1", "rank_2")))
    assert run(config(copied, sentences)) == ("done", None)
    assert measured(copied) == whole
    assert (folder.parent / f"damaged-{NEWEST}").is_dir()


def test_other_data_is_no_damage(copied, tmp_path):
    from tests.prepared import prepare_sentences

    _, error = run(config(copied, prepare_sentences(tmp_path / "other", seed=2)))
    assert error.exit_code == 4 and "other data" in error.problem
    assert CheckpointStore(copied).steps() == [5, 10, 15]


def test_an_export_does_not_choose_by_itself(copied, tmp_path):
    from loopmem_pretrain.hf.convert import convert_run

    break_file(next((copied / "checkpoints" / NEWEST).glob("layer_00*")), "flipped")
    with pytest.raises(CheckpointError, match="layer_00") as caught:
        convert_run(copied, tmp_path / "hf")
    assert f"{OLDER}, which is older and whole" in caught.value.fix
    break_file(copied / "checkpoints" / NEWEST / "config.yaml", "truncated")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        convert_run(copied, tmp_path / "hf")


def test_a_checkpoint_that_goes_away_under_an_export(copied, tmp_path, monkeypatch):
    """As where a training that goes on removes old ones."""
    from loopmem_pretrain.checkpoint import universal
    from loopmem_pretrain.hf.convert import convert_run

    newest = CheckpointStore(copied).latest()
    check = universal._check_names
    monkeypatch.setattr(universal, "_check_names", lambda *arguments: (check(*arguments), shutil.rmtree(newest)))
    with pytest.raises(CheckpointError, match="was removed while it was read"):
        convert_run(copied, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
