"""What loaders of questions share: rows of files, checks that name file, line, field, what was expected and what was
found, and bad rows that are left out on request.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.types import Item

MAX_ROW_BYTES = 1_000_000  # no question is that long: a file whose lines were lost, or one of another kind

_NOUNS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


def read_items(
    rows: Iterable[tuple[str, Any]],
    parse: Callable[[Any, str], Item],
    path: Path,
    *,
    max_items: int | None = None,
    skipped: list[str] | None = None,
    id_field: str = "id",
    remedy: str = "Copy it again from the release.",
) -> tuple[Item, ...]:
    """The questions of a file, in its order.

    Args:
        rows: Where each stands, and its JSON value, or the bytes of it: see `lines` and `entries`.
        parse: Makes a question of a row; `AgileError` if it cannot.
        max_items: How many to read; None for all.
        skipped: Takes what is wrong with each bad row, which is then left out. None: the first one ends the reading.
        id_field: What the file calls a question's id.
        remedy: What helps where no question is found.

    Raises:
        AgileError: A row is bad or has an id that another one has, or no row is left.
    """
    items: list[Item] = []
    places: dict[str, str] = {}
    for where, row in rows:
        if len(items) == max_items:
            break
        with listing(skipped):
            item = parse(row_value(row, where), where)
            if item.id in places:
                raise wrong(where, id_field, f"an id that is not yet used ({places[item.id]} has it)", item.id)
            places[item.id] = where.removeprefix(f"{path}, ")
            items.append(item)
    if not items:
        what = f"{len(skipped)} bad ones, the last: {skipped[-1].rstrip('.')}" if skipped else "an empty file"
        raise AgileError(f"{path}: expected one question a row, found {what}. {remedy}")
    return tuple(items)


@contextmanager
def listing(skipped: list[str] | None) -> Iterator[None]:
    """Lists what is wrong with a bad row and goes on behind it; without a list the error passes."""
    try:
        yield
    except AgileError as error:
        if skipped is None:
            raise
        skipped.append(str(error))


def lines(path: Path, remedy: str = "expected a file with one JSON object a line") -> Iterator[tuple[str, bytes]]:
    """The lines of a file but blank ones, each with where it stands."""
    for number, line in enumerate(read_bytes(path, remedy).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def entries(path: Path, remedy: str = "expected a file with a JSON list") -> Iterator[tuple[str, Any]]:
    """The entries of a file that is one JSON list, each with where it stands, counted from 1."""
    values = parse_json(read_bytes(path, remedy), str(path), "a JSON list")
    if not isinstance(values, list):
        raise AgileError(f"{path}: expected a JSON list, found {show(values)}.")
    for number, value in enumerate(values, 1):
        yield f"{path}, entry {number}", value


class _Object(dict[str, Any]):
    """A JSON object that knows which names stand twice, in it or in one of its objects."""

    twice: frozenset[str] = frozenset()


def _object_of(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    inner = [value.twice for value in found.values() if isinstance(value, _Object)]
    if len(found) < len(pairs) or any(inner):
        counts = Counter(name for name, _ in pairs)
        found.twice = frozenset(name for name, count in counts.items() if count > 1).union(*inner)
    return found


def members(path: Path, noun: str, remedy: str, skipped: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """The members of a file that is one JSON object of objects, by name.

    Args:
        noun: What one of them is.
        skipped: Takes what is wrong with each bad one, which is then left out. None: the first one ends the reading.

    Raises:
        AgileError: The file is no such object, or an empty one; or a member is bad: none, there twice, or as
            `row_value` says.
    """
    expected = f"a JSON object with one object per {noun}"
    table = parse_json(read_bytes(path, remedy), str(path), expected)
    if not isinstance(table, _Object) or not table:
        raise AgileError(f"{path}: expected {expected}, found {show(table)}.")
    found: dict[str, dict[str, Any]] = {}
    for name, member in table.items():
        where = f"{path}, {noun} {name!r}"
        with listing(skipped):
            if name in table.twice:
                raise AgileError(f"{where}: expected it once, found it again. Which one is right cannot be told.")
            if not isinstance(row_value(member, where), _Object):
                raise AgileError(f"{where}: expected an object, found {show(member)}.")
            found[name] = member
    return found


def row_value(row: Any, where: str) -> Any:
    """The JSON value of a row, which is that or the bytes of it.

    Raises:
        AgileError: It is no JSON, or longer than `MAX_ROW_BYTES` (its longest field is named), or holds text that is
            not UTF-8 (the field is named): JSON may spell lone surrogates, and broken bytes are kept as such. Or a
            field stands twice.
    """
    value = parse_json(row, where) if isinstance(row, bytes) else row
    named = value if isinstance(value, dict) else {}
    try:
        size = len(_in_utf8(value))
    except UnicodeEncodeError:
        broken = next((name for name, part in named.items() if not _is_text([name, part])), None)
        raise wrong(where, broken, "text in UTF-8", named.get(broken, value)) from None
    if isinstance(row, bytes):
        size = len(row)
    if size > MAX_ROW_BYTES:
        limit = f"a row of at most {MAX_ROW_BYTES:,} bytes"
        if not named:
            raise AgileError(f"{where}: expected {limit}, found {size:,}.")
        lengths = {name: len(_in_utf8(part)) for name, part in named.items()}
        longest = max(lengths, key=lambda name: lengths[name])
        raise AgileError(
            f"{where}, field {longest!r}: expected {limit}, found {size:,}, {lengths[longest]:,} of them in it."
        )
    if isinstance(value, _Object) and value.twice:
        raise AgileError(f"{where}, field {min(value.twice)!r}: expected it once, found it again.")
    return value


def _in_utf8(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _is_text(value: Any) -> bool:
    try:
        return bool(_in_utf8(value))
    except UnicodeEncodeError:
        return False


def read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AgileError(f"{path}: no such file; {remedy}.") from None
    except OSError as error:
        raise AgileError(f"{path}: cannot be read ({error.strerror}); expected a readable file.") from None


def parse_json(data: bytes, where: str, expected: str = "JSON in UTF-8") -> Any:
    """The value of a JSON text; bytes that are not UTF-8 become lone surrogates, whose field `row_value` names.

    Args:
        expected: What a file should hold that is empty.
    """
    text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    if not text.strip():
        raise AgileError(f"{where}: expected {expected}, found an empty file.")
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        raise AgileError(f"{where}: expected JSON in UTF-8, found {show(text[:1000])} ({error}).") from None


def field(row: Any, name: str, kind: type, where: str) -> Any:
    """The value of a field that must be there and of this type."""
    if not isinstance(row, dict):
        raise AgileError(f"{where}: expected an object with the field {name!r}, found {show(row)}.")
    if name not in row:
        raise AgileError(f"{where}, field {name!r}: expected {_NOUNS[kind]}, found no such field among {sorted(row)}.")
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong(where, name, _NOUNS[kind], value)
    return value


def optional_text(row: Any, name: str, where: str) -> str:
    """The text of a field that may be missing or null, and is then empty."""
    return "" if row.get(name) is None else str(field(row, name, str, where))


def wrong(where: str, name: str | None, expected: str, found: Any) -> AgileError:
    """What to raise for a field's value, or for a row that has no fields (`name` None)."""
    place = where if name is None else f"{where}, field {name!r}"
    return AgileError(f"{place}: expected {expected}, found {show(found)}.")


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def cut(stream_id: str, items: Sequence[Item], length: int | None) -> list[tuple[str, tuple[Item, ...]]]:
    """Runs of at most `length` questions in order, `<id>-0`, `<id>-1`, ..., or all as one under the id itself."""
    if length is None:
        return [(stream_id, tuple(items))]
    starts = range(0, len(items), length)
    return [(f"{stream_id}-{n}", tuple(items[i : i + length])) for n, i in enumerate(starts)]
