"""The command line as a user meets it: launchers, exit codes, messages without tracebacks."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from loopmem_pretrain.config.load import dump_config
from tests.configs import tiny_run
from tests.distributed import run_command

ROOT = Path(__file__).parents[2]
LOOPMEM = [sys.executable, "-m", "loopmem_pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def loopmem(*arguments, launcher=LOOPMEM, timeout=120, **options):
    """Run the command; its result, with a traceback counted as a failure of the test."""
    command = [str(part) for part in (*launcher, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def wait_for_metrics(run_dir: Path, seconds: float = 60) -> None:
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, f"no line in {metrics} after {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def config_file(tmp_path, sentences):
    """A short run's config; the run folder is tmp_path/run."""
    config = tiny_run(tmp_path / "run", sentences, model={"vocab_size": 320}, training={"train_steps": 6})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return path


def test_train_alone_then_nothing_is_left_to_do(tmp_path, config_file):
    result = loopmem("train", "--config", config_file)
    assert result.returncode == 0, result.stderr
    assert "train: 6/6 steps" in result.stderr
    assert re.search(r"data in \S+: [\d,]+ tokens, read \d+\.\d\d times by all steps", result.stderr), result.stderr
    assert "SEED_LAYERS" not in result.stdout + result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"
    again = run_command("train", "--config", config_file)
    assert again.returncode == 0
    assert "resumed from" in again.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([*LOOPMEM, "train", "--ranks", "2"], marks=pytest.mark.slow),  # test_restarts.py has it
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "loopmem_pretrain", "train"],
        pytest.param(
            [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", "--module", "loopmem_pretrain", "train"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ranks", "torchrun", "deepspeed"],
)  # fmt: skip
def test_two_ranks(tmp_path, config_file, launcher):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = loopmem("--config", config_file, launcher=launcher, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


def piped(command, reader):
    """Exit code of `loopmem COMMAND` when both outputs go to a reader that ends early."""
    line = f"{shlex.join([*LOOPMEM, *map(str, command)])} 2>&1 | {reader}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=120, check=False).returncode


def test_a_reader_that_goes_away_ends_no_run(tmp_path, config_file):
    assert piped(["train", "--config", config_file, "logging.interval_steps=1"], "head -1") == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path):
    assert piped(["train", "--config", tmp_path / "nowhere.yaml"], "true") == 2


def test_a_named_error_on_ranks_keeps_its_exit_code(tmp_path, config_file):
    begun = loopmem("train", "--config", config_file, "--ranks", "2", "--stop-at-step", "2")
    assert begun.returncode == 0 and "Warning" not in begun.stderr, begun.stderr
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000009\n")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    result = loopmem("train", "--config", config_file, "--ranks", "2")
    assert result.returncode == 4, result.stderr
    assert result.stderr.count("names step_00000009, which is not there") == 1
    assert "what to do" in result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_what_no_rank_could_do_is_said_before_ranks_are_started(tmp_path, config_file):
    result = loopmem("train", "--config", config_file, "--ranks", "2", "model.vocab_size=300")
    assert result.returncode == 3
    assert result.stderr.count("vocabulary smaller than a token id") == 1
    assert "(rank" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tmp_path, config_file):
    command = [*LOOPMEM, "train", "--config", str(config_file), "training.train_steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "stopped by SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"


def test_a_killed_rank_ends_the_job(tmp_path, config_file):
    command = [*LOOPMEM, "train", "--config", str(config_file), "--ranks", "2", "training.train_steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(tmp_path / "run")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6, errors
    assert "ended by signal 9" in errors
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_the_whole_path_by_command(tmp_path, config_file):
    run, out = tmp_path / "run", tmp_path / "hf"
    assert run_command("train", "--config", config_file, "logging.interval_steps=2").returncode == 0
    converted = run_command("convert", run, out)
    assert converted.returncode == 0, converted.stderr
    assert "logits differ by at most" in converted.stdout
    assert "[transformers]" not in converted.stderr, "a warning of transformers' that is of no use"
    options = ("--prompt", "the of and", "--max-new-tokens", "5", "--temperature", "0")
    written = [run_command("generate", model, *options) for model in (out, run)]
    assert [result.returncode for result in written] == [0, 0]
    assert written[0].stdout == written[1].stdout != ""
    assert run_command("report", run).returncode == 0
    assert (run / "report.html").stat().st_size > 10_000
    assert run_command("plot", run, tmp_path / "figures").returncode == 0
    assert list((tmp_path / "figures").glob("*.svg"))
    refused = run_command("convert", run, out)
    assert refused.returncode == 2
    assert str(out) in refused.stderr


@pytest.mark.slow
def test_sigterm_to_a_conversion_puts_its_temporary_files_away(tmp_path, config_file):
    """As at the end of a job's time; it holds three times the weights meanwhile."""
    assert loopmem("train", "--config", config_file).returncode == 0
    folder = tmp_path / "tmp"
    folder.mkdir()
    command = [*LOOPMEM, "convert", str(tmp_path / "run"), str(tmp_path / "out" / "hf")]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob("loopmem-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "ended by SIGTERM" in said and "Traceback" not in said
    assert not list(folder.glob("loopmem-*")) and not list(tmp_path.glob("out/*"))


def test_convert_what_is_no_run(tmp_path):
    result = run_command("convert", tmp_path, tmp_path / "hf")
    assert result.returncode == 4
    assert "holds no checkpoint" in result.stderr
    assert not (tmp_path / "hf").exists()


def test_estimate_needs_no_torch():
    code = (
        "import sys; from loopmem_pretrain.cli import main; "
        f"main(['estimate', '--config', '{ROOT}/configs/paper/m_minus_3.yaml']); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "210,243,900" in result.stdout
    assert result.stdout.endswith("False\n")


def test_a_misspelt_key_is_found_before_torch_is_imported(config_file):
    values = yaml.safe_load(config_file.read_text())
    values["training"]["train_stepz"] = 5
    config_file.write_text(yaml.safe_dump(values))
    start = time.monotonic()
    result = loopmem("train", "--config", config_file, "--ranks", "2")
    assert result.returncode == 2
    assert "did you mean train_steps?" in result.stderr
    assert f"{config_file}:" in result.stderr
    assert time.monotonic() - start < 10


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_interrupted_setup_is_not_believed(tmp_path):
    """The stamp is written last: without it, set-up starts again, and a failing index says what to do."""
    for name in ("Makefile", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.write_text("#!/bin/sh\nexit 1\n")  # a virtual environment that broke off before pip was in it
    stub.chmod(0o755)
    command = ["make", "setup", "TORCH=no-such-package==0 --no-index"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "cannot install no-such-package" in result.stdout and "run make again" in result.stdout
    assert not (tmp_path / ".venv" / ".complete").exists()
    repaired = subprocess.run([stub, "-m", "pip", "--version"], capture_output=True, check=False)
    assert repaired.returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_keeps_the_torch_that_was_asked_for(tmp_path):
    """Pinned versions that do not go with it are an error; pip would else put another torch in its place."""
    for name in ("Makefile", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "$@" >>calls.txt\n'
        'case "$*" in *" list "*) echo torch==2.99.0+cu999;; *requirements.txt*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    command = ["make", "setup", "TORCH=torch==2.99.0 --index-url https://example.invalid"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "cannot install requirements.txt beside torch==2.99.0+cu999" in result.stdout
    calls = (tmp_path / "calls.txt").read_text()
    assert calls.index("install --quiet --disable-pip-version-check torch==2.99.0 --index-url") < calls.index(
        "-r requirements.txt -c .venv/torch.txt"
    )
    assert (tmp_path / ".venv" / "torch.txt").read_text() == "torch==2.99.0+cu999\n"
    assert not re.search(r"^torch\b", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python"  # this Python, which says of itself that it is 3.10
    lie = "import sys; sys.version_info = (3, 10); sys.version = '3.10.1 x'"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{lie}; $2"\n')
    old.chmod(0o755)
    command = ["make", "setup", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "needs Python 3.11 or newer, this is 3.10.1" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_sigterm_to_the_parent_of_ranks_stops_cleanly(tmp_path, config_file):
    command = [*LOOPMEM, "train", "--config", str(config_file), "--ranks", "2", "training.train_steps=100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "stopped by SIGTERM")
    said = errors.splitlines()
    assert said.count("loopmem: SIGTERM: saving after the next line of the log") == 1
    end = f"loopmem: stopped by SIGTERM, at step {status['step']:,}; the same command continues from there"
    assert said[-1] == end and "death signal" not in errors
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_of_a_start(tmp_path, config_file, number, code):
    """Also of one that resumes: what status.json says is of the start before."""
    command = ["train", "--config", str(config_file), "--ranks", "2"]
    assert loopmem(*command, "--stop-at-step", "2").returncode == 0
    before = (tmp_path / "run" / "status.json").read_text()
    process = subprocess.Popen([*LOOPMEM, *command], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # torch's launcher loses a rank that it is about to start
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert "before the first step: nothing was trained in this start" in said and "Traceback" not in said
    assert (tmp_path / "run" / "status.json").read_text() == before


@pytest.mark.slow
def test_sigterm_to_the_demo_reaches_its_training(tmp_path, config_file):
    """With one stage in the place of all; the training saves, and no rank is left."""
    stage = ["train", "--config", str(config_file), "--ranks", "2", "training.train_steps=2000"]
    code = (
        f"import sys; from loopmem_pretrain.tools import demo; demo.stages = lambda run_dir: [('train', {stage!r})]\n"
    )
    code += "from loopmem_pretrain.cli import main; sys.exit(main(['demo']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_metrics(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "stopped by SIGTERM")


@pytest.mark.parametrize("step", ["0", "-3"])
def test_a_step_to_stop_at_that_cannot_be(config_file, step):
    result = loopmem("train", "--config", config_file, "--stop-at-step", step)
    assert result.returncode == 2
    assert f"--stop-at-step {step}" in result.stderr


def test_starting_ranks_imports_nothing_heavy_before(tmp_path, config_file):
    """The parent looks at the data, and is to be done in a moment."""
    code = (
        "import sys; from loopmem_pretrain.config.load import load_config; "
        "from loopmem_pretrain.config.run import RunConfig; from loopmem_pretrain.data.dataset import check_datasets; "
        f"check_datasets(load_config(RunConfig, {str(config_file)!r})); "
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'megatron', 'deepspeed')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]" and not said.stderr
