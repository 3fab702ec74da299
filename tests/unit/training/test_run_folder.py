"""status.json tells the cause of a failure, not what other ranks made of it."""

from loopmem_pretrain.errors import EnvironmentFault
from loopmem_pretrain.training.run_folder import environment, read_status, write_failure, write_status

FULL = EnvironmentFault("no space left", "free some")
LOST = EnvironmentFault("lost contact with another rank", "see its message")


def folder(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    write_status(tmp_path, "running", "training", 7)
    return tmp_path


def test_the_cause_is_kept_when_other_ranks_lose_contact(tmp_path):
    run_dir = folder(tmp_path)
    write_failure(run_dir, FULL)
    write_failure(run_dir, LOST, is_cause=False)
    assert read_status(run_dir)["reason"] == "no space left"


def test_an_unnamed_error_of_rank_0_is_replaced_by_a_named_one(tmp_path):
    run_dir = folder(tmp_path)
    write_status(run_dir, "failed", "RuntimeError: gloo/transport/tcp/pair.cc", 7)
    write_failure(run_dir, LOST, is_cause=False)
    assert read_status(run_dir)["reason"] == "lost contact with another rank"
    assert read_status(run_dir)["step"] == 7


def test_what_an_earlier_start_said_is_replaced(tmp_path):
    run_dir = folder(tmp_path)
    write_status(run_dir, "failed", "no space left", 7)
    text = (run_dir / "status.json").read_text()
    (run_dir / "status.json").write_text(text.replace(read_status(run_dir)["time"], "2001-01-01T00:00:00+0000"))
    write_failure(run_dir, LOST, is_cause=False)
    assert read_status(run_dir)["reason"] == "lost contact with another rank"


def test_a_finished_run_stays_finished(tmp_path):
    run_dir = folder(tmp_path)
    write_status(run_dir, "done", "all steps trained", 9)
    write_failure(run_dir, FULL)
    assert read_status(run_dir)["status"] == "done"


def test_credentials_of_the_command_line_are_not_recorded(monkeypatch):
    command = ["loopmem", "train", "x=https://user:word@host/a@b", "y=https://host/a", "z=a@b"]
    monkeypatch.setattr("sys.argv", command)
    assert environment()["command"] == ["loopmem", "train", "x=https://host/a@b", *command[3:]]
