"""What a run is asked by files: stop, pause, save; before its first step and in the middle."""

import json

from tests.e2e.test_training import config_for, exact, run


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def test_nothing_is_trained_while_the_file_is_there(tmp_path, sentences):
    config = config_for(tmp_path / "run", sentences)
    (tmp_path / "run").mkdir()
    for name in ("STOP", "PAUSE"):
        (tmp_path / "run" / name).touch()
        assert run(config) == ("interrupted", None)
        assert status(tmp_path / "run")["step"] == 0
        assert status(tmp_path / "run")["reason"] == f"stopped by {tmp_path}/run/{name}"
        (tmp_path / "run" / name).unlink()
    assert run(config) == ("done", None)


def test_save_and_stop_in_the_middle(tmp_path, sentences):
    """Asked at step 3: saved at the next line, step 5, and training goes on; then stopped at 15, bit for bit."""
    sections = {"checkpoint": {"interval_steps": 20}, "logging": {"interval_steps": 5}}
    config = config_for(tmp_path / "run", sentences, **sections)
    ask = """
def ask(trained, trainer=trainer, advance=trainer._advance):
    advance()
    for step, name in ((3, "SAVE"), (12, "STOP")):
        if trainer.rank == 0 and trainer.position.step == step: (trainer.run_dir / name).touch()
trainer._advance = lambda: ask(None)
"""
    assert run(config, before=ask) == ("interrupted", None)
    assert checkpoints(tmp_path / "run") == ["step_00000005", "step_00000015"]
    assert not (tmp_path / "run" / "SAVE").exists()
    (tmp_path / "run" / "STOP").unlink()
    assert run(config) == ("done", None)
    whole = config_for(tmp_path / "whole", sentences, **sections)
    assert run(whole) == ("done", None)
    assert exact(tmp_path / "run")[-1] == exact(tmp_path / "whole")[-1]
