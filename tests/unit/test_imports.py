"""Imports go downhill, heavy packages load only where they are used, there are no cycles and no giant files.

The rules are checked over the syntax tree, imports inside functions included, and by asking fresh interpreters what
they have loaded.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "loopmem_pretrain"
ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What each package may import of ours. Downhill: errors, config, model and data, parallel, checkpoint, then hf, then
# inference and eval, then training and tools, then cli.
BASIC = {"errors", "config", "model", "data", "parallel", "checkpoint", "lock", "progress", "quiet", PACKAGE}
BASIC |= {"metrics_file", "control", "words", "alarms"}
MAY_IMPORT: dict[str, set[str]] = {
    PACKAGE: set(),
    "errors": set(),
    "quiet": set(),
    "lock": {"errors"},
    "control": {"errors"},
    "words": set(),
    "progress": {"data", "words"},
    "metrics_file": {"errors"},
    "config": {"errors"},
    "alarms": {"config"},
    "model": {"errors", "config"},
    "data": {"errors", "config", "lock", "words"},
    "parallel": {"errors", "config", "model", "words"},
    "checkpoint": {"errors", "config", "model", "data", "parallel", "lock", "control", "metrics_file", "words"},
    "training": BASIC | {"eval"},
    "hf": BASIC,
    "inference": BASIC | {"hf"},
    "eval": BASIC | {"hf", "inference"},
    "tools": BASIC | {"hf", "inference", "eval"},
    "cluster": BASIC | {"training", "tools", "arguments"},
    "arguments": set(),
    "commands": BASIC | {"training", "hf", "inference", "eval", "tools", "arguments"},
    "cli": {"errors", "commands", "cluster", "progress", PACKAGE},
    "__main__": {"cli"},
}

# Where a package of others may be imported at all; anywhere else it would be loaded by surprise.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "deepspeed": ("training/", "checkpoint/universal.py", "quiet.py"),
    "megatron.core.datasets": ("data/",),
    "megatron": ("data/", "parallel/"),
    "transformers": ("hf/", "inference/", "eval/"),
    "huggingface_hub": ("hf/",),
    "safetensors": ("hf/", "checkpoint/universal.py"),
    "datasets": ("data/",),
    "lm_eval": ("eval/",),
    "pyarrow": ("data/",),
    "sentencepiece": ("data/",),
    "tokenizers": ("data/", "hf/"),
    "wandb": ("training/loggers.py",),
    "matplotlib": ("tools/",),
    "pydantic": ("config/", "data/", "checkpoint/manifest.py"),
}
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "megatron",
    "datasets",
    "pyarrow",
    "sentencepiece",
    "wandb",
    "lm_eval",
)

# A function may reach back to a module that imports its own, when that spares everybody else a heavy import.
LATE_CYCLES = {("data.corpus", "data.hub")}  # the hub reader is one of corpus's readers and brings its row types back


class Import(NamedTuple):
    module: str
    line: int
    late: bool
    """Inside a function."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, those for type checkers only left out."""
    yield from _walk(ast.parse(path.read_text(encoding="utf-8")), late=False)


def _walk(node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _walk(other, late)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            # `from package.folder import file` imports a file, `from package.file import name` a name
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                is_file = (ROOT / full.replace(".", "/")).with_suffix(".py").is_file()
                yield Import(full if is_file else str(child.module), child.lineno, late)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, late or inside)


def ours(path: Path) -> Iterator[Import]:
    return (item for item in imports_of(path) if item.module.split(".")[0] == PACKAGE)


def unit_of(module: str) -> str:
    """loopmem_pretrain.data.corpus -> data; loopmem_pretrain -> loopmem_pretrain."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downhill(path):
    unit = unit_of(module_of(path))
    assert unit in MAY_IMPORT, f"{unit} has no place in the order yet: add it to MAY_IMPORT"
    uphill = [
        f"line {item.line}: {unit} may not import {item.module}"
        for item in ours(path)
        if unit_of(item.module) not in MAY_IMPORT[unit] | {unit}
    ]
    assert not uphill, "\n".join(uphill)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_of_others_stay_where_they_belong(path):
    misplaced = [
        f"line {item.line}: {item.module} belongs into {' or '.join(places)}"
        for item in imports_of(path)
        for package, places in ONLY_IN.items()
        if f"{item.module}.".startswith(f"{package}.") and not name_of(path).startswith(places)
    ]
    assert not misplaced, "\n".join(misplaced)


def test_the_math_imports_torch_and_the_standard_library_only():
    own = {f"{PACKAGE}.model.{name}" for name in ("backend", "memory", "decoding", "block", "loopmem")}
    for name in ("loopmem.py", "early_exit.py", "block.py", "memory.py", "decoding.py", "backend.py", "init.py"):
        modules = {item.module for item in imports_of(ROOT / PACKAGE / "model" / name)} - own
        assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == {"torch"}, name


def test_config_errors_and_cli_know_no_heavy_package_not_even_late():
    for path in FILES:
        if unit_of(module_of(path)) in ("config", "errors", "arguments", "commands", "cli", PACKAGE):
            roots = {item.module.split(".")[0] for item in imports_of(path)}
            assert not roots & set(HEAVY), name_of(path)


def test_transformers_is_imported_late_in_inference():
    for path in (ROOT / PACKAGE / "inference").glob("*.py"):
        assert all(item.late for item in imports_of(path) if item.module.split(".")[0] == "transformers"), path.name


def cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Every cycle that a depth-first walk meets."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> Iterator[list[str]]:
        if module in above:
            yield [*above[above.index(module) :], module]
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                yield from visit(other, [*above, module])
            done.add(module)

    for module in sorted(graph):
        yield from visit(module, [])


def test_no_cycles_not_even_through_functions():
    graph = {
        module_of(path): {
            item.module
            for item in ours(path)
            if not (item.late and (_short(module_of(path)), _short(item.module)) in LATE_CYCLES)
        }
        for path in FILES
    }
    assert not [" -> ".join(map(_short, cycle)) for cycle in cycles(graph)]


def test_exceptions_to_the_cycle_rule_are_still_needed():
    for first, second in LATE_CYCLES:
        path = (ROOT / PACKAGE / first.replace(".", "/")).with_suffix(".py")
        assert any(item.late and _short(item.module) == second for item in ours(path)), f"remove {first}, {second}"


def _short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def test_the_cycle_finder_finds_cycles():
    assert list(cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"]]
    assert list(cycles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}})) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_550_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 550


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_code_is_ascii(path):
    path.read_text(encoding="utf-8").encode("ascii")


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has after running `code`."""
    program = f"import sys\n{code}\nprint(chr(10) + ' '.join({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    ["import loopmem_pretrain", "from loopmem_pretrain.cli import build_parser; build_parser().format_help()"],
    ids=["import", "help"],
)
def test_package_and_help_load_nothing_but_the_standard_library(code):
    loaded = loaded_by(code)
    assert not loaded & {*HEAVY, "pydantic", "yaml", "matplotlib", "tqdm", "safetensors"}


@pytest.mark.parametrize(
    "code",
    [
        "import loopmem_pretrain.config.reference",
        "from loopmem_pretrain.cli import main; main(['estimate', '--config', 'configs/paper/m_3.yaml'])",
        "from loopmem_pretrain.cli import main; main(['train', '--config', 'configs/paper/m_3.yaml', 'modle.x=1'])",
        "from loopmem_pretrain.cli import main; main(['train', '--ranks', '2', '--config', 'nowhere.yaml'])",
        "from loopmem_pretrain.cli import main; main(['prepare-data', '--config', 'data_prep/demo.yaml', 'x=1'])",
    ],
    ids=["config", "estimate", "bad key", "no file", "bad recipe"],
)
def test_configs_are_checked_before_anything_heavy_is_loaded(code):
    assert not loaded_by(code) & set(HEAVY)


def test_what_runs_in_a_batch_script_needs_the_standard_library_only():
    """It runs outside of the container, where the package's dependencies may be missing."""
    modules = ", ".join(f"{PACKAGE}.cluster.{name}" for name in ("job", "rank", "health", "chain", "records", "slurm"))
    loaded = loaded_by(f"import {modules}")
    assert loaded - sys.stdlib_module_names <= {PACKAGE, "__main__", *loaded_by("pass")}
