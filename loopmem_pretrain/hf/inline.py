"""Make one self-contained source file of the Hugging Face modeling file and the modules it imports from this package.

The text is cut and joined along the syntax tree; nothing is renamed or rewritten. What cannot be joined so that it
means the same is refused.
"""

import ast
import builtins
import symtable
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from loopmem_pretrain.errors import ConversionError

_PACKAGE = "loopmem_pretrain"
_ROOT = Path(__file__).resolve().parent.parent
_CONFIGURATION = f"{_PACKAGE}.hf.configuration_loopmem"
_CONFIGURATION_BESIDE = ".configuration_loopmem"
_ALLOWED = frozenset({"torch", "transformers"}) | sys.stdlib_module_names
INLINED: Mapping[str, Path] = {
    f"{_PACKAGE}.{name.replace('/', '.')}": _ROOT / f"{name}.py"
    for name in (
        *("hf/cache", "model/init", "model/backend", "model/memory", "model/decoding"),
        *("model/block", "model/loopmem", "model/early_exit"),
    )
}
"""Modules whose text replaces their import."""


class Import(NamedTuple):
    """One imported name."""

    module: str | None
    """Of `from module import name`; None for `import name`."""
    name: str
    alias: str | None

    def bound(self) -> str:
        """The name it binds in the file."""
        return self.alias or (self.name if self.module else self.name.split(".")[0])


class Source(NamedTuple):
    """One file taken apart."""

    path: Path
    docstring: str
    """With its quotes, as the file has it; empty where there is none."""
    imports: list[Import]
    body: str
    """The text without docstring and top-level imports."""
    names: set[str]
    """What its top level defines, those imports not counted."""

    def label(self) -> str:
        """Folder and file name."""
        return f"{self.path.parent.name}/{self.path.name}"


def inline_module(modeling_path: str | Path, inlined: Mapping[str, Path] | None = None) -> str:
    """The text of `modeling_path` with its imports from this package replaced by the text of those modules.

    The import of the configuration becomes the relative import that transformers' remote code needs.

    Args:
        modeling_path: the file to make self-contained; torch, transformers and the standard library remain imported.
        inlined: module name -> file, the modules that may be inlined; `INLINED` where none is given.

    Raises:
        ConversionError: an import that cannot be inlined, or names of two files that collide.
    """
    known = INLINED if inlined is None else inlined
    main = take_apart(Path(modeling_path))
    parts: dict[str, Source] = {}
    imports = _resolve(main, known, parts, relative=True)
    _refuse_collisions([*parts.values(), main], imports)
    futures = {
        frozenset(item for item in source.imports if item.module == "__future__") for source in (main, *parts.values())
    }
    if len(futures) > 1:
        raise ConversionError(
            f"{main.path} and the modules it inlines differ in their __future__ imports, which hold for a whole file",
            "give all of them the same",
        )
    return _join(main, list(parts.values()), imports)


def _resolve(source: Source, known: Mapping[str, Path], parts: dict[str, Source], relative: bool) -> list[Import]:
    """Take apart what `source` imports from `known`, into `parts`, each after what it imports itself.

    Returns the imports that stay imports, of `source` and of all it brought in.
    """
    imports: list[Import] = []
    for item in source.imports:
        if item.module is None or item.module not in known:
            imports.append(_outside(item, source.path, relative))
            continue
        if item.module not in parts:
            part = take_apart(known[item.module])
            imports += _resolve(part, known, parts, relative=False)
            parts[item.module] = part
        if item.alias is not None or item.name not in parts[item.module].names:
            raise ConversionError(
                f"{source.path}: cannot inline `{_line(item)}`: "
                + ("it renames" if item.alias else f"{known[item.module]} does not define {item.name}"),
                "import names as the module at the other end defines them",
            )
    return imports


def take_apart(path: Path) -> Source:
    """Split a file into docstring, top-level imports and the rest.

    Raises:
        ConversionError: relative, star or nested package imports, or two statements on the line of an import.
    """
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    documented = ast.get_docstring(tree) is not None
    top_imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imports: list[Import] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        found = _imports_of(node, path)
        if node in top_imports:
            imports += found
        else:
            for item in found:  # stays where it is, so it must be one that every machine has
                _outside(item, path, relative=False)

    lines = text.splitlines()
    docstring = "\n".join(lines[tree.body[0].lineno - 1 : tree.body[0].end_lineno]) if documented else ""
    cut: set[int] = set()
    for node in [*(tree.body[:1] if documented else []), *top_imports]:
        end = node.end_lineno or node.lineno
        while end < len(lines) and not lines[end].strip():  # and the empty lines after it
            end += 1
        cut |= set(range(node.lineno, end + 1))
    kept = [node for node in tree.body[documented:] if node not in top_imports]
    for node in kept:
        if node.lineno in cut or node.end_lineno in cut:
            raise ConversionError(
                f"{path}:{node.lineno}: a statement shares its line with an import or the docstring",
                "put it on a line of its own",
            )
    body = "\n".join(line for number, line in enumerate(lines, 1) if number not in cut).strip("\n")

    symbols = symtable.symtable(text, str(path), "exec").get_symbols()
    bound = {item.bound() for item in imports}
    names = {item.get_name() for item in symbols if item.is_assigned()}
    names |= {item.get_name() for item in symbols if item.is_imported() and item.get_name() not in bound}
    return Source(path, docstring, imports, body, names)


def _imports_of(node: ast.Import | ast.ImportFrom, path: Path) -> list[Import]:
    where = f"{path}:{node.lineno}"
    if isinstance(node, ast.Import):
        return [Import(None, alias.name, alias.asname) for alias in node.names]
    if node.level or node.module is None:
        raise ConversionError(f"{where}: cannot inline a relative import", "import by the full name of the module")
    if any(alias.name == "*" for alias in node.names):
        raise ConversionError(f"{where}: cannot inline a star import", "import each name")
    return [Import(node.module, alias.name, alias.asname) for alias in node.names]


def _outside(item: Import, path: Path, relative: bool = True) -> Import:
    """An import that stays one: torch, transformers, the standard library, or the configuration next door."""
    if item.module == _CONFIGURATION and relative:
        return item._replace(module=_CONFIGURATION_BESIDE)
    if (item.module or item.name).split(".")[0] not in _ALLOWED:
        raise ConversionError(
            f"{path}: `{_line(item)}` is not inlined, and an exported model may import torch, transformers and the "
            "standard library only",
            "move what is needed into a module that is inlined, or do without it",
        )
    return item


def _refuse_collisions(sources: list[Source], imports: list[Import]) -> None:
    owner: dict[str, str] = {}
    meaning: dict[str, Import] = {}
    for item in imports:
        name = item.bound()
        known = meaning.setdefault(name, item)
        # `import torch` and `import torch.nn` bind the same name to the same module.
        if known != item and (known.module or item.module or known.alias or item.alias):
            raise ConversionError(
                f"{name} is imported twice with different meanings: `{_line(known)}`, `{_line(item)}`",
                "give one of them another name",
            )
        owner[name] = f"`{_line(item)}`"
    for source in sources:
        for name in sorted(source.names):
            if hasattr(builtins, name) and not name.startswith("__"):
                raise ConversionError(f"{source.path} defines {name}, a builtin the other files use", "rename it")
            if name in owner:
                raise ConversionError(
                    f"{name} is defined by {owner[name]} and by {source.path}: the two would share one file",
                    "rename one of them",
                )
            owner[name] = str(source.path)


def _join(main: Source, parts: list[Source], imports: list[Import]) -> str:
    sources = ", ".join(source.label() for source in [main, *parts])
    top = [f"# Written by the export of {_PACKAGE} from\n# {sources}.\n# Change those, not this file."]
    top += [piece for piece in (main.docstring, _import_block(imports)) if piece]
    sections: list[str] = []
    for part in parts:
        sections += [_heading(part, ast.literal_eval(part.docstring) if part.docstring else ""), part.body]
    sections += [_heading(main, ""), main.body] if parts else [main.body]
    gap = "\n\n" if sections[0].startswith("#") else "\n\n\n"
    text = "\n\n".join(top) + gap + "\n\n\n".join(sections) + "\n"
    ast.parse(text)
    return text


def _heading(source: Source, docstring: str) -> str:
    """A ruler with the file's name, and its docstring as comments."""
    ruler = f"# {'=' * 20} {source.label()} ".ljust(120, "=")
    return "\n".join([ruler, *(f"# {line}".rstrip() for line in docstring.strip().splitlines())])


def _import_block(imports: list[Import]) -> str:
    """Each import once, in the usual order: __future__, standard library, other packages, relative."""

    def section(item: Import) -> int:
        top = (item.module or item.name).split(".")[0]
        if top == "__future__":
            return 0
        return 3 if not top else 1 if top in sys.stdlib_module_names else 2

    blocks: list[str] = []
    for number in range(4):
        chosen = {item for item in imports if section(item) == number}
        lines = sorted(_line(item) for item in chosen if item.module is None)
        for module in sorted({item.module for item in chosen if item.module is not None}):
            names = sorted(_renamed(item) for item in chosen if item.module == module)
            lines.append(f"from {module} import {', '.join(names)}")
        if lines:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _renamed(item: Import) -> str:
    return item.name if item.alias is None else f"{item.name} as {item.alias}"


def _line(item: Import) -> str:
    return f"import {_renamed(item)}" if item.module is None else f"from {item.module} import {_renamed(item)}"
