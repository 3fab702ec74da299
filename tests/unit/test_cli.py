"""The command line: bad usage ends with exit code 2, names what is wrong and shows no traceback."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopmem_pretrain import __version__
from loopmem_pretrain.cli import build_parser, main

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "configs" / "train" / "demo.yaml")
RECIPE = str(ROOT / "data_prep" / "demo.yaml")
COMMANDS = sorted(next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict)))


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(code, *arguments): runs `loopmem`, expects that exit code, returns what was said on stderr."""
    monkeypatch.delenv("RANK", raising=False)

    def run(code: int, *arguments: str) -> str:
        try:
            got = main(arguments)
        except SystemExit as ended:  # argparse's own refusals
            got = int(ended.code or 0)
        output = capsys.readouterr()
        assert got == code, output.err
        assert "Traceback" not in output.err
        assert output.out == ""
        return output.err

    return run


def test_no_command(refused):
    assert "the following arguments are required: COMMAND" in refused(2)


def test_unknown_command(refused):
    said = refused(2, "trian")
    assert "invalid choice: 'trian'" in said
    assert all(f"'{command}'" in said for command in COMMANDS)


def test_unknown_option(refused):
    assert "unrecognized arguments: --gpus" in refused(2, "train", "--config", RUN, "--gpus=2")


def test_a_config_given_twice(refused):
    """The first of the two would be left out in silence."""
    said = refused(2, "train", "--config", RUN, "a.b=1", "--config=other.yaml")
    assert "--config is given twice; a file that builds on others names them under `base:`" in said


def test_the_usage_is_of_the_subcommand(refused):
    assert refused(2, "train", "--config", RUN, "a.b=1", "--gpus", "2").startswith("usage: loopmem train ")
    said = refused(2, "slurm", "status", "runs/demo", "logging.interval_steps=2")
    assert said.startswith("usage: loopmem slurm status ")
    assert "unrecognized arguments: logging.interval_steps=2" in said


@pytest.mark.parametrize(
    "command",
    [
        ("train", "a.b=1", "--config", RUN, "--ranks", "2", "c.d=2", "--trust", "e.f=3"),
        ("estimate", "a.b=1", "--config", RUN, "--ranks=2", "c.d=2", "e.f=3"),
        ("prepare-data", "a.b=1", "--config", RUN, "c.d=2", "e.f=3"),
        ("train-tokenizer", "--config", RUN, "a.b=1", "c.d=2", "e.f=3"),
        ("convert", "--from-hf", "dense", "my.yaml", "a.b=1", "--overwrite", "c.d=2", "e.f=3"),
        ("slurm", "render", "a.b=1", "--nodes", "2", "c.d=2", "--config", RUN, "--cluster", "c.yaml", "e.f=3"),
        ("slurm", "prepare", "a.b=1", "--config", RUN, "c.d=2", "--cluster", "c.yaml", "e.f=3"),
    ],
    ids=lambda command: " ".join(word for word in command[:2] if "=" not in word),
)
def test_overrides_on_both_sides_of_options(command):
    assert build_parser().parse_args(command).overrides == ["a.b=1", "c.d=2", "e.f=3"]


@pytest.mark.parametrize("command", ["train", "estimate", "prepare-data", "train-tokenizer"])
def test_missing_config_option(refused, command):
    assert "the following arguments are required: --config" in refused(2, command)


@pytest.mark.parametrize("command", ["train", "estimate", "prepare-data", "train-tokenizer"])
def test_config_file_that_is_not_there(refused, command):
    said = refused(2, command, "--config", "nowhere.yaml")
    assert said.startswith("loopmem: error: the config file nowhere.yaml cannot be read: No such file or directory")
    assert "\n  what to do: " in said


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_misspelt_key_on_the_command_line(refused, command):
    said = refused(2, command, "--config", RUN, "training.train_step=5")
    assert "command line: training.train_step: unknown key; did you mean train_steps?" in said


@pytest.mark.parametrize("command", ["prepare-data", "train-tokenizer"])
def test_misspelt_key_of_a_recipe(refused, command):
    said = refused(2, command, "--config", RECIPE, "shard_token=5")
    assert "command line: shard_token: unknown key; did you mean shard_tokens?" in said


def test_misspelt_key_in_the_file(refused, tmp_path):
    (tmp_path / "run.yaml").write_text(f"base: {RUN}\nmodle:\n  max_loops: 2\n")
    said = refused(2, "train", "--config", str(tmp_path / "run.yaml"))
    assert "run.yaml:2:1: modle: unknown key; did you mean model?" in said


def test_override_without_a_value(refused):
    said = refused(2, "train", "--config", RUN, "train_steps")
    assert "command line: 'train_steps' is not of the form key=value" in said


def test_a_file_of_another_kind(refused):
    recipe, run, speeds = "the preparation of data", "a run (", "how fast a cluster is"
    assert f"{RECIPE} describes {recipe}" in refused(2, "train", "--config", RECIPE)
    assert f"{RUN} describes {run}" in refused(2, "prepare-data", "--config", RUN, "output_dir=x")
    words = ("slurm", "render", "--config", RUN, "--nodes", "1", "--cluster", "configs/cluster/h100.yaml")
    said = refused(2, *words)
    assert f"h100.yaml describes {speeds}" in said and "not how a site runs jobs" in said


@pytest.mark.parametrize("ranks", ["0", "-1"])
def test_number_of_ranks_that_cannot_be(refused, ranks):
    assert f"--ranks {ranks} is not valid" in refused(2, "train", "--config", RUN, "--ranks", ranks)


def test_ranks_that_are_no_number(refused):
    assert "argument --ranks: invalid int value: 'two'" in refused(2, "train", "--config", RUN, "--ranks", "two")


def test_bad_config_is_said_once_for_all_ranks(refused):
    said = refused(2, "train", "--config", RUN, "--ranks", "2", "optimizer.lr=-1")
    assert said.count("optimizer.lr: must be greater than 0 (got -1)") == 1


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("eval",)])
def test_a_rule_without_a_threshold(refused, command):
    said = refused(2, *command, "runs/demo", "--exit-rule", "confidence")
    assert "--exit-rule is about --exit-threshold" in said


def test_generate_without_a_prompt(refused):
    assert "the following arguments are required: --prompt" in refused(2, "generate", "runs/demo")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--prompt", "a b\udcff", r"the prompt is not UTF-8 text: '\udcff' at character 4"),
        ("--seed", str(2**64), f"seed {2**64} does not fit into 64 bits"),
        ("--temperature", "1e300", "temperature 1e+300 is not valid"),
        ("--top-k", "0", "top_k 0 is not valid"),
        ("--max-new-tokens", "0", "max_new_tokens 0 is not valid"),
        ("--device", "tpu7x", "device 'tpu7x' is not known"),
        ("--save", ".", ". is a folder"),
    ],
)
def test_generate_refuses_before_it_opens_a_model(refused, option, value, said):
    assert said in refused(2, "generate", "nowhere", "--prompt", "a", option, value)


def test_generate_says_its_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("(default: 100, or as many as", "(default: 0.8)", "(default: 50)", "(default: 0)", "(default: cpu)"):
        assert words in said


@pytest.mark.parametrize("command", [("eval", "nowhere"), ("report", "nowhere")])
def test_a_place_to_write_to_is_looked_at_first(refused, tmp_path, command):
    assert f"{tmp_path} is a folder" in refused(2, *command, "--out", str(tmp_path))
    (tmp_path / "file").touch()
    said = refused(6, *command, "--out", str(tmp_path / "file" / "out.json"))
    assert f"cannot write {tmp_path / 'file'}" in said and "tmp-" not in said


def test_a_terminal_that_lacks_a_character(tmp_path, monkeypatch):
    run = tmp_path / "\u00fc"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert main(["report", str(run)]) == 0
    assert screen.getvalue().decode() == f"{tmp_path}/?/report.html\n"


def test_convert_without_a_destination(refused):
    assert "the following arguments are required: OUT" in refused(2, "convert", "runs/demo")


def test_convert_to_an_unknown_type(refused):
    assert "invalid choice: 'float16'" in refused(2, "convert", "runs/demo", "out", "--dtype", "float16")


@pytest.mark.parametrize(
    "command",
    [
        ("plot", "nowhere", "out"),
        ("report", "nowhere"),
        ("convert", "nowhere", "out"),
        ("generate", "nowhere", "--prompt", "Once"),
        ("eval", "nowhere"),
        ("checkpoint", "list", "nowhere"),
        ("checkpoint", "show", "nowhere"),
        ("checkpoint", "verify", "nowhere"),
        ("checkpoint", "reshape", "nowhere"),
        ("slurm", "status", "nowhere"),
        ("slurm", "logs", "nowhere"),
        ("slurm", "stop", "nowhere"),
    ],
    ids=lambda command: " ".join(command[: command.index("nowhere")]),
)
def test_run_that_is_not_there(refused, command):
    assert "nowhere: no such folder\n  what to do: give " in refused(2, *command)


def test_eval_on_files_and_on_prepared_data(refused):
    said = refused(2, "eval", "runs/demo", "--text", "a.txt", "--data", "tokens")
    assert "argument --data: not allowed with argument --text" in said


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--seed", "0"), "--seed: only tasks ask for that"),
        (("--limit", "3", "--data-dir", "items"), "--data-dir, --limit: only tasks ask for that"),
        (("--text-field", "body"), "--text-field is about the files of --text"),
    ],
)
def test_eval_refuses_options_without_effect(refused, options, problem):
    assert problem in refused(2, "eval", "nowhere", *options)


def test_demo_outside_of_the_repository(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(2, "demo")
    assert "data_prep/demo.yaml is not here" in said and "from the root of the repository" in said


def test_errors_of_other_ranks_say_which(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["estimate", "--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("loopmem (rank 3): error: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"loopmem {__version__}\n"


def test_help_lists_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(command in text for command in COMMANDS)
    assert "2 config or usage, 3 data, 4 checkpoint" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    described = capsys.readouterr().out.split("\n\n")[1]
    assert described.strip().endswith("."), "a sentence says what it does"


def test_estimate_prints_the_parameters(capsys):
    assert main(["estimate", "--config", str(ROOT / "configs" / "paper" / "m_3.yaml")]) == 0
    assert re.search(r"^parameters +210,243,900$", capsys.readouterr().out, re.MULTILINE)


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "loopmem_pretrain", "train", "--config", "nowhere.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.startswith("loopmem: error: the config file nowhere.yaml")


@pytest.mark.parametrize("buffered", [False, True])
def test_reader_that_went_away(buffered):
    """`loopmem estimate ... | head -0`: nothing is wrong, so nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-m", "loopmem_pretrain", "estimate", "--config", RUN]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_restarts_need_a_parent(refused):
    assert "--max-restarts needs --ranks" in refused(2, "train", "--config", RUN, "--max-restarts", "2")


def test_ranks_are_not_started_by_a_rank(refused, monkeypatch):
    """As a launcher's rank it would train alone, or as one of many, where N ranks were asked for."""
    monkeypatch.setenv("RANK", "0")
    assert "--ranks 2 starts ranks, and RANK=0 says" in refused(2, "train", "--config", RUN, "--ranks", "2")


def test_restarts_below_0(refused):
    assert "--max-restarts -1 is not valid" in refused(2, "train", "--config", RUN, "--ranks=2", "--max-restarts=-1")
