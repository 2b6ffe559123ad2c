"""Answers that were recorded: JSON lines of `id`, `model` and `choice` (or `answer`), such as an API's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agile.errors import AgileError
from agile.tasks.rows import field, lines, listing, row_value, wrong
from agile.types import Item


def read_answers(
    path: Path,
    model: str | None = None,
    skipped: list[str] | None = None,
    questions: Mapping[str, Item] | None = None,
) -> dict[str, str | None]:
    """What one model answered, by question id; None (null in the file) where no answer could be read of what it said.

    Args:
        model: Which one; may be left out where the file holds one alone.
        skipped: Takes what is wrong with each bad line, which is then left out. None: the first one ends the reading.
        questions: Some by id; of those with options a `choice` must be one of the letters. The file may answer others.

    Raises:
        AgileError: A line is malformed, answers a question again or chooses what is no option, or the file has no such
            model, or several.
    """
    answers: dict[str, dict[str, str | None]] = {}
    for where, line in lines(path, "expected recorded answers, one JSON object a line"):
        with listing(skipped):
            row = row_value(line, where)
            question = field(row, "id", str, where)
            name = "choice" if "choice" in row else "answer"
            answer = None if name in row and row[name] is None else field(row, name, str, where)
            options = questions[question].context.get("options") if questions and question in questions else None
            if name == "choice" and options and answer is not None and answer not in options:
                raise wrong(where, name, f"null or one of {', '.join(options)}", answer)
            whose = answers.setdefault(field(row, "model", str, where) if "model" in row else "", {})
            if question in whose:
                raise wrong(where, "id", "one answer of a model to a question", question)
            whose[question] = answer
    if model is None and len(answers) == 1:
        return next(iter(answers.values()))
    if model is None or model not in answers:
        found = ", ".join(map(repr, answers)) or "no answers"
        raise AgileError(f"{path}: expected answers of {'one model' if model is None else repr(model)}, found {found}.")
    return answers[model]
