"""What loaders of questions share: rows of files, checks that name file, line, field, what was expected and what was
found, and bad rows that are left out on request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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
) -> tuple[Item, ...]:
    """The questions of a file, in its order.

    Args:
        rows: Where each stands, and its JSON value, or the bytes of it: see `lines` and `entries`.
        parse: Makes a question of a row; `AgileError` if it cannot.
        max_items: How many to read; None for all.
        skipped: Takes what is wrong with each bad row, which is then left out. None: the first one ends the reading.

    Raises:
        AgileError: A row is bad or has an id that another one has, or no row is left.
    """
    items: list[Item] = []
    places: dict[str, str] = {}
    for where, row in rows:
        if len(items) == max_items:
            break
        try:
            item = parse(_value(row, where), where)
            if item.id in places:
                raise wrong(where, "id", f"an id that is not yet used ({places[item.id]} has it)", item.id)
        except AgileError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        places[item.id] = where.removeprefix(f"{path}, ")
        items.append(item)
    if not items:
        what = f"{len(skipped)} bad ones, the last: {skipped[-1]}" if skipped else "an empty file"
        raise AgileError(f"{path}: expected one question a row, found {what}. Copy it again from the release.")
    return tuple(items)


def lines(path: Path, remedy: str = "expected a file with one JSON object a line") -> Iterator[tuple[str, bytes]]:
    """The lines of a file but blank ones, each with where it stands."""
    for number, line in enumerate(read_bytes(path, remedy).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def entries(path: Path, remedy: str = "expected a file with a JSON list") -> Iterator[tuple[str, Any]]:
    """The entries of a file that is one JSON list, each with where it stands, counted from 1."""
    values = parse_json(read_bytes(path, remedy), str(path))
    if not isinstance(values, list):
        raise AgileError(f"{path}: expected a JSON list, found {show(values)}.")
    for number, value in enumerate(values, 1):
        yield f"{path}, entry {number}", value


def _value(row: Any, where: str) -> Any:
    """The JSON value of a row; one that is too long is named by its longest field."""
    value = parse_json(row, where) if isinstance(row, bytes) else row
    size = len(row if isinstance(row, bytes) else json.dumps(row))
    if size > MAX_ROW_BYTES:
        limit = f"a row of at most {MAX_ROW_BYTES:,} bytes"
        if not isinstance(value, dict) or not value:
            raise AgileError(f"{where}: expected {limit}, found {size:,}.")
        longest = max(value, key=lambda name: len(json.dumps(value[name])))
        length = len(json.dumps(value[longest]))
        raise AgileError(f"{where}, field {longest!r}: expected {limit}, found {size:,}, {length:,} of them in it.")
    return value


def read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AgileError(f"{path}: no such file; {remedy}.") from None
    except OSError as error:
        raise AgileError(f"{path}: cannot be read ({error.strerror}); expected a readable file.") from None


def parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AgileError(
            f"{where}: expected JSON in UTF-8, found {show(data[:1000].decode(errors='replace'))} ({error})."
        ) from None


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


def wrong(where: str, name: str, expected: str, found: Any) -> AgileError:
    """What to raise for a field's value."""
    return AgileError(f"{where}, field {name!r}: expected {expected}, found {show(found)}.")


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def cut(stream_id: str, items: Sequence[Item], length: int | None) -> list[tuple[str, tuple[Item, ...]]]:
    """Runs of at most `length` questions in order, `<id>-0`, `<id>-1`, ..., or all as one under the id itself."""
    if length is None:
        return [(stream_id, tuple(items))]
    starts = range(0, len(items), length)
    return [(f"{stream_id}-{n}", tuple(items[i : i + length])) for n, i in enumerate(starts)]
