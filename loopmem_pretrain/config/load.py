"""YAML files composed by `base:`, dotted overrides, and every problem at once with its place.

    load_config(RunConfig, path, ["training.train_steps=100"], rules=run_problems)

Traps this file exists for: PyYAML reads `3e-4` as a string and accepts duplicate keys in silence; strict pydantic
takes lists for tuples only from JSON; an error without file and line costs its reader more than the error.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.errors import ConfigError

Key = tuple[str, ...]
ConfigT = TypeVar("ConfigT", bound=Section)


class Loaded(NamedTuple):
    """A merged mapping and where each of its keys was written."""

    values: dict[str, Any]
    places: dict[Key, str]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(
    schema: type[ConfigT],
    path: str | Path,
    overrides: Sequence[str] = (),
    rules: Callable[[ConfigT], list[tuple[Key, str]]] | None = None,
) -> ConfigT:
    """Read `path` and everything it is based on, apply `key=value` overrides, validate.

    Raises:
        ConfigError: with one line a problem, `file:line:column: key: what is wrong`; all of them at once.
    """
    problems: list[str] = []
    loaded = _read_file(Path(path), problems, seen=())
    for override in overrides:
        _apply_override(loaded, override, problems)
    try:
        config = schema.model_validate_json(json.dumps(loaded.values, default=str))
    except ValidationError as error:
        details = error.errors()
        for detail in details:
            inner = any(len(d["loc"]) > len(detail["loc"]) == _shared(d["loc"], detail["loc"]) for d in details)
            if not (inner and detail["type"] == "too_short"):  # a list is "too short" only because an item is wrong
                problems.append(_describe(schema, loaded, detail))
    else:
        for key, message in rules(config) if rules else []:
            problems.append(f"{_place(loaded, key)}: {'.'.join(key)}: {message}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            f"{count} in the configuration\n  " + "\n  ".join(dict.fromkeys(problems)),
            "correct the lines above; docs/config.md lists every field",
        )
    return config


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Section, new: Section) -> list[str]:
    """Leaves in which two configurations differ, as `key: old -> new`."""
    left, right = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key, 'unset')} -> {right.get(key, 'unset')}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{prefix}.{key}".lstrip(".")).items()}


def _read_file(path: Path, problems: list[str], seen: tuple[Path, ...]) -> Loaded:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the config file {path}: {error.strerror}", "check the path after --config and after base:"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})", "point --config at a YAML file") from None
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: leads back to this file", "remove one of the base: lines")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {what}", "mend the line") from None
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: the file must be a mapping of keys to values", "write `key: value` lines")
    own = Loaded({}, {})
    own.values.update(_construct(node, (), path, own.places, problems))
    bases = own.values.pop("base", [])
    merged = Loaded({}, {})
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read_file(path.parent / str(base), problems, (*seen, path.resolve())))
    _merge(merged, own)
    return merged


def _construct(node: yaml.Node, key: Key, path: Path, places: dict[Key, str], problems: list[str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            place = f"{path}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            if name in values:
                problems.append(f"{place}: {'.'.join((*key, name))}: written twice in one mapping; keep one")
            places[(*key, name)] = place
            values[name] = _construct(value_node, (*key, name), path, places, problems)
        return values
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*key, str(index))] = f"{path}:{item.start_mark.line + 1}:{item.start_mark.column + 1}"
        return [_construct(item, (*key, str(i)), path, places, problems) for i, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _merge(into: Loaded, over: Loaded) -> None:
    """Lay `over` on `into`: mappings merge, everything else is replaced."""

    def lay(old: dict[str, Any], new: dict[str, Any]) -> None:
        for name, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(name), dict):
                lay(old[name], value)
            else:
                old[name] = value

    lay(into.values, over.values)
    into.places.update(over.places)


def _apply_override(loaded: Loaded, override: str, problems: list[str]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        problems.append(f"command line: {override!r} is not of the form key=value, such as training.train_steps=100")
        return
    try:
        value = yaml.load(text, Loader=_Loader) if text else None  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        value = text
    *parents, name = dotted.split(".")
    target: Any = loaded.values
    for depth, parent in enumerate(parents):
        if isinstance(target, list) and parent.isdigit() and int(parent) < len(target):
            target = target[int(parent)]
            continue
        if not isinstance(target, dict):
            problems.append(f"command line: {dotted}: {'.'.join(parents[:depth])} has no keys of its own")
            return
        target = target.setdefault(parent, {})
    if isinstance(target, list) and name.isdigit() and int(name) < len(target):
        target[int(name)] = value
    elif isinstance(target, dict):
        target[name] = value
    else:
        problems.append(f"command line: {dotted}: {'.'.join(parents)} has no keys of its own")
        return
    loaded.places[tuple(dotted.split("."))] = "command line"


def _place(loaded: Loaded, key: Key) -> str:
    """Where the key, or else the nearest mapping around it, was written."""
    for length in range(len(key), 0, -1):
        if key[:length] in loaded.places:
            return loaded.places[key[:length]]
    return "configuration"


def _shared(left: tuple[Any, ...], right: tuple[Any, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _describe(schema: type[Section], loaded: Loaded, detail: Any) -> str:
    key = tuple(str(part) for part in detail["loc"])
    place, name = _place(loaded, key), ".".join(key)
    if detail["type"] == "extra_forbidden":
        valid = _fields_of(schema, key[:-1])
        close = difflib.get_close_matches(key[-1], valid, n=1)
        hint = f"did you mean {close[0]}?" if close else f"valid keys: {', '.join(valid)}"
        return f"{place}: {name}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{place}: {name}: required, and written nowhere"
    got = detail["input"]
    shown = "a mapping" if isinstance(got, dict) else "a list" if isinstance(got, list) else repr(got)
    message = detail["msg"].removeprefix("Input ")
    return f"{place}: {name}: {message} (got {shown})"


def _fields_of(schema: Any, key: Key) -> list[str]:
    for part in key:
        if part.isdigit():
            continue
        schema = schema.model_fields[part].annotation
        schema = next((a for a in getattr(schema, "__args__", ()) if hasattr(a, "model_fields")), schema)
    return list(schema.model_fields)
