"""What people can ask a trained agent about, and items for questions that stand in no data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agile.conversation import TURNS, Turn, in_full
from agile.errors import AgileError
from agile.protocols import Task
from agile.tasks.desk import DeskTask
from agile.tasks.jsonl import GROUP, JsonlTask
from agile.tasks.medmcqa import MedMCQA
from agile.types import Item

OPTIONS = "options"


def subjects(task: Task, name: str) -> dict[str, Item]:
    """What can be asked about: by name an item without a question, with what is known of it.

    Products are those of the first test stream; rows of a user's own table; subjects of MedMCQA. "" is for questions
    about nothing in particular, where these can be asked.

    Args:
        name: Of the task, for the error.

    Raises:
        AgileError: The questions of the task come with more than somebody who asks could give.
    """
    if isinstance(task, DeskTask):
        return subjects(task.shop, name)
    if isinstance(task, JsonlTask):
        return _own(task)
    items = task.streams("test")[0].items
    if isinstance(task, MedMCQA):
        known = {OPTIONS: {}, "long_answer": "", "reflection": ""}
        named = ["", *sorted({item.product for item in items})]
        return {product: Item("", "", "", "", items[0].group, product, known) for product in named}
    if "metadata" in items[0].context:
        return {item.product: _product(item) for item in items}
    raise AgileError(
        f"The agent learned {name}, whose questions each come with texts of their own that nobody could give with a "
        "question. Score it: agile bench."
    )


def _product(item: Item) -> Item:
    shown = {name: item.context[name] for name in ("metadata", "columns")}
    return Item("", "", "", "", item.group, item.product, {**shown, "sql": "", "knowledge": ""})


def _own(task: JsonlTask) -> dict[str, Item]:
    table = task.table
    rows: Mapping[str, Any] = table.rows if table is not None else {}
    named = {item.product for item in task.streams("test")[0].items}
    known = {"sql": "", "knowledge": "", "long_answer": "", "columns": () if table is None else table.columns}
    group = GROUP if table is None else table.name
    return {
        name: Item("", "", "", "", group, name, {**known, "metadata": dict(rows.get(name, {})), OPTIONS: {}})
        for name in dict.fromkeys(["", *rows, *sorted(named)])
    }


def meaning(question: str, known: Mapping[str, Any]) -> str:
    """The words that must be the same where two questions are to have one answer: a letter means its option alone.

    >>> meaning("Which ?", {"options": {"A": "iron", "B": "zinc"}})
    'Which ? A iron B zinc'
    """
    options: Mapping[str, str] = known.get(OPTIONS) or {}
    return " ".join([in_full(question, known), *(f"{letter} {text}" for letter, text in options.items())])


def question_about(
    subject: Item, item_id: str, question: str, kind: str, known: Mapping[str, Any] | None = None
) -> Item:
    """A question that somebody asks.

    Args:
        known: What goes with this question alone: `options` by letter, and `turns` before it.

    Raises:
        AgileError: There are options, but the agent knows none, or it chooses among options and there are none.
    """
    known = known or {}
    options: Mapping[str, str] = known.get(OPTIONS) or {}
    turns: Sequence[Turn] = known.get(TURNS) or ()
    context = dict(subject.context)
    if options and OPTIONS not in context:
        raise AgileError("Options cannot be chosen from: the agent answers questions about products.")
    if OPTIONS in context:
        if "metadata" not in context and len(options) < 2:
            raise AgileError("The agent chooses among options; give two or more, by the letters A, B, ...")
        context[OPTIONS] = dict(options)
        if "metadata" in context:
            context["metadata"] = {**context["metadata"], **options}
    if turns:
        context[TURNS] = turns
    return Item(item_id, question, "", kind, subject.group, subject.product, context)
