"""Hypothesis strategies that damage files: bytes as disks and copies damage them, JSON as people and attackers do."""

import json
from datetime import timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st


def examples(count: int) -> settings:
    """The same `count` examples at every run; one that takes 10 s fails as a hang would."""
    return settings(max_examples=count, derandomize=True, database=None, deadline=timedelta(seconds=10))


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from([2**63, -(2**63) - 1, 10**400, "../../x", "/x", "a\\b", "\x00", [], {}, [[]], {"": {"": None}}]),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.lists(st.integers() | st.text(max_size=5), max_size=3),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a flip, a cut, an insertion, a part written twice or zeroed; or other bytes."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 64)))
    kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "twice", "zero", "other"]))
    if kind == "flip":
        at = min(start, len(whole) - 1)
        return whole[:at] + bytes([whole[at] ^ (1 << draw(st.integers(0, 7)))]) + whole[at + 1 :]
    if kind == "other":
        return draw(st.binary(max_size=200))
    middle = {
        "cut": b"",
        "drop": b"",
        "insert": draw(st.binary(min_size=1, max_size=20)) + whole[start:end],
        "twice": whole[start:end] * 2,
        "zero": bytes(end - start),
    }[kind]
    return whole[:start] + middle + (b"" if kind == "cut" else whole[end:])


@st.composite
def damaged_json(draw: st.DrawFn, values: Any) -> Any:
    """The values with one to three of them, at any depth, replaced, removed, renamed or added."""
    damaged = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        container = damaged
        while True:
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            inner = [key for key in keys if isinstance(container[key], dict | list)]
            if not inner or draw(st.booleans()):
                break
            container = container[draw(st.sampled_from(inner))]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "add" or not keys:
            container.update({draw(st.text(max_size=8)): draw(STRANGE)}) if isinstance(
                container, dict
            ) else container.append(draw(STRANGE))
        elif kind == "remove":
            del container[draw(st.sampled_from(keys))]
        else:
            container[draw(st.sampled_from(keys))] = draw(STRANGE)
    return damaged
