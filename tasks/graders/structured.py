"""JSON objects compared field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldScore:
    """How far a field agrees: of what the sample has, of what the reference has, and both (harmonic mean)."""

    precision: float
    recall: float
    f1: float


def compare(found: Any, expected: Any, tolerance: float = 0.0) -> FieldScore:
    """Agreement of two values of a field; None is a field that is not there.

    A scalar is one element; a list is the set of its elements, without order and repetition; an object is the set of
    its fields, each with its value. Equal are elements of one JSON type with one value, numbers also within the
    tolerance. Where neither has anything the field is right.

    >>> compare(["red", "blue"], ["blue", "green", "red"])
    FieldScore(precision=1.0, recall=0.6666666666666666, f1=0.8)
    """
    mine, theirs = list(_elements(found)), list(_elements(expected))
    if not mine and not theirs:
        # an empty list is not the same as no list, but neither says anything that the other does not
        return FieldScore(1.0, 1.0, 1.0)
    hits = num_matches(mine, theirs, tolerance)
    precision, recall = hits / max(1, len(mine)), hits / max(1, len(theirs))
    return FieldScore(precision, recall, 2 * hits / (len(mine) + len(theirs)))


def num_matches(mine: Sequence[Any], theirs: Sequence[Any], tolerance: float) -> int:
    """Pairs of equal elements in which each stands once, of lists without repetition.

    As many as there can be, but for objects within a tolerance: each of those takes the first that is near.
    """
    if not tolerance:
        return len({_key(m) for m in mine} & {_key(t) for t in theirs})
    # numbers in ascending order: the smallest that is left goes with the smallest that is near enough
    left, right = (sorted(v for v in values if _is_number(v)) for values in (mine, theirs))
    i = j = hits = 0
    while i < len(left) and j < len(right):
        if abs(left[i] - right[j]) <= tolerance:
            i, j, hits = i + 1, j + 1, hits + 1
        elif left[i] < right[j]:
            i += 1
        else:
            j += 1
    rest = [t for t in theirs if not _is_number(t)]
    for value in (m for m in mine if not _is_number(m)):
        near = next((k for k, t in enumerate(rest) if _near(value, t, tolerance)), None)
        if near is not None:
            del rest[near]
            hits += 1
    return hits


def look_up(document: Any, path: str) -> Any:
    """The value at a dotted path, or None; keys may hold dots themselves."""
    if not isinstance(document, Mapping):
        return None
    if path in document:
        return document[path]
    ends = [i for i, letter in enumerate(path) if letter == "." and path[:i] in document]
    return next((v for i in ends if (v := look_up(document[path[:i]], path[i + 1 :])) is not None), None)


def field_paths(document: Mapping[str, Any]) -> list[str]:
    """The fields of an object, those of objects inside it by dotted paths."""
    return [
        path
        for key, value in document.items()
        for path in ([f"{key}.{p}" for p in field_paths(value)] if isinstance(value, Mapping) and value else [key])
    ]


def _elements(value: Any) -> Iterator[Any]:
    if value is None:
        return
    if isinstance(value, Mapping):
        yield from (_Pair(key, inner) for key, inner in value.items() if inner is not None)
    elif isinstance(value, list):
        seen = set()
        for element in value:
            if (key := _key(element)) not in seen:
                seen.add(key)
                yield element
    else:
        yield value


@dataclass(frozen=True, slots=True)
class _Pair:
    """A field of an object and its value."""

    key: str
    value: Any


def _key(value: Any) -> str:
    """The same for equal values alone; 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, _Pair):
        return f"{json.dumps(value.key)}: {_key(value.value)}"
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _near(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, _Pair) and isinstance(b, _Pair):
        return a.key == b.key and _near(a.value, b.value, tolerance)
    if _is_number(a) and _is_number(b):
        return bool(abs(a - b) <= tolerance)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_near(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_near(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return _key(a) == _key(b)
