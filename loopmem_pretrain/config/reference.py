"""docs/config.md, generated: every field with its type, default and sentence.

python -m loopmem_pretrain.config.reference > docs/config.md
"""

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.config.site import SiteConfig

_WORDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}

_HEAD = """\
# Configuration

Generated from `loopmem_pretrain/config/` by `python -m loopmem_pretrain.config.reference > docs/config.md`; a test
holds it up to date. Change the fields there, not here.

A configuration is a YAML file. `base: other.yaml` (or a list of files, relative to this one) names what it builds on:
mappings merge, everything else is replaced, later files win, this one last. `key=value` on the command line comes after
all files; dots reach into sections and list items, and the value is YAML. To make a list longer, give it whole. Where a
key is given twice the later value counts:

    loopmem train --config configs/train/demo.yaml training.train_steps=100 data.datasets.0.path=/data/tokens
    loopmem train --config configs/train/demo.yaml data.datasets='[{path: /data/web}, {path: /data/code, weight: 2}]'

Only `true`, `false`, `null`, decimal numbers (`3e-4` and `38_620` too) and text are read: `off`, `0512` and `1:30` are
text. Unknown keys, keys written twice and values of another type are errors. All problems are reported at once, each
with file, line and key, before anything starts; `loopmem estimate --config FILE` checks a run without starting it.
The configuration a run really had is `config.yaml` in its folder.

**Bold** fields have no default.
"""


def reference() -> str:
    """The whole document."""
    run = "\n".join(_sections(RunConfig, "", "## A run: `loopmem train`, `loopmem estimate`"))
    prepare = "\n".join(_sections(PrepareConfig, "", "## Data: `loopmem prepare-data`, `loopmem train-tokenizer`"))
    cluster = "\n".join(_sections(ClusterConfig, "", "## A cluster: `loopmem estimate --cluster`"))
    site = "\n".join(_sections(SiteConfig, "", "## A SLURM cluster: `loopmem slurm submit --cluster`"))
    return f"{_HEAD}\n{run}\n{prepare}\n{cluster}\n{site}"


def _sections(section: type[Section], prefix: str, heading: str) -> Iterator[str]:
    """The table of a section, then those of the sections inside it."""
    yield f"{heading}\n\n{_prose(section.__doc__ or '')}\n\n| key | type | default | what |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        key = f"**`{prefix}{name}`**" if field.is_required() else f"`{prefix}{name}`"
        yield f"| {key} | {_type(field)} | {_default(field)} | {_prose(field.description or '')} |"
    yield ""
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner:
            path = f"{prefix}{name}." + ("N." if get_origin(field.annotation) is tuple else "")
            yield from _sections(inner, path, f"### `{path[:-1]}`")


def _section_in(annotation: Any) -> type[Section] | None:
    """The section a field holds, alone, optionally or as items of a list."""
    candidates = (annotation, *get_args(annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type(field: FieldInfo) -> str:
    annotation, rules = field.annotation, [*field.metadata]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    words = []
    for kind in kinds:
        if get_origin(kind) is Annotated:
            kind, *own = get_args(kind)
            rules += [rule for part in own for rule in getattr(part, "metadata", [part])]
        words.append("`null`" if kind is types.NoneType else _name(kind))
    return " or ".join([words[0] + _limits(rules), *words[1:]])


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return "list of " + ("sections" if issubclass(item, Section) else f"{_WORDS[item]}s")
    return "section" if issubclass(annotation, Section) else _WORDS[annotation]


def _limits(rules: list[Any]) -> str:
    """Bounds as a reader writes them: >= 0, < 1."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(rule, name):g}" for rule in rules for name, sign in signs.items() if hasattr(rule, name)
    ]
    least = max((getattr(rule, "min_length", 0) for rule in rules), default=0)
    return (f", {', '.join(limits)}" if limits else "") + (", not empty" if least else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if isinstance(field.default, Section):
        return "its defaults"
    return f"`{json.dumps(field.default).strip(chr(34))}`"


def _prose(sentence: str) -> str:
    """One line of Markdown: outside of code, < and | would be taken for markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(sentence.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "\\<").replace("|", "\\|") for part in parts)


if __name__ == "__main__":
    print(reference(), end="")
