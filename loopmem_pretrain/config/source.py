"""What the user wrote: YAML files composed by `base:` and dotted overrides, merged, with the place of every key.

Traps this file exists for. PyYAML follows YAML 1.1: it reads `3e-4` as text, `off` as false, `0512` as 330 and `1:30`
as 90, and accepts duplicate keys in silence. Here only `true`/`false`, `null`, decimal numbers and text exist.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loopmem_pretrain.config.base import Key
from loopmem_pretrain.errors import ConfigError

COMMAND_LINE = "command line"
_MOST_LEVELS = 20  # of nesting; more is an alias that contains itself
_MOST_KEYS = 100_000  # in a file, what aliases stand for included: aliases of aliases grow without bound


@dataclass
class Loaded:
    """A merged mapping, where each of its keys was written, and what is wrong with the writing itself."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    """`file:line:column` or `command line` of each key."""
    problems: list[str] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)
    """Keys whose value could not be read and is already complained about."""
    whole: str = ""
    """Place of the whole: the beginning of the file the user named."""

    def complain(self, key: Key, place: str, message: str) -> None:
        """Report a value that could not be read."""
        self.report(key, place, message)
        self.broken.add(key)

    def report(self, key: Key, place: str, message: str) -> None:
        """Report something about a key whose value can still be judged."""
        self.problems.append(": ".join(part for part in (place, dotted(key), message) if part))

    def place_of(self, key: Key) -> str:
        """Where the key, or else the nearest mapping around it, was written."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.whole


# ---------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Composes nodes; what a plain scalar is, the table below says."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either this loader or a YAML 1.1 reader would take for something else than text."""


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    # tag: (what a plain scalar of it looks like, its possible first characters, its value)
    "null": (r"~|null|Null|NULL|", "~nN", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: {"true": True, "false": False}[text.lower()]),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789", int),
    "float": (
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (r"(?!)", "", str),
}
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first, _value) in _SCALARS.items():
    _starts = [*_first, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _starts)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _starts)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `read_file` reads back as they were."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --------------------------------------------------------------------------------------------------------- files


def read_file(path: Path) -> Loaded:
    """Read a file and everything it is based on.

    Raises:
        ConfigError: a file cannot be read at all; what is wrong with single keys is in `problems`.
    """
    loaded = _read(path, (), f"the config file {path}")
    loaded.whole = f"{path}:1:1"
    return loaded


def _read(path: Path, seen: tuple[Path, ...], called: str) -> Loaded:
    """Read one file; `called` says how its user wrote it."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{called} cannot be read: {what}", "check the path; base: is relative to the file it stands in"
        ) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text", "save the file as UTF-8, or name a YAML file") from None
    if path.resolve() in seen:
        raise ConfigError(f"{called} leads back to itself", "remove one of the base: lines")

    def place(mark: Any) -> str:
        return f"{path}:{mark.line + 1}:{mark.column + 1}"

    node = _compose(text, path, place)
    own = Loaded()
    own.values.update(_construct(node, (), own, place))
    bases = own.values.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(
            f"{own.place_of(('base',))}: base: must be the path of a file, or a list of paths",
            "write `base: other.yaml`, relative to this file, or remove the line",
        )
    merged = Loaded()
    for base in bases:
        other = path.parent / base
        _merge(merged, _read(other, (*seen, path.resolve()), f"{own.place_of(('base',))}: base: {other}"))
    _merge(merged, own)
    return merged


def _compose(text: str, path: Path, place: Callable[[Any], str]) -> yaml.MappingNode:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        what = f"the character #x{ord(text[error.position]):04x} is not allowed"
        raise ConfigError(f"{path}:{line}: not valid YAML: {what}", "remove that character") from None
    except yaml.MarkedYAMLError as error:
        context = f"{error.context}: " if error.context else ""
        raise ConfigError(
            f"{place(error.problem_mark)}: not valid YAML: {context}{error.problem}",
            "correct that line, or the one before it: indent with spaces, quote text with `: `, `#` or a leading "
            "`*`, `&`, `@`, `%`",
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}:1:1: lists or mappings are nested too deeply", "write it flatter") from None
    if node is None:
        start = yaml.Mark(str(path), 0, 0, 0, "", 0)
        return yaml.MappingNode(_TAG + "map", [], start, start)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place(node.start_mark)}: the file is not a mapping of keys", "write `key: value` lines")
    return node


def _construct(node: yaml.Node, key: Key, loaded: Loaded, place: Callable[[Any], str]) -> Any:
    """The value of a node; records the places of the keys in it, complains into `loaded`."""
    here = place(node.start_mark)
    if len(key) > _MOST_LEVELS:
        raise ConfigError(
            f"{here}: nested more than {_MOST_LEVELS} levels deep", "an alias (*name) may contain itself; write it out"
        )
    if len(loaded.places) > _MOST_KEYS:
        raise ConfigError(f"{here}: more than {_MOST_KEYS:,} keys and items", "write fewer aliases (*name)")
    if node.tag.removeprefix(_TAG) not in (*_SCALARS, "map", "seq"):
        loaded.complain(key, here, f"the YAML tag {node.tag.replace(_TAG, '!!')} is not read; write a plain value")
        return None
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_place = place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                loaded.report(key, key_place, "a key must be a plain word")
                continue
            name = key_node.value
            if name in values:  # the first one counts, so that nothing else is said about this slip
                first = loaded.places[(*key, name)]
                loaded.report((*key, name), key_place, f"written twice (first at {first}); keep one")
                continue
            loaded.places[(*key, name)] = key_place
            values[name] = _construct(value_node, (*key, name), loaded, place)
        return values
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            loaded.places[(*key, str(index))] = place(item.start_mark)
        return [_construct(item, (*key, str(index)), loaded, place) for index, item in enumerate(node.value)]
    return _scalar(node, key, loaded, here)


def _scalar(node: yaml.Node, key: Key, loaded: Loaded, here: str) -> Any:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    try:
        value = _SCALARS[kind][2](text)
        text.encode()
    except (ValueError, KeyError):  # `!!int word`, thousands of digits, half of a surrogate pair
        loaded.complain(key, here, f"{shown(text)} cannot be read as {_KINDS.get(kind, kind)}")
        return None
    if isinstance(value, int) and abs(value) >= 2**63:
        loaded.complain(key, here, f"{shown(value)} does not fit into 64 bits")
    return value


def _merge(into: Loaded, over: Loaded) -> None:
    """Lay `over` on `into`: mappings merge, everything else is replaced."""
    for name, value in over.values.items():
        _lay(into.values, name, value, (name,), into.places)
    into.places.update(over.places)
    into.problems += over.problems
    into.broken |= over.broken


def _lay(container: Any, name: Any, value: Any, key: Key, places: dict[Key, str]) -> None:
    """Put one value into a mapping or list; what it replaces loses its places too."""
    old = container.get(name) if isinstance(container, dict) else container[name]
    if isinstance(old, dict) and isinstance(value, dict):
        for inner, inner_value in value.items():
            _lay(old, inner, inner_value, (*key, inner), places)
        return
    for stale in [known for known in places if known[: len(key)] == key]:
        del places[stale]
    container[name] = value


# ----------------------------------------------------------------------------------------------------- overrides


def apply_override(loaded: Loaded, override: str) -> None:
    """Lay one `key=value` of the command line on what the files say; the value is YAML."""
    name, equals, text = override.partition("=")
    key = tuple(name.split("."))
    if not equals or not all(key):
        example = "is not of the form key=value, such as training.train_steps=100"
        loaded.problems.append(f"{COMMAND_LINE}: {shown(override)} {example}")
        return
    if key == ("base",):
        loaded.problems.append(f"{COMMAND_LINE}: base: belongs into a file; give that file as the config")
        return
    given = Loaded()
    value = _override_value(text, key, given)
    loaded.problems += given.problems
    loaded.broken |= given.broken
    target: Any = loaded.values
    for depth, part in enumerate(key):
        around = dotted(key[:depth])
        if isinstance(target, list) and not (part.isdecimal() and int(part) < len(target)):
            items = f"items 0 to {len(target) - 1}" if target else "no items"
            inside = target and not part.lstrip("-").isdecimal()
            way = f"write {dotted((*key[:depth], '0', *key[depth:]))}" if inside else "to add one, give the whole list"
            loaded.complain(key, COMMAND_LINE, f"{around} is a list with {items}, there is no {part}; {way}")
            return
        if not isinstance(target, list | dict):
            loaded.complain(key, COMMAND_LINE, f"{around} is {shown(target)}, it has no keys of its own")
            return
        index = int(part) if isinstance(target, list) else part
        if depth == len(key) - 1:
            _lay(target, index, value, key, loaded.places)
        elif isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
            loaded.places[key[: depth + 1]] = COMMAND_LINE
        target = target[index]
    loaded.places.update(given.places)
    loaded.places[key] = COMMAND_LINE


def _override_value(text: str, key: Key, given: Loaded) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        if text.startswith(("[", "{")):
            what = getattr(error, "problem", None) or "nested too deeply, or a character that is not allowed"
            given.complain(key, COMMAND_LINE, f"{shown(text)} is not valid YAML: {what}; quote the items")
            return None
        node = yaml.ScalarNode(_TAG + "str", text)  # any other text means itself
    if node is None:
        return None
    return _construct(node, key, given, lambda mark: COMMAND_LINE)


def dotted(key: Key) -> str:
    """A key as one word, such as data.datasets.0.path."""
    return ".".join(part if part.isprintable() else ascii(part) for part in key)


def shown(value: Any) -> str:
    """A value as its writer knows it, cut to one short line."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number of more than 18 digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
