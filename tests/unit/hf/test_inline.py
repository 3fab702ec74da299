"""Joining the modeling file with what it imports; every refusal on files of its own."""

import ast

import pytest

from loopmem_pretrain.errors import ConversionError
from loopmem_pretrain.hf import inline
from loopmem_pretrain.hf.inline import inline_module

HF = inline._ROOT / "hf"

MAIN = '''"""The main file.

Its docstring stays.
"""

import math

from loopmem_pretrain.math_file import double

VALUE = math.pi  # a comment


class Main:
    x = double(VALUE)
'''
PART = '''"""The part."""

import math
from collections.abc import Callable

# a rule
rule: Callable[[float], float] = math.floor


def double(x: float) -> float:
    """Twice, "quoted" \\\\ backslash."""
    return 2 * rule(x)
'''


def join(tmp_path, main=MAIN, part=PART):
    (tmp_path / "main.py").write_text(main)
    (tmp_path / "part.py").write_text(part)
    return inline_module(tmp_path / "main.py", {"loopmem_pretrain.math_file": tmp_path / "part.py"})


def refusal(tmp_path, **files):
    with pytest.raises(ConversionError) as caught:
        join(tmp_path, **files)
    assert caught.value.fix
    return caught.value.problem


def test_result_runs_and_keeps_text(tmp_path):
    text = join(tmp_path)
    space: dict = {}
    exec(compile(text, "joined", "exec"), space)
    assert space["Main"].x == 6 and space["__doc__"].startswith("The main file.")
    assert text.count("import math") == 1 and "loopmem_pretrain.math_file" not in text
    assert "# a comment" in text and "# a rule" in text and "# The part." in text
    assert text.index("def double") < text.index("class Main")


def test_same_text_every_time(tmp_path):
    assert join(tmp_path) == join(tmp_path)


def test_functions_are_not_changed(tmp_path):
    joined = {node.name: ast.dump(node) for node in ast.parse(join(tmp_path)).body if hasattr(node, "name")}
    for source in (MAIN, PART):
        for node in ast.parse(source).body:
            if hasattr(node, "name"):
                assert joined[node.name] == ast.dump(node)


def test_without_imports_of_the_package(tmp_path):
    text = join(tmp_path, main='"""Alone."""\n\nX = 1\n')
    assert text.endswith('"""Alone."""\n\n\nX = 1\n')


def test_the_real_modeling_file():
    tree = ast.parse(inline_module(HF / "modeling_loopmem.py"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert not any(module.startswith("loopmem_pretrain") for module in imported)
    assert "configuration_loopmem" in imported  # relative
    assert {"LoopMemBody", "LoopMemModel", "LoopMemForCausalLM", "LoopStats", "initialize"} <= defined


def test_the_real_configuration_file():
    text = inline_module(HF / "configuration_loopmem.py", {})
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("loopmem_pretrain" in ast.unparse(node) for node in imports)


def test_package_import_that_is_not_inlined(tmp_path):
    problem = refusal(tmp_path, main="from loopmem_pretrain.errors import LoopMemError\n")
    assert "from loopmem_pretrain.errors import LoopMemError" in problem and "not inlined" in problem


def test_package_import_inside_the_part(tmp_path):
    assert "not inlined" in refusal(tmp_path, part=PART + "\nfrom loopmem_pretrain.errors import LoopMemError\n")


def test_package_import_inside_a_function(tmp_path):
    body = "def f():\n    from loopmem_pretrain.math_file import double\n    return double\n"
    assert "not inlined" in refusal(tmp_path, main=body)


def test_whole_module_import(tmp_path):
    assert "not inlined" in refusal(tmp_path, main="import loopmem_pretrain.math_file\n")


def test_other_packages(tmp_path):
    assert "import numpy as np" in refusal(tmp_path, part=PART + "\nimport numpy as np\n")


def test_relative_import(tmp_path):
    assert "main.py:1: cannot inline a relative import" in refusal(tmp_path, main="from . import math_file\n")


def test_star_import(tmp_path):
    assert "star import" in refusal(tmp_path, main="from loopmem_pretrain.math_file import *\n")


def test_renaming_import(tmp_path):
    main = "from loopmem_pretrain.math_file import double as twice\n"
    assert "it renames" in refusal(tmp_path, main=main)


def test_name_the_part_does_not_define(tmp_path):
    main = "from loopmem_pretrain.math_file import triple\n"
    assert "does not define triple" in refusal(tmp_path, main=main)


def test_name_the_part_only_imports(tmp_path):
    main = "from loopmem_pretrain.math_file import Callable\n"
    assert "does not define Callable" in refusal(tmp_path, main=main)


def test_definitions_collide(tmp_path):
    problem = refusal(tmp_path, main=MAIN + "\ndef rule():\n    pass\n")
    assert "rule is defined by" in problem and "part.py" in problem and "main.py" in problem


def test_definition_collides_with_an_import(tmp_path):
    assert "math is defined by" in refusal(tmp_path, part=PART.replace("import math\n", "").replace("rule", "math"))


def test_imports_collide(tmp_path):
    part = PART.replace("import math", "import cmath as math")
    assert "imported twice with different meanings" in refusal(tmp_path, part=part)


def test_conditional_import_collides(tmp_path):
    part = PART + "\ntry:\n    import json as Main\nexcept ImportError:\n    pass\n"
    assert "Main is defined by" in refusal(tmp_path, part=part)


def test_shadowed_builtin(tmp_path):
    assert "a builtin" in refusal(tmp_path, part=PART + "\n\ndef sum(x):\n    return x\n")


def test_statement_on_the_line_of_an_import(tmp_path):
    assert "shares its line" in refusal(tmp_path, main=MAIN + "\nimport re; pattern = re\n")


def test_different_future_imports(tmp_path):
    part = PART.replace("import math", "from __future__ import annotations\n\nimport math")
    assert "__future__" in refusal(tmp_path, part=part)


def test_same_future_import_stays_first(tmp_path):
    future = "from __future__ import annotations\n\nimport math"
    text = join(tmp_path, main=MAIN.replace("import math", future), part=PART.replace("import math", future))
    compile(text, "joined", "exec")
    assert text.count("from __future__") == 1
