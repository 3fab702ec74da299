"""Every config in the repository loads; what its comments say about it (command, ranks, parameters) is true."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from loopmem_pretrain.cli import build_parser
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems
from loopmem_pretrain.config.run import RunConfig, gradient_accumulation_steps, run_problems
from loopmem_pretrain.model.flops import parameter_counts
from tests.paper_models import PAPER

ROOT = Path(__file__).parents[3]
RUNS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "run_dir" in yaml.safe_load(p.read_text()))
RECIPES = sorted((ROOT / "data_prep").glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def command(path: Path, subcommand: str):
    """(options of loopmem, ranks) of the command in the file's header."""
    (line,) = [line for line in header(path).splitlines() if f" {subcommand} " in line and "--config" in line]
    words = shlex.split(line.removeprefix("#"))
    options = build_parser().parse_args(words[words.index(subcommand) :])
    ranks = int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else getattr(options, "ranks", 1)
    return options, ranks or 1


def load_run(path: Path, overrides=()) -> RunConfig:
    return load_config(RunConfig, path, overrides, run_problems)


def test_there_is_a_config_for_every_model_of_the_paper():
    assert {p.stem for p in RUNS if p.parent.name == "paper"} == set(PAPER)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_loads_without_problems(path):
    load_run(path)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_launch_command_names_the_file_and_its_ranks_fit(path):
    options, ranks = command(path, "train")
    assert options.config == name_of(path)
    gradient_accumulation_steps(load_run(path, options.overrides).training, ranks)


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_folders_do_not_collide(path):
    others = {load_run(other).run_dir for other in RUNS if other != path}
    assert load_run(path).run_dir not in others


@pytest.mark.parametrize("name", sorted(PAPER))
def test_parameters_of_the_papers_models(name):
    path = ROOT / "configs" / "paper" / f"{name}.yaml"
    assert parameter_counts(load_run(path).model).total == PAPER[name]
    assert f"{PAPER[name]:,} parameters" in header(path)


@pytest.mark.parametrize("path", [p for p in RUNS if p.parent.name == "paper"], ids=name_of)
def test_recipe_of_the_paper(path):
    config = load_run(path)
    tokens_per_step = config.training.global_batch_size * config.data.seq_length
    assert tokens_per_step == 360_448
    assert tokens_per_step * config.training.train_steps == 13_920_501_760
    assert (config.optimizer.lr, config.schedule.min_lr) == (2.912e-3, 2.912e-4)
    assert config.schedule.warmup_steps == 386


def test_gates_of_the_papers_memory_models():
    paper = ROOT / "configs" / "paper"
    biases = [load_run(paper / f"{name}.yaml").model.gate_init_bias for name in ("m_minus_3", "m_0", "m_3")]
    assert biases == [-3.0, 0.0, 3.0]


MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in MODELS if " M parameters" in header(p)], ids=name_of)
def test_sizes_said_in_millions_are_true(path, tmp_path):
    said = re.search(r"([\d.]+) M parameters", header(path))
    assert said is not None
    run = tmp_path / "run.yaml"
    run.write_text(f"base: ['{ROOT}/configs/train/demo.yaml', '{path}']\n")
    digits = len(said[1].partition(".")[2])
    assert f"{parameter_counts(load_run(run).model).total / 1e6:.{digits}f}" == said[1]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_data_recipe_loads_and_its_command_names_the_file(path):
    load_config(PrepareConfig, path, (), prepare_problems)
    options, _ = command(path, "prepare-data")
    assert options.config == name_of(path)
    load_config(PrepareConfig, path, options.overrides, prepare_problems)


def test_demo_model_has_room_for_the_demo_tokenizer():
    recipe = load_config(PrepareConfig, ROOT / "data_prep" / "demo.yaml", (), prepare_problems)
    run = load_run(ROOT / "configs" / "train" / "demo.yaml")
    assert recipe.tokenizer.train is not None
    assert recipe.tokenizer.train.vocab_size <= run.model.vocab_size
    assert run.data.datasets[0].path == recipe.output_dir
