"""What the documents say about the code is true: symbols, files, commands, keys, codes, and their examples."""

import ast
import doctest
import re
import shlex
from pathlib import Path

import pytest

from loopmem_pretrain.cli import build_parser
from loopmem_pretrain.config.restart import MAY_CHANGE
from loopmem_pretrain.config.run import RunConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loopmem_pretrain"
BESIDE = [ROOT / folder / "README.md" for folder in (".", "slurm", "data_prep", "benchmarks")]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", *BESIDE]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

SYMBOL = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FOLDERS = "|".join(sorted(re.escape(path.name) for path in [*ROOT.iterdir(), *PACKAGE.iterdir()] if path.is_dir()))
FILE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\.(?:py|md|yaml|toml|txt|sbatch)|(?:{FOLDERS})/)(?![\w*{{])")
MADE_BY_RUNS = ("checkpoints/", "tensorboard/", "wandb/", "runs/", "build/")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def symbols_of(path: Path) -> set[str]:
    """Every class, function, method and assigned name of a file, methods and fields as Class.name."""

    def names(body: list[ast.stmt], prefix: str = ""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from names(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names(ast.parse(text_of(path)).body))


def found(name: str) -> Path | None:
    """A file or folder, named relative to the package or to the repository."""
    return next((folder / name for folder in (PACKAGE, ROOT) if (folder / name).exists()), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_symbol_named_exists(document):
    for file, symbol in SYMBOL.findall(text_of(document)):
        path = found(file)
        assert path is not None, f"{file} does not exist"
        assert symbol in symbols_of(path), f"{file} has no {symbol}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_file_named_exists(document):
    for name in FILE.findall(text_of(document)):
        assert name.startswith(MADE_BY_RUNS) or found(name), f"{name} does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_is_one_and_parses(document):
    parser = build_parser()
    text = text_of(document)
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    for name in re.findall(r"`loopmem ([a-z-]+)", text):
        assert name in commands, f"loopmem {name} is no command"
    for line in re.findall(r"^    (?:\$ )?loopmem (.*)$", text, re.MULTILINE):
        parser.parse_args(shlex.split(re.sub(r" +(#.*|\\)$", "", line)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_examples(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert doctest.testfile(str(document), module_relative=False, encoding="utf-8").failed == 0


def test_equations_name_the_main_functions():
    named = {symbol for _, symbol in SYMBOL.findall(text_of(ROOT / "docs" / "equations.md"))}
    assert {"Block.block", "LoopedLayer.one_loop", "LayerMemory.forward", "ponder_cost", "parameter_counts"} <= named


def table(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of operations.md."""
    section = re.split(r"^#+ ", OPERATIONS.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def keys_written() -> set[str]:
    """Keys of metrics.jsonl, read off the code that makes them."""
    keys = set()
    hooks = [ast.parse(text_of(PACKAGE / "training" / name)) for name in ("hooks.py", "task_hook.py")]
    for node in (node for tree in hooks for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and node.name == "_measure":
            dicts = [inner for inner in ast.walk(node) if isinstance(inner, ast.Dict)]
            keys |= {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "trainer.pending":
            keys.add(ast.literal_eval(node.slice))
    for node in ast.walk(ast.parse(text_of(PACKAGE / "training" / "metrics.py"))):
        if isinstance(node, ast.FunctionDef) and node.name in ("describe_means", "read_and_reset"):
            dicts = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
            keys |= {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}
    return keys | {"local_gate", "global_gate"}


def test_operations_explain_every_key_of_metrics_jsonl():
    assert {key for row in table("A line of metrics.jsonl") for key in re.findall(r"`(\w+)`", row[0])} == keys_written()


def test_operations_list_what_may_change_on_resume():
    listed = {key for row in table("What may change on resume") for key in re.findall(r"`([\w.*]+)`", row[0])}
    assert listed == {key + "*" if key.endswith(".") else key for key in MAY_CHANGE}


def test_what_may_change_are_fields():
    for key in MAY_CHANGE:
        section, _, field = key.partition(".")
        assert section in RunConfig.model_fields
        assert not field or field in RunConfig.model_fields[section].annotation.model_fields


def test_every_outcome_of_a_job_is_explained():
    from typing import get_args

    from loopmem_pretrain.cluster.records import Verdict

    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z ]+)` \|.*\|.*\|", text.split("## Every outcome", 1)[1], re.MULTILINE)
    assert set(rows) == set(get_args(Verdict))


def test_operations_list_every_exit_code():
    import loopmem_pretrain.errors as errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {str(kind.exit_code) for kind in kinds} | {"0", "1"}
    assert {row[0] for row in table("Exit codes")} == codes
