"""`loopmem slurm`, and every template against machines as they are: with a real SLURM."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopmem_pretrain.cluster.render import gpu_options, render
from loopmem_pretrain.cluster.submit import code_folder
from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.config.site import SiteConfig
from tests.e2e.test_training import config_for, exact
from tests.prepared import prepare_sentences
from tests.slurm.cluster import wait_for
from tests.slurm.runs import ROOT

SITE = ROOT / "slurm" / "clusters" / "local_test.yaml"
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
LARGE = {"partition": "batch"}


def test_only(cluster, template, options, site=None):
    """What SLURM says to the template of slurm/ with these options."""
    given = (
        {**gpu_options(load_config(SiteConfig, ROOT / "slurm" / "clusters" / f"{site}.yaml")), **options}
        if site
        else options
    )
    script = cluster.dir / "script"
    script.write_text(render(template.read_text(), given, {}))
    return cluster.run("sbatch", "--test-only", script, check=False)


test_only.__test__ = False


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_are_accepted_by_a_large_machine(cluster, template):
    assert "to start at" in test_only(cluster, template, LARGE)
    assert "to start at" in test_only(cluster, template, {**LARGE, "array": "1-100%10"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"nodes": "128", "ntasks-per-node": "8", "cpus-per-task": "12"},
            "using 12288 processors on nodes h[0001-0128]",
        ),
        ({"nodes": "385"}, "Node count specification invalid"),
        ({"time": "25:00:00"}, "Requested time limit is invalid"),
        ({"partition": "devel", "time": "03:00:00"}, "Requested time limit is invalid"),
        ({"ntasks-per-node": "8", "cpus-per-task": "13"}, "not available"),
        ({"gpus-per-node": "9"}, "not available"),
        ({"partition": "nowhere"}, "invalid partition"),
        ({"signal": "B:NONSENSE@60"}, "Invalid --signal"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_a_large_machine_takes_and_refuses(cluster, options, said):
    answer = test_only(cluster, ROOT / "slurm" / "pretrain.sbatch", {**LARGE, **options}, "h100_infiniband")
    assert said in answer, answer


class Shell:
    """`loopmem slurm` on the login node of the cluster."""

    def __init__(self, cluster, folder: Path, data: Path, **training) -> None:
        self.cluster, self.run_dir = cluster, folder / "my run"
        self.config = folder / "config.yaml"
        sections = {"training": training, "logging": {"interval_steps": 1}, "checkpoint": {"interval_steps": 5}}
        self.config.write_text(dump_config(config_for(self.run_dir, data, **sections)))

    def __call__(self, *words, check=True):
        return self.cluster.run(sys.executable, "-m", "loopmem_pretrain", "slurm", *words, check=check)

    def request(self, verb, *more, nodes=2, site=SITE):
        options = ("--cluster", site, "--nodes", nodes, "--health", "none", *more)
        return self(verb, *options, "--config", self.config, "training.micro_batch_size=1", check=False)


@pytest.fixture
def shell(cluster, tmp_path, sentences):
    return Shell(cluster, tmp_path, sentences)


def test_what_is_refused_leaves_nothing_behind(shell):
    assert "global_batch_size" in shell.request("submit", nodes=3)
    answer = shell.request("submit", "--spare-nodes", "3")
    assert "SLURM refuses the job" in answer, answer
    assert "--after 4711: SLURM does not know that job" in shell.request("submit", "--after", "4711")
    assert not shell.run_dir.exists()
    assert shell.cluster.run("squeue", "-h") == ""


def test_a_later_submission_leaves_what_an_earlier_one_has_frozen(shell, tmp_path):
    """Jobs that are held, in a folder whose name looks like a pattern of sbatch."""
    site, run_dir = tmp_path / "site.yaml", tmp_path / "50%j"
    site.write_text(f"{SITE.read_text()}sbatch: [--hold]\n")
    words = (
        "submit",
        "--cluster",
        site,
        "--nodes",
        2,
        "--health",
        "none",
        "--config",
        shell.config,
        f"run_dir={run_dir}",
    )
    shell(*words, "training.micro_batch_size=1")
    (job,) = shell.cluster.run("squeue", "-h", "-o", "%i").split()
    (code,) = (run_dir / "slurm").glob("code-*")
    frozen = (code / "config.yaml").read_text()
    assert f"CONFIG={code}/config.yaml" in (run_dir / "slurm" / "pretrain.sbatch").read_text()
    wait_for(lambda: not code_folder(run_dir / "slurm").exists(), 5)
    shell(*words, "training.micro_batch_size=2")
    assert len([*(run_dir / "slurm").glob("code-*")]) == 2
    assert (code / "config.yaml").read_text() == frozen and "micro_batch_size: 1\n" in frozen
    shell.cluster.run("scontrol", "release", job)
    log = run_dir / "logs" / f"job-{job}.out"
    wait_for(lambda: log.exists() and "4 ranks on" in log.read_text(), 60, lambda: str([*run_dir.glob("logs/*")]))
    assert f"--config {code}/config.yaml" in log.read_text()


FOLLOWERS = ("--then", "evaluate", "--then", "convert")


def test_what_cannot_follow_is_refused_and_nothing_is_submitted(shell, tmp_path):
    assert "invalid choice: 'plot'" in shell.request("submit", "--then", "plot")
    assert "its end need not be the end of the run" in shell.request("submit", *FOLLOWERS, "--continue", "chain")
    site = tmp_path / "site.yaml"
    site.write_text(SITE.read_text().replace("{memory: 1G}", "{memory: 1G, partition: devel, time: '3:00:00'}"))
    answer = shell.request("submit", *FOLLOWERS, site=site)
    assert "SLURM refuses the job (convert.sbatch)" in answer and "time limit is invalid" in answer, answer
    assert not shell.run_dir.exists()
    assert shell.cluster.run("squeue", "-h") == ""


IN_TURN = (
    *(sys.executable, "-c"),
    "import pathlib, sys\nfrom loopmem_pretrain.cluster.other_jobs import submit_in_turn\n"
    "print(*submit_in_turn([*map(pathlib.Path, sys.argv[1:])]))",
)
"""`submit_in_turn` of the scripts that follow."""


def test_the_lines_of_a_script_count_not_what_a_user_has_set(cluster, tmp_path):
    """sbatch itself would take the variables."""
    lines = ["#!/bin/bash", "#SBATCH --time=7", "#SBATCH --mem=5M", "#SBATCH --requeue", "#SBATCH --output=/dev/null"]
    (tmp_path / "script").write_text("\n".join([*lines, "sleep 600\n"]))
    set_by_user = {"TIMELIMIT": 3, "MEM_PER_CPU": "2M", "NO_REQUEUE": 1, "WAIT": 1, "GRES": "gpu:1"}
    variables = {f"SBATCH_{name}": value for name, value in set_by_user.items()}
    job = cluster.run(*IN_TURN, tmp_path / "script", PYTHONPATH=ROOT, **variables)
    shown = cluster.show(job)
    assert (shown["TimeLimit"], shown["MinMemoryNode"], shown["Requeue"]) == ("00:07:00", "5M", "1")
    assert shown["TresPerNode"] == "gres:gpu:1", "the script says nothing about it"


def test_when_a_job_ends_whatever_the_user_likes_to_see(cluster):
    code = "import sys, time\nfrom loopmem_pretrain.cluster import slurm\njob = sys.argv[1]\n"
    code += "print(slurm.end_time(job) - time.time(), slurm.is_running(job))"
    job = cluster.sbatch("--output=/dev/null", "--time=5", "--wrap=sleep 100")
    cluster.wait(job, "RUNNING", seconds=20)
    liked = {"SLURM_TIME_FORMAT": "relative", "SQUEUE_STATES": "PENDING"}
    left, running = cluster.run(sys.executable, "-c", code, job, PYTHONPATH=ROOT, **liked).split()
    assert 200 < float(left) <= 301 and running == "True"


def test_a_submission_that_fails_takes_back_those_before_it(cluster, tmp_path):
    (tmp_path / "waits.sbatch").write_text("#!/bin/bash\nsleep 600\n")
    scripts = [tmp_path / "waits.sbatch", tmp_path / "waits.sbatch", tmp_path / "gone.sbatch"]
    said = cluster.run(*IN_TURN, *scripts, PYTHONPATH=ROOT, SBATCH_OUTPUT="/dev/null", check=False)
    jobs = re.search(r"submitted before it, now cancelled: (\d+), (\d+)", said)
    assert jobs and "gone.sbatch" in said, said
    assert [cluster.wait(job, seconds=30) for job in jobs.groups()] == ["CANCELLED", "CANCELLED"]


def recipe_of_two_files(tmp_path) -> Path:
    """Text in two files, to be prepared into tmp_path/tokens with a tokenizer that is trained on both."""
    for number in range(2):
        prepare_sentences(tmp_path / f"text {number}", documents=300, seed=number)
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/tokens\nvalidation_fraction: 0.1\n"
        f"sources: [{{paths: ['{tmp_path}/text */text.jsonl'], origin: made, license: none}}]\n"
        f"tokenizer: {{path: {tmp_path}/tokenizer, train: {{vocab_size: 320}}}}\n"
    )
    return tmp_path / "recipe.yaml"


def reading_both(config, tmp_path):
    """The configuration of a run that reads the two parts."""
    parts = [{"path": f"{tmp_path}/tokens/part-0000{number}"} for number in (1, 2)]
    datasets = tuple(type(config.data.datasets[0])(**part) for part in parts)
    return config.model_copy(update={"data": config.data.model_copy(update={"datasets": datasets})})


def test_what_cannot_be_prepared_by_an_array_is_refused(shell, tmp_path):
    recipe = recipe_of_two_files(tmp_path)
    ask = lambda *more: shell("prepare", "--cluster", SITE, "--config", recipe, *more, check=False)  # noqa: E731
    assert "--array 0 is not valid" in ask("--array", 0)
    assert "counted in each element" in ask("--array", 2, "sources.0.max_documents=5")
    assert "no such file" in ask("--array", 2, "sources.0.paths=[nowhere.txt]")
    rendered = ask("--array", 2, "--render")
    assert rendered.count("#!/bin/bash") == 2 and "#SBATCH --array=1-2%2" in rendered, rendered
    assert "TASK=train-tokenizer" in rendered and "TASK=prepare-data" in rendered
    assert not (tmp_path / "tokens").exists()
    (tmp_path / "tokens" / "slurm").mkdir(parents=True)
    (tmp_path / "tokens" / "slurm" / "inputs.txt").write_text("another.jsonl\n")
    assert "are of other files" in ask("--array", 2)
    assert shell.cluster.run("squeue", "-h") == ""


@pytest.mark.slow
def test_data_training_with_a_requeue_conversion_and_evaluation(cluster, tmp_path):
    """Tokenizer, data in an array of two, and what waits for them: each job begins when the one before is done."""
    shell = Shell(cluster, tmp_path, tmp_path, train_steps=60)
    shell.config.write_text(dump_config(reading_both(load_config(RunConfig, shell.config), tmp_path)))
    said = shell("prepare", "--cluster", SITE, "--config", recipe_of_two_files(tmp_path), "--array", "2")
    preparation = re.findall(r"\bjob (\d+)", said)
    assert len(preparation) == 2 and f"--after {preparation[1]}" in said and said.count("tokens/part-0000") == 2, said
    said = shell.request("submit", "--after", preparation[1], *FOLLOWERS)
    training, conversion, evaluation = jobs = re.findall(r"\bjob (\d+)", said)
    assert f"when the run is done: convert, job {conversion}, then evaluate, job {evaluation}" in said
    metrics = shell.run_dir / "metrics.jsonl"
    logs = lambda: "\n".join(path.read_text()[-1500:] for path in tmp_path.glob("*/**/*.out"))  # noqa: E731
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 240, logs)
    assert f"job {conversion}: convert PENDING" in shell("status", shell.run_dir)
    cluster.run("scancel", "--signal=USR1", "--batch", training)
    states = [cluster.wait(job, seconds=240) for job in jobs]
    assert states == ["COMPLETED"] * 3, logs()
    assert "1 interrupted, 1 done" in shell("status", shell.run_dir)
    assert (shell.run_dir / "hf" / "model.safetensors").exists()
    assert json.loads((shell.run_dir / "evaluation.json").read_text())["device"] == "cpu"
    assert "hf, which is there" in shell.request("submit", "--then", "convert")
    # what is frozen can be submitted again, with more options
    frozen = shell.run_dir / "slurm"
    assert (frozen / "convert.sbatch").exists()
    more = cluster.sbatch(frozen / "evaluate.sbatch", "--num-loops", "1", "2")
    assert cluster.wait(more, seconds=120) == "COMPLETED", logs()
    assert len(json.loads((shell.run_dir / "evaluation.json").read_text())["domains"][0]["scores"]) == 2


@pytest.mark.slow
def test_a_run_from_submit_to_its_summary(shell):
    said = shell.request("submit")
    assert "4 ranks = TP 1 x PP 1 x DP 4; 2 micro-batches a step" in said
    job = shell.cluster.run("squeue", "-h", "-o", "%i")
    frozen = shell.run_dir / "slurm"
    (code,) = frozen.glob("code-*")
    assert f'--chdir="{code}"' in (frozen / "pretrain.sbatch").read_text()
    assert (code / "loopmem_pretrain" / "cli.py").exists()
    without_time = [
        re.sub(r"code-\w+", "code", text)
        for text in ((frozen / "pretrain.sbatch").read_text(), shell.request("render"))
    ]
    assert without_time[0].strip() in without_time[1]
    assert f"'{shell.run_dir}'" in (frozen / "pretrain.sbatch").read_text(), "a blank in the name"
    assert shell.cluster.wait(job, seconds=240) == "COMPLETED", shell("status", shell.run_dir)
    status = shell("status", shell.run_dir)
    assert "done, all steps trained" in status and "1 start, " in status and "1 done" in status
    assert "step" in shell("logs", shell.run_dir) and "rank-00003" in str(list(shell.run_dir.glob("logs/*/*")))
    assert exact(shell.run_dir)[-1]["step"] == 20
    environment = json.loads((shell.run_dir / "logs" / f"{job}.0" / "environment.json").read_text())
    assert environment["nodes"] == ["node1", "node2"] and "SLURM_JOB_ID" in environment["environment"]


@pytest.mark.slow
def test_stop_and_cancel(cluster, tmp_path, sentences):
    shell = Shell(cluster, tmp_path, sentences, train_steps=2000)
    job, conversion, evaluation = re.findall(r"\bjob (\d+)", shell.request("submit", *FOLLOWERS))
    metrics = shell.run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 120, "the first steps")
    assert "remove the file to let it start again" in shell("stop", shell.run_dir)
    assert cluster.wait(job, seconds=60) == "COMPLETED"
    assert cluster.wait(conversion, seconds=30) == "FAILED", "the run is not done"
    assert "is not done" in (shell.run_dir / "logs" / f"convert-{conversion}.out").read_text()
    assert cluster.wait(evaluation, seconds=30) == "CANCELLED"
    status = json.loads((shell.run_dir / "status.json").read_text())
    assert status["status"] == "interrupted" and status["reason"].endswith("STOP")
    (shell.run_dir / "STOP").unlink()
    shell.request("submit", "--continue", "chain")
    wait_for(lambda: len(cluster.run("squeue", "-h").splitlines()) == 2, 60, "the job and the next one")
    assert shell("cancel", shell.run_dir).startswith("cancelled ")
    wait_for(lambda: cluster.run("squeue", "-h") == "", 60, "an empty queue")


@pytest.mark.slow
def test_the_whole_chain(cluster, tmp_path):
    """Tokenizer, data in an array of two, training, conversion, evaluation: each job waits for the one before."""
    recipe = recipe_of_two_files(tmp_path)
    (tmp_path / "inputs").write_text("".join(f"{tmp_path}/text {number}/text.jsonl\n" for number in range(2)))
    config = config_for(tmp_path / "run", "unused", training={"train_steps": 6})
    (tmp_path / "config.yaml").write_text(dump_config(reading_both(config, tmp_path)))
    small = f"--mem=1G --cpus-per-task=1 --time=10 --output={tmp_path}/%x-%j.out"
    values = {
        "RECIPE": recipe, "INPUTS": tmp_path / "inputs", "OUTPUT": tmp_path / "tokens",
        "CONFIG": tmp_path / "config.yaml", "RUN_DIR": tmp_path / "run", "OUT": tmp_path / "hf",
        "PYTHON": sys.executable, "OMP_NUM_THREADS": 1, "HEALTH": "none", "DEVICE": "cpu",
        "TRAIN_OPTIONS": f"{small} --nodes=2 --ntasks-per-node=1 --gpus-per-node=1",
        **{f"{name}_OPTIONS": small for name in ("PREPARE", "CONVERT", "EVALUATE")},
    }  # fmt: skip
    said = cluster.run(ROOT / "slurm" / "chain.sh", **values)
    jobs = [word.strip(",") for word in said.split()[1::2]]
    assert len(jobs) == 5, said
    logs = lambda: "\n".join(path.read_text()[-1500:] for path in tmp_path.glob("*.out"))  # noqa: E731
    assert cluster.wait(jobs[-1], seconds=300) == "COMPLETED", logs()
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    failing = cluster.run(ROOT / "slurm" / "chain.sh", **{**values, "RECIPE": tmp_path / "nowhere.yaml"})
    last = failing.split()[-1]
    assert cluster.wait(last, seconds=120) == "CANCELLED", "what waits for a job that failed is taken out"


def test_chain_has_an_element_for_the_last_line_too(cluster, tmp_path):
    """Also where it does not end."""
    (tmp_path / "inputs").write_text("a\nb\nc")
    held = f"--hold --output=/dev/null --chdir={tmp_path}"
    values = {f"{name}_OPTIONS": held for name in ("PREPARE", "CONVERT", "EVALUATE")}
    values |= dict.fromkeys(("RECIPE", "OUTPUT", "CONFIG", "RUN_DIR", "OUT"), "x")
    values |= {"INPUTS": tmp_path / "inputs", "TRAIN_OPTIONS": f"{held} --gpus-per-node=2 --ntasks-per-node=2"}
    said = cluster.run(ROOT / "slurm" / "chain.sh", **values)
    assert cluster.show(said.split()[3].strip(","))["ArrayTaskId"] == "1-3", said


def test_chain_leaves_nothing_behind_when_a_job_is_refused(cluster, tmp_path):
    (tmp_path / "inputs").write_text("a\n")
    held = f"--hold --output=/dev/null --chdir={tmp_path}"
    values = dict.fromkeys(("RECIPE", "OUTPUT", "CONFIG", "RUN_DIR", "OUT"), "x")
    values |= {"INPUTS": tmp_path / "inputs", "PREPARE_OPTIONS": held, "TRAIN_OPTIONS": f"{held} --partition=nowhere"}
    with pytest.raises(AssertionError, match="invalid partition"):
        cluster.run(ROOT / "slurm" / "chain.sh", **values)
    assert cluster.run("squeue", "-h") == ""


def test_chain_refuses_what_it_cannot_wait_for(tmp_path):
    names = ("RECIPE", "INPUTS", "OUTPUT", "CONFIG", "RUN_DIR", "OUT")
    env = {"PATH": "/usr/bin:/bin", "CONTINUE": "chain", **dict.fromkeys(names, "x")}
    result = subprocess.run([ROOT / "slurm" / "chain.sh"], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "needs CONTINUE=requeue" in result.stderr


@pytest.mark.slow
def test_the_next_job_of_a_chain_runs_where_the_first_did(cluster, tmp_path, sentences):
    shell = Shell(cluster, tmp_path, sentences, train_steps=60)
    shell.request("submit", "--continue", "chain")
    job = cluster.run("squeue", "-h", "-o", "%i")
    metrics = shell.run_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 120, "the first steps")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait(job, seconds=60) == "COMPLETED"
    assert cluster.wait(str(int(job) + 1), seconds=120) == "COMPLETED", shell("status", shell.run_dir)
    status = shell("status", shell.run_dir)
    assert "2 starts" in status and "1 interrupted, 1 done" in status and "0 steps trained again" in status
