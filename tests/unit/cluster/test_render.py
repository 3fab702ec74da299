"""Job scripts: what is filled into a template, what is refused, and that plans add up. Without SLURM."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loopmem_pretrain.cli import main
from loopmem_pretrain.cluster import prepare
from loopmem_pretrain.cluster.other_jobs import TaskJob, one_task
from loopmem_pretrain.cluster.render import (
    container_settings,
    gpu_options,
    render,
    site_options,
    site_setup,
)
from loopmem_pretrain.cluster.submit import Request, freeze, plan, warning_seconds
from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.site import SiteConfig
from loopmem_pretrain.errors import ConfigError, EnvironmentFault
from loopmem_pretrain.training.run_folder import git_commit
from tests.configs import tiny_run

ROOT = Path(__file__).parents[3]
SITES = sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
PRETRAIN = (ROOT / "slurm" / "pretrain.sbatch").read_text()


def site(**fields):
    values = {"name": "test", "gpus_per_node": 8, "cpus_per_node": 96, "shared_folders": ("/",), **fields}
    return SiteConfig.model_validate(values)


def request(tmp_path, overrides=(), nodes=1, of=None, **fields):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_run(tmp_path / "run", "data")))
    return Request(config=str(config), overrides=overrides, site=of or site(), nodes=nodes, **fields)


def options_of(script):
    pairs = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE)
    assert len({name for name, _ in pairs}) == len(pairs), "an option twice"
    return dict(pairs)


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_every_site_loads_and_gives_options(path):
    options = site_options(load_config(SiteConfig, path)) | gpu_options(load_config(SiteConfig, path))
    assert list(options.values()).count(None) == 2, "one of three ways to ask for GPUs"


@pytest.mark.parametrize("path", [*TEMPLATES, ROOT / "slurm" / "chain.sh"], ids=lambda path: path.name)
def test_templates_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_nothing_given_nothing_changed_but_the_place_of_the_site(path):
    template = path.read_text()
    lines = difflib.ndiff(template.splitlines(), render(template, {}, {}).splitlines())
    changes = [line for line in lines if line[0] in "+-"]
    assert changes == ["- # Here go the modules and variables of your cluster."]


def test_values_are_filled_in_and_quoted(tmp_path):
    """The script is run by bash with a stand-in for Python that prints its arguments."""
    show = tmp_path / "show"
    show.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    show.chmod(0o755)
    nasty = "a b'c\"d$(touch /tmp/never)`x`;\\"
    script = render(
        PRETRAIN,
        {"nodes": "3", "gres": "gpu:8", "gpus-per-node": None},
        {"PYTHON": str(show), "CONFIG": nasty, "RUN_DIR": "/r n"},
        [],
        ["k=v w"],
    )
    said = subprocess.run(["bash", "-c", script, "job", "last one"], capture_output=True, text=True, check=True).stdout
    assert f"<--config><{nasty}><--run-dir></r n>" in said
    assert said.endswith("<--><k=v w><last one>")
    options = options_of(script)
    assert options["nodes"] == "3" and options["gres"] == "gpu:8" and "gpus-per-node" not in options


@pytest.mark.parametrize("value", ["a\n#SBATCH --nodes=9", 'a"b', "a'b", "a#b"])
def test_what_cannot_stand_in_an_sbatch_line_is_refused(value):
    with pytest.raises(ConfigError, match="--job-name="):
        render(PRETRAIN, {"job-name": value}, {})


def test_a_setting_that_the_template_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="NO_SUCH"):
        render(PRETRAIN, {}, {"NO_SUCH": "1"})


def test_variables_come_with_their_reasons(tmp_path):
    (tmp_path / "site.yaml").write_text(
        "{name: test, gpus_per_node: 8, cpus_per_node: 96, modules: [CUDA/12],"
        " environment: [{name: NCCL_IB_HCA, value: mlx5 $x, reason: the fast ports}]}"
    )
    lines = site_setup(load_config(SiteConfig, tmp_path / "site.yaml"))
    assert lines == ["# test", "module load CUDA/12", "# the fast ports", "export NCCL_IB_HCA='mlx5 $x'"]


def test_containers_stay_around_the_ranks_only():
    box = {"kind": "apptainer", "image": "my image.sif", "mounts": ("/data",)}
    apptainer = container_settings(site(container=box), ["/run"], Path("/run/code"))
    assert apptainer == {"RANK_PYTHON": "python3", "WRAP": "apptainer exec --nv --bind=/data,/run 'my image.sif'"}
    pyxis = container_settings(site(container={**box, "kind": "pyxis"}), ["/run"], Path("/run/code"))
    mounts = "--container-mounts=/data:/data,/run:/run --container-workdir=/run/code"
    assert pyxis["SRUN_OPTIONS"] == f"'--container-image=my image.sif' {mounts}"


def test_a_percent_sign_in_a_folder_is_no_pattern(tmp_path):
    """Of the logs of all jobs; tests/slurm has one written."""
    folder, recipe = tmp_path / "50%j", tmp_path / "recipe.yaml"
    of = request(tmp_path, [f"run_dir={folder}", "training.micro_batch_size=1"], then=("convert", "evaluate"))
    (tmp_path / "text.txt").write_text("A text.\n")
    recipe.write_text(
        f"output_dir: {folder}\nsources: [{{paths: [{tmp_path}/text.txt], origin: made, license: none}}]\n"
        f"tokenizer: {{path: {tmp_path}/none, train: {{vocab_size: 320}}}}\n"
    )
    scripts = {**plan(of).scripts, **prepare.plan(str(recipe), [], site(), 2).scripts}
    names = [Path(options_of(script)["output"]).relative_to(f"{tmp_path}/50%%j") for script in scripts.values()]
    logs = ["logs/job-%j.out", "logs/convert-%j.out", "logs/evaluate-%j.out"]
    assert [*map(str, names)] == [*logs, "slurm/train_tokenizer-%j.out", "slurm/prepare_data-%A_%a.out"]


def test_what_is_frozen_knows_its_commit(tmp_path):
    freeze(tmp_path / "code", "config.yaml", "a: 1\n")
    assert (tmp_path / "code" / "config.yaml").read_text() == "a: 1\n"
    code = "from loopmem_pretrain.training import run_folder; print(run_folder.__file__, run_folder.git_commit())"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
    said = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert said == [f"{tmp_path}/code/loopmem_pretrain/training/run_folder.py", str(git_commit())]


def followers(tmp_path, **fields):
    """Scripts of what waits for a run on GPUs."""
    of = site(partition="gpu", account="me", qos="long", constraint="h100", **fields)
    overrides = ["training.micro_batch_size=1", "training.device=auto"]
    return plan(request(tmp_path, overrides, of=of, then=("evaluate", "convert"))).scripts


def test_what_follows_has_the_values_of_site_and_run(tmp_path):
    scripts = followers(tmp_path, other_jobs={"partition": "cpu", "memory": "9G"}, modules=("CUDA/12",), time="3:00:00")
    assert [*scripts] == ["pretrain", "convert", "evaluate"]
    convert, evaluate = options_of(scripts["convert"]), options_of(scripts["evaluate"])
    assert convert["partition"] == "cpu" and convert["account"] == "me" and not {"qos", "constraint"} & {*convert}
    assert evaluate["partition"] == "gpu" and evaluate["qos"] == "long" and evaluate["constraint"] == "h100"
    assert "gpus-per-node" not in convert and evaluate["gpus-per-node"] == "1"
    assert (convert["cpus-per-task"], evaluate["cpus-per-task"]) == ("8", "12")
    for task, options in (("convert", convert), ("evaluate", evaluate)):
        assert options["mem"] == "9G" and options["time"] == "3:00:00"
        assert options["output"] == f"{tmp_path}/run/logs/{task}-%j.out"
        assert options["chdir"] == options_of(scripts["pretrain"])["chdir"]
        assert "module load CUDA/12" in scripts[task] and f"{tmp_path}/run" in scripts[task]
        assert ":-" not in scripts[task] and ":?" not in scripts[task], "the environment of sbatch decides nothing"
    assert f"OUT={tmp_path}/run/hf" in scripts["convert"] and "DEVICE=cuda" in scripts["evaluate"]


@pytest.mark.parametrize(
    ("gpu_request", "option"), [("gres", "gres=gpu:1"), ("gpus-per-task", "gpus-per-task=1")], ids=str
)
def test_an_evaluation_asks_for_one_gpu_as_the_site_does(tmp_path, gpu_request, option):
    script = followers(tmp_path, gpu_request=gpu_request)["evaluate"]
    assert f"#SBATCH --{option}\n" in script and "#SBATCH --gpus-per-node" not in script


def test_an_evaluation_without_gpus(tmp_path):
    script = followers(tmp_path, gpus_per_node=0)["evaluate"]
    assert "DEVICE=cpu" in script and "#SBATCH --gpus-per" not in script


@pytest.mark.parametrize(
    ("kind", "task", "words"),
    [
        ("apptainer", "convert", "<exec><--bind=/d,{run}><my image>"),
        ("apptainer", "evaluate", "<exec><--nv><--bind=/d,{run}><my image>"),
        (
            "pyxis",
            "evaluate",
            "<--export=ALL><--cpus-per-task=12><--container-image=my image><--container-mounts=/d:/d,{run}:{run}>",
        ),
    ],
)
def test_what_follows_runs_in_the_container(tmp_path, kind, task, words):
    """The script is run by bash with a stand-in for apptainer and srun that prints its arguments."""
    for name in ("apptainer", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
        (tmp_path / name).chmod(0o755)
    script = followers(tmp_path, container={"kind": kind, "image": "my image", "mounts": ("/d",), "python": "/py"})[
        task
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"status": "done"}')
    command = ["bash", "-c", script, "job", "--last one"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith(words.format(run=tmp_path / "run")), said
    assert "</py><-m><loopmem_pretrain>" in said and said.endswith("<--last one>")


@pytest.mark.parametrize("name", ["convert", "evaluate"])
def test_a_run_that_is_not_done_is_neither_converted_nor_evaluated(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "status.json").write_text('{"status": "interrupted"}')
    env = {"RUN_DIR": str(tmp_path), "MODEL": str(tmp_path), "OUT": "unused", "PYTHON": "echo", "PATH": "/usr/bin:/bin"}
    command = ["bash", ROOT / "slurm" / f"{name}.sbatch"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 4 and "is not done" in result.stderr
    subprocess.run(command, env={**env, "UNFINISHED": "yes"}, check=True, stdout=subprocess.DEVNULL)


def test_128_nodes_of_8(tmp_path):
    """1024 ranks = TP 2 x PP 2 x DP 256, and every number of the script says so."""
    sizes = ["training.global_batch_size=2048", "training.micro_batch_size=2", "validation.num_samples=512"]
    sizes += ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    large = site(max_nodes=384, partition="batch", hardware=str(ROOT / "configs" / "cluster" / "h100.yaml"))
    ready = plan(request(tmp_path, sizes, nodes=128, of=large, spare_nodes=2))
    options = options_of(ready.scripts["pretrain"])
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("130", "8", "8")
    assert options["cpus-per-task"] == "12" and options["partition"] == "batch"
    assert "1,024 ranks = TP 2 x PP 2 x DP 256; 4 micro-batches a step" in ready.notes[0]
    assert "SPARE_NODES=2 " in ready.scripts["pretrain"]
    assert "${" not in ready.scripts["pretrain"], "the environment of sbatch decides nothing"
    assert any("a step is expected to take" in note for note in ready.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 3}, "global_batch_size 8"),
        ({"of": site(gpu_memory_gb=1e-6)}, "does not fit"),
        ({"of": site(max_nodes=1), "spare_nodes": 1}, "gives 1 at most"),
        ({"time": "15"}, "asked to save and stop 600 s before its end"),
        ({"overrides": ["modle.x=1"]}, "modle"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, change, said):
    overrides = [*change.pop("overrides", ()), *(["training.micro_batch_size=1"] if "nodes" not in change else [])]
    with pytest.raises(ConfigError, match=said):
        plan(request(tmp_path, overrides, **change))
    assert not (tmp_path / "run").exists()


def small(tmp_path, **fields):
    return request(tmp_path, ["training.micro_batch_size=1"], **fields)


def test_a_run_folder_that_others_do_not_see_is_refused(tmp_path):
    with pytest.raises(EnvironmentFault, match="not below /scratch"):
        plan(small(tmp_path, of=site(shared_folders=("/scratch",))))
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.split("/")[0] in ("ext2", "overlay", "tmpfs", "xfs", "btrfs"):
        with pytest.raises(EnvironmentFault, match="which other nodes do not see"):
            plan(small(tmp_path, of=site(shared_folders=())))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(EnvironmentFault, match=r"thesis\.tex"):
        plan(small(tmp_path))


@pytest.mark.parametrize("time", ["abc", "1:2:3:4", "10m", "1 00:00:00", ""])
def test_a_time_that_is_none(tmp_path, time):
    with pytest.raises(ConfigError, match=f"--time {time} is not a time") as caught:
        plan(small(tmp_path, time=time), faults=[])
    assert caught.value.fix == "write minutes, H:MM:SS or D-HH:MM:SS"


@pytest.mark.parametrize("time", ["90", "1:30:00", "2-00:00:00"])
def test_times_as_sbatch_takes_them(tmp_path, time):
    assert options_of(plan(small(tmp_path, time=time)).scripts["pretrain"])["time"] == time


def command(capsys, *words):
    """Exit code, stdout and stderr of `loopmem slurm`."""
    return main(["slurm", *map(str, words)]), *capsys.readouterr()


def test_render_prints_scripts_and_what_submit_would_refuse(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    of = tmp_path / "site.yaml"
    of.write_text("{name: test, gpus_per_node: 8, cpus_per_node: 96, shared_folders: [/], gpu_memory_gb: 1.0e-6}")
    words = ("--cluster", of, "--nodes", "1", "--config", request(tmp_path).config, "training.micro_batch_size=1")
    code, scripts, said = command(capsys, "render", *words)
    assert code == 0 and scripts.startswith("#!/bin/bash") and "#SBATCH --nodes=1" in scripts
    assert said.count("loopmem: a submission would be refused: ") == 3
    assert "the model does not fit" in said and "thesis.tex" in said and "what to do: choose another run_dir" in said
    assert "check the path to the prepared data" in said
    assert "prepared data" not in command(capsys, "render", "--after", "1234", *words)[2], "job 1234 may make them"
    code, scripts, said = command(capsys, "submit", *words)
    assert code == 2 and not scripts and "the model does not fit" in said


def test_prepare_render_prints_scripts_and_what_is_wrong_with_the_folder(tmp_path, capsys):
    of, recipe = tmp_path / "site.yaml", tmp_path / "recipe.yaml"
    of.write_text("{name: test, gpus_per_node: 8, cpus_per_node: 96, shared_folders: [/scratch]}")
    recipe.write_text(
        f"output_dir: {tmp_path}/tokens\nsources: [{{paths: [{recipe}], origin: made, license: none}}]\n"
        "tokenizer: {path: t}\n"
    )
    words = ("prepare", "--cluster", of, "--config", recipe)
    code, scripts, said = command(capsys, *words, "--render")
    assert code == 0 and scripts.startswith("#!/bin/bash") and "is not below /scratch" in said
    assert command(capsys, *words)[:2] == (6, "")


def test_the_folder_of_another_configuration_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(tiny_run(tmp_path / "run", optimizer={"lr": 0.5})))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        plan(small(tmp_path))


def test_the_warning_comes_from_what_saves_took(tmp_path):
    assert warning_seconds(tmp_path, site(warning_seconds=300)) == 300
    folder = tmp_path / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"seconds": {"copy": 20.0, "write": 100.0}}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "seconds_per_step": 4.0}\n{"step": 15, "sec\n{"step": 20, "seconds_per_step": 4.0}\n'
    )
    assert warning_seconds(tmp_path, site()) == 2 * (120 + 40) + 60


def test_no_job_of_one_task_keeps_a_whole_node(tmp_path):
    """`--exclusive` of a cluster is for nodes full of ranks."""
    for task in ("prepare_data", "convert", "evaluate"):
        job = TaskJob(task, "name", "out", tmp_path, {}, [], gpu=task == "evaluate")
        script = one_task(job, site(sbatch=("--exclusive", "--reservation=ours")))
        assert "--exclusive" not in script and "#SBATCH --reservation=ours" in script
