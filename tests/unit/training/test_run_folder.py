"""status.json tells the cause of a failure, not what other ranks made of it."""

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loopmem_pretrain import control
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.lock import take_lock
from loopmem_pretrain.training.run_folder import environment, hold, prepare, read_status, write_failure, write_status
from tests.configs import tiny_run

FULL = EnvironmentFault("no space left", "free some")
LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer")


def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    write_status(tmp_path, "running", "training", 7)
    return tmp_path


def test_the_cause_is_kept_when_other_ranks_lose_contact(tmp_path):
    run_dir = folder(tmp_path)
    write_failure(run_dir, FULL)
    write_failure(run_dir, LOST)
    assert read_status(run_dir)["reason"] == "no space left"


@pytest.mark.parametrize("cause", [FULL, KeyError("a bug")], ids=["named", "a bug"])
def test_the_cause_replaces_what_another_rank_said_first(tmp_path, cause):
    run_dir = folder(tmp_path)
    write_failure(run_dir, LOST)
    assert read_status(run_dir)["reason"].startswith("lost contact with another rank")
    assert read_status(run_dir)["step"] == 7
    write_failure(run_dir, cause)
    write_failure(run_dir, LOST)
    assert read_status(run_dir)["reason"] == ("no space left" if cause is FULL else "KeyError: 'a bug'")


def test_a_run_that_trains_is_not_called_failed_by_a_start_that_was_refused(tmp_path):
    run_dir = folder(tmp_path)
    code = "import sys; from pathlib import Path; from loopmem_pretrain.lock import take_lock\n"
    code += "held = take_lock(Path(sys.argv[1]), '', ''); print('held', flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, str(run_dir / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        write_failure(run_dir, FULL)
        assert read_status(run_dir)["status"] == "running"
        hold(run_dir)  # a rank whose rank 0 has the lock
        write_failure(run_dir, FULL)
        assert read_status(run_dir)["status"] == "failed"
        other.stdin.close()


def test_wrong_usage_is_recorded_of_a_training_under_way_only(tmp_path):
    run_dir = folder(tmp_path)
    write_failure(run_dir, ConfigError("a wrong value"))
    assert read_status(run_dir)["status"] == "running"
    write_failure(run_dir, ConfigError("a wrong value"), step=8)
    assert (read_status(run_dir)["status"], read_status(run_dir)["step"]) == ("failed", 8)


def test_what_cannot_be_written_does_not_hide_the_failure(tmp_path, monkeypatch):
    run_dir, said = folder(tmp_path), []

    def full(path, content):
        raise EnvironmentFault(f"no room to write {path}")

    monkeypatch.setattr("loopmem_pretrain.training.run_folder.write_file", full)
    write_failure(run_dir, FULL, complain=said.append)
    assert len(said) == 1 and "no room to write" in said[0]


def test_what_an_earlier_start_said_is_replaced(tmp_path):
    run_dir = folder(tmp_path)
    write_status(run_dir, "failed", "no space left", 7)
    text = (run_dir / "status.json").read_text()
    (run_dir / "status.json").write_text(text.replace(read_status(run_dir)["time"], "2001-01-01T00:00:00+0000"))
    write_failure(run_dir, LOST)
    assert read_status(run_dir)["reason"].startswith("lost contact with another rank")


@pytest.mark.parametrize("content", ["", '{"sta', '"done"', '{"status": "failed", "time": 5}'])
def test_a_damaged_status_does_not_hide_the_failure(tmp_path, content):
    run_dir = folder(tmp_path)
    (run_dir / "status.json").write_text(content)
    said = []
    write_failure(run_dir, FULL, complain=said.append)  # of a start that was refused: the damage stays to be seen
    write_failure(run_dir, FULL, step=3)
    assert read_status(run_dir)["reason"] == "no space left" and not said


def test_a_finished_run_stays_finished(tmp_path):
    run_dir = folder(tmp_path)
    write_status(run_dir, "done", "all steps trained", 9)
    write_failure(run_dir, FULL)
    assert read_status(run_dir)["status"] == "done"


def test_a_folder_in_which_nothing_was_trained_takes_another_configuration(tmp_path):
    """A start that data refused after it had written config.yaml."""
    first, second = (tiny_run(run_dir=str(tmp_path), model={"vocab_size": size}) for size in (96, 97))
    prepare(first, tmp_path).close()
    prepare(second, tmp_path).close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="belongs to another configuration"):
        prepare(first, tmp_path)


def test_credentials_of_the_command_line_are_not_recorded(monkeypatch):
    command = ["loopmem", "train", "x=https://user:word@host/a@b", "y=https://host/a", "z=a@b"]
    monkeypatch.setattr("sys.argv", command)
    assert environment()["command"] == ["loopmem", "train", "x=https://host/a@b", *command[3:]]


@pytest.mark.parametrize("name", ["manifest.json", "config.json", ".git", "news.jsonl", "part-1.parquet"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    """Prepared data, an exported model, a repository, texts: a run would be mixed into it."""
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path} is no run's folder: it has {name} in it"):
        prepare(tiny_run(tmp_path, "data"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=f"run_dir {tmp_path}/run is a file"):
        prepare(tiny_run(tmp_path / "run", "data"), tmp_path / "run")


def test_notes_and_configs_of_a_user_may_lie_there(tmp_path):
    for name in ("notes.txt", "my.yaml", "data"):
        (tmp_path / name).mkdir()
    prepare(tiny_run(tmp_path, "data"), tmp_path).close()


def test_a_copy_of_a_run_without_its_id_is_a_run(tmp_path):
    for name in ("metrics.jsonl", "faults.jsonl"):
        (tmp_path / name).write_text("")
    prepare(tiny_run(tmp_path, "data"), tmp_path).close()


def test_a_start_that_takes_over_waits_for_the_one_before_it(tmp_path, monkeypatch):
    """Which was cut off, holds the lock where it is, and looks at RUN/fence now and then."""
    held = take_lock(tmp_path / ".lock", "", "")
    with pytest.raises(EnvironmentFault, match="another process is training"):
        prepare(tiny_run(tmp_path, "data"), tmp_path)
    monkeypatch.setenv(control.START, "7.1")
    control.take_over(tmp_path, "7.1")
    threading.Timer(1.2, held.close).start()
    prepare(tiny_run(tmp_path, "data"), tmp_path).close()


def test_checkpoints_that_cannot_be_written_are_found_at_the_start(tmp_path, monkeypatch):
    """Not when the first is due."""
    (tmp_path / "checkpoints").mkdir()
    write = Path.write_text

    def read_only(path, content, **options):
        if path.parent.name == "checkpoints":
            raise OSError(errno.EROFS, "Read-only file system")
        return write(path, content, **options)

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(EnvironmentFault, match=r"cannot write to .*checkpoints: Read-only"):
        prepare(tiny_run(run_dir=str(tmp_path)), tmp_path)
