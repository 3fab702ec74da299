"""Typed configuration from YAML and overrides, with every problem at once, each with its place and what is valid.

    load_config(RunConfig, path, ["training.train_steps=100"], rules=run_problems)

Strict pydantic takes lists for tuples only from JSON, hence the detour over it. An `after` validator is skipped once a
field has failed, so rules between fields are plain functions that return a list of problems.
"""

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from loopmem_pretrain.config.base import Key, Problem, Section
from loopmem_pretrain.config.source import (
    COMMAND_LINE,
    Loaded,
    apply_override,
    dotted,
    dump_yaml,
    read_file,
    shown,
)
from loopmem_pretrain.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Section)

# pydantic's kind of error -> what a field of that kind wants, in the words of YAML
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}


def load_config(
    schema: type[ConfigT],
    path: str | Path,
    overrides: Sequence[str] = (),
    rules: Callable[[ConfigT], list[Problem]] | None = None,
) -> ConfigT:
    """Read `path` and everything it is based on, apply `key=value` overrides, validate.

    Raises:
        ConfigError: with one line a problem, `file:line:column: key: what is wrong`; all of them at once.
    """
    loaded = read_file(Path(path))
    for override in overrides:
        apply_override(loaded, override)
    problems = loaded.problems
    values, config = _without_broken(loaded), None
    try:
        config = schema.model_validate_json(json.dumps(values))
        broken_rules = rules(config) if rules else []
    except ValidationError as error:
        problems += _describe_all(schema, loaded, error.errors())
        broken_rules = _broken_whatever_is_meant(schema, values, error.errors(), problems, rules) if rules else []
    problems += [f"{loaded.place_of(key)}: {dotted(key)}: {message}" for key, message in broken_rules]
    if problems and (other := _other_kind(schema, loaded)):
        wanted = _KINDS[schema.__name__][1]
        raise ConfigError(f"{path} describes {other}, not {wanted}", "give a file of that kind")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            f"{count} in the configuration\n  " + "\n  ".join(dict.fromkeys(problems)),
            "correct what is named above; docs/config.md lists every field",
        )
    assert config is not None, "what could not be validated is a problem"
    return config


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return dump_yaml(config.model_dump(mode="json"))


def differences(old: Section, new: Section) -> list[str]:
    """Leaves in which two configurations differ, as `key: old -> new`; of lists of sections, what both have."""
    left, right = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key, 'unset')} -> {right.get(key, 'unset')}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and ((key in left and key in right) or not re.search(r"\.\d+\.", key))
    ]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {"number": len(value), **{str(index): inner for index, inner in enumerate(value)}}
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{prefix}.{key}".lstrip(".")).items()}


def _broken_whatever_is_meant(
    schema: type[ConfigT],
    values: Any,
    details: Sequence[Any],
    problems: Sequence[str],
    rules: Callable[[ConfigT], list[Problem]],
) -> list[Problem]:
    """Rules between fields that are broken by what could be read, whatever the keys that could not are meant to be.

    Those are left out; what a configuration cannot lack is a small number once and a large one once. What a rule says
    counts if it says it both times and of other fields only.
    """
    keys = [tuple(detail["loc"]) for detail in details]
    doubtful = {str(key[-1]) for key in keys}
    doubtful |= {key.split(".")[-1] for line in problems for key in re.findall(r"did you mean ([\w.]+)\?", line)}
    said: list[list[Problem]] = []
    for number in (1, 2**20):
        config = _without(schema, values, keys, number)
        if config is not None:
            said.append(rules(config))
    always = [each for each in said[0] if all(each in other for other in said)] if said else []
    return [(key, text) for key, text in always if doubtful.isdisjoint(re.findall(r"\w+", f"{key[-1]} {text}"))]


def _without(schema: type[ConfigT], values: Any, keys: Sequence[tuple[int | str, ...]], instead: int) -> ConfigT | None:
    """The configuration without these keys, with `instead` for those it cannot lack; None where that is none."""
    values = copy.deepcopy(values)
    for key in keys:
        _section(values, key).pop(key[-1], None)
    try:
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] == "missing" and detail["loc"] in keys:
                _section(values, detail["loc"])[detail["loc"][-1]] = instead
    try:
        return schema.model_validate_json(json.dumps(values))
    except ValidationError:
        return None


def _section(values: Any, key: tuple[int | str, ...]) -> dict[Any, Any]:
    """The mapping that `key` is in; an empty one where there is none."""
    for part in key[:-1]:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return {}
    return values if isinstance(values, dict) else {}


def _without_broken(loaded: Loaded) -> Any:
    """The values, with null for what could not be read: text that is no Unicode does not pass through JSON."""

    def clean(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: clean(inner, (*key, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner, (*key, str(index))) for index, inner in enumerate(value)]
        return None if key in loaded.broken else value

    return clean(loaded.values, ())


# ------------------------------------------------------------------------------------------------------ messages


# Kinds of files by their schemas: where those are, and what such a file describes.
_KINDS = {
    "RunConfig": ("run", "a run (configs/train/, configs/paper/)"),
    "PrepareConfig": ("prepare", "the preparation of data (data_prep/)"),
    "ClusterConfig": ("cluster", "how fast a cluster is (`loopmem estimate --cluster`, configs/cluster/)"),
    "SiteConfig": ("site", "how a site runs jobs (`loopmem slurm --cluster`, slurm/clusters/)"),
}


def _other_kind(schema: type[Section], loaded: Loaded) -> str:
    """What a file describes that lacks what `schema` needs and has what another one needs; else empty."""
    given = set(loaded.values)

    def fits(other: type[Section]) -> bool:
        return {name for name, field in other.model_fields.items() if field.is_required()} <= given

    for name, (module, what) in _KINDS.items():
        other = getattr(import_module(f"loopmem_pretrain.config.{module}"), name)
        unknown = [len(given - set(each.model_fields)) for each in (other, schema)]
        if (
            schema.__name__ in _KINDS
            and other is not schema
            and fits(other)
            and not fits(schema)
            and unknown[0] < unknown[1]
        ):
            return what
    return ""


def _describe_all(schema: type[Section], loaded: Loaded, details: Sequence[Any]) -> Iterator[str]:
    """One line a problem; nothing twice about a key that was complained about, or about a list for its items."""
    keys = [tuple(str(part) for part in detail["loc"]) for detail in details]
    listed: set[str] = set()
    for key, detail in zip(keys, details, strict=True):
        inside = any(len(other) > len(key) and other[: len(key)] == key for other in keys)
        if key not in loaded.broken and not (inside and detail["type"] == "too_short"):
            place, said = loaded.place_of(key), _describe(schema, key, detail, loaded.place_of(key))
            yield f"{place}: {dotted(key)}: {'unknown key; valid keys as above' if said in listed else said}"
            listed |= {said} if said.startswith("unknown key; valid keys: ") else set()


_LEADING_ZERO = re.compile(r"0\d+")
"""YAML reads it as text, quotes or not."""


def _describe(schema: type[Section], key: Key, detail: Any, place: str) -> str:
    kind, got = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key; {_suggestion(schema, key)}"
    if kind == "missing":
        return "required, but not set anywhere"
    if kind == "literal_error":
        return _describe_choice(detail["ctx"]["expected"], got)
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "too_short":
        return "must not be an empty list"
    message = detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    if kind in _WANTED:
        message = f"must be {_WANTED[kind]}"
    if got is None:
        rest = "leave it out" if place == COMMAND_LINE else "remove the line"
        where = f"write keys below it or {rest}" if kind == "model_type" else f"give one or {rest}"
        return f"has no value; {where} ({message})"
    hint = ""
    if kind in ("int_type", "float_type") and isinstance(got, str) and _is_number(got):
        hint = f"; write {int(got)}" if _LEADING_ZERO.fullmatch(got) else "; remove the quotes"
    elif kind == "int_type" and isinstance(got, float) and got.is_integer():
        hint = f"; write {int(got)}"
    elif kind == "string_type" and not isinstance(got, dict | list):
        quoted = f": {'.'.join(key)}='\"{got}\"'" if place == COMMAND_LINE else ""
        hint = f"; put it in quotes{quoted}"
    return f"{message} (got {shown(got)}){hint}"


def _describe_choice(expected: str, got: Any) -> str:
    """`expected` is pydantic's list of the choices: 'a', 'b' or 'c'."""
    choices = [choice.strip("'") for part in expected.split(" or ") for choice in part.split(", ")]
    close = difflib.get_close_matches(got, choices, n=1, cutoff=0.76) if isinstance(got, str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    if got in choices and isinstance(got, str):
        hint = "; remove the quotes"
    return f"must be {expected.replace(chr(39), '')} (got {shown(got)}){hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _suggestion(schema: type[Section], key: Key) -> str:
    """For an unknown key: the one that was probably meant, here or in another section, or all that are valid here."""
    sections = dict(_sections(schema))
    around = tuple(part for part in key[:-1] if not part.isdecimal())
    valid = list(sections[around].model_fields)
    close = difflib.get_close_matches(key[-1], valid, n=1)
    if close:
        return f"did you mean {close[0]}?"
    elsewhere = [".".join((*path, key[-1])) for path, other in sections.items() if key[-1] in other.model_fields]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    return f"valid keys: {', '.join(valid)}"


def _sections(schema: type[Section], path: Key = ()) -> Iterator[tuple[Key, type[Section]]]:
    """The section and all sections below it, with their paths; list positions are left out."""
    yield path, schema
    for name, info in schema.model_fields.items():
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _sections(kind, (*path, name))
