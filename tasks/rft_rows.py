"""Rows of reinforcement fine-tuning files, and every check of them: each problem with its line and a remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agile.errors import AgileError
from agile.extras import needs
from agile.tasks.graders.models import Grader, Multi, read_json, templates
from agile.tasks.graders.template import MissingVariable, Variable, parse, render
from agile.tasks.rows import MAX_ROW_BYTES, lines

Role = Literal["user", "assistant"]
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_SHOWN = 40  # problems of one go


@dataclass(frozen=True, slots=True)
class MessageRow:
    """One line: `messages` of role and text, and every further key as the grader's `item`."""

    line: int
    messages: tuple[Mapping[str, str], ...]
    item: Mapping[str, Any]


def raise_all(problems: Sequence[str]) -> None:
    """One error that lists all problems.

    Raises:
        AgileError: There is any.
    """
    if not problems:
        return
    shown = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    rest = [f"  ... and {len(problems) - MAX_SHOWN:,} more"] if len(problems) > MAX_SHOWN else []
    what = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    raise AgileError("\n".join([f"The files cannot be used, {what}:", *shown, *rest]))


def read_rows(path: Path, last: Role, problems: list[str], *, max_items: int | None = None) -> list[MessageRow]:
    """The rows of a file; what is wrong with the others goes to `problems`.

    Args:
        last: Whose message ends each row: the user's where the model is to answer, the assistant's to be imitated.
    """
    rows: list[MessageRow] = []
    before = len(problems)
    try:
        found = list(lines(path, 'expected JSON lines such as {"messages": [{"role": "user", "content": "..."}]}'))
    except AgileError as error:
        problems.append(str(error))
        return []
    for where, line in found[:max_items]:
        try:
            rows.append(_row(line, where, last))
        except AgileError as error:
            problems.append(str(error))
    if not found and len(problems) == before:
        problems.append(f"{path} is empty: expected one row a line, each with messages.")
    return rows


def _row(line: bytes, where: str, last: Role) -> MessageRow:
    if len(line) > MAX_ROW_BYTES:
        raise AgileError(f"{where}: {len(line):,} bytes, expected at most {MAX_ROW_BYTES:,}. Shorten it.")
    try:
        value = read_json(line.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise AgileError(f"{where}: is not UTF-8. Save the file as UTF-8.") from None
    if not isinstance(value, dict):
        raise AgileError(f"{where}: expected an object with messages, found {_show(value)}.")
    given = value.pop("messages", None)
    if not isinstance(given, list) or not given:
        found = "none" if given is None else _show(given)
        raise AgileError(f"{where}: messages: expected a list of messages, found {found}. Add them.")
    messages = tuple(_message(message, f"{where}, message {n}") for n, message in enumerate(given, 1))
    if (role := messages[-1]["role"]) != last:
        remedy = (
            "the model is to answer it: take the answer out of messages and keep it as a column for the grader"
            if role == "assistant"
            else "it is what the model answers"
            if last == "user"
            else "it is what is imitated"
        )
        raise AgileError(f"{where}: the last message is the {role}'s, expected the {last}'s; {remedy}.")
    return MessageRow(int(where.rpartition(" ")[2]), messages, value)


def _message(value: Any, where: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise AgileError(f"{where}: expected an object with role and content, found {_show(value)}.")
    if value["role"] not in ROLES:
        raise AgileError(f"{where}: role is {_show(value['role'])}, expected one of {', '.join(ROLES)}.")
    if strange := value.keys() - {"role", "content", "name", "weight"}:
        raise AgileError(f"{where}: {min(strange)!r} is not supported; expected role and content alone. Take it out.")
    content = value["content"]
    if isinstance(content, list):  # parts, of which only text can be shown
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        content = None if not all(isinstance(part, str) for part in parts) else "".join(map(str, parts))
    if not isinstance(content, str):
        raise AgileError(f"{where}: content is {_show(value['content'])}, expected text; nothing else is read.")
    return {"role": value["role"], "content": content}


def in_both(
    train: Path, train_rows: Sequence[MessageRow], validation: Path, validation_rows: Sequence[MessageRow]
) -> Iterator[str]:
    """Rows of validation whose messages are trained on."""
    known = {_key(row): row.line for row in train_rows}
    for row in validation_rows:
        if (line := known.get(_key(row))) is not None:
            yield (
                f"{validation}, line {row.line}: its messages stand in {train}, line {line}, too: what is trained on "
                "validates nothing. Take it out of one of them."
            )


def _key(row: MessageRow) -> str:
    """Equal for the same messages, but for white space."""
    return json.dumps([[m["role"], " ".join(m["content"].split())] for m in row.messages])


def missing_variables(grader: Grader, path: Path, rows: Sequence[MessageRow]) -> Iterator[str]:
    """Variables of the grader's templates that a row does not have."""
    parts = grader.graders.values() if isinstance(grader, Multi) else [grader]
    texts = [text for part in parts for text in templates(part)]
    sources = {v.source for text in texts for v in parse(text) if isinstance(v, Variable) and v.namespace == "item"}
    for row in rows:
        for source in sorted(sources):
            try:
                render(source, row.item, {})
            except MissingVariable as problem:
                yield f"{path}, line {row.line}: {problem}, which the grader reads. Add it, or mend the grader."


# --------------------------------------------------------------------------------------------------------------------


def read_response_format(path: Path) -> Mapping[str, Any] | None:
    """The JSON schema of a `response_format` file, of the hosted API's shape; None where any text may come.

    Raises:
        AgileError: It is of another shape, or its schema is none.
    """
    try:
        value = read_json(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise AgileError(f"Cannot read the response format {path}: {error}. Give a JSON file.") from None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = value.get("json_schema") if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise AgileError(
            f'{path}: expected {{"type": "json_schema", "json_schema": {{"name": "...", "schema": {{...}}}}}}, found '
            f"{_show(value)}."
        )
    with needs("graders"):
        import jsonschema
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        at = ".".join(map(str, error.absolute_path)) or "the schema"
        raise AgileError(f"{path}: json_schema.schema is no JSON schema: {at}: {error.message}. Mend it.") from None
    return schema


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
