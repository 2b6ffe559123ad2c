"""A user's own questions: a file of JSON lines and, if there is one, a table that answers can be looked up in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.tasks.choices import read_choice
from agile.tasks.rows import field, lines, optional_text, read_items, show, wrong
from agile.tasks.scoring import AdviceCounts, fold, question_reward
from agile.tasks.split import train_and_test
from agile.tools.sql import SqlSearch
from agile.tools.tables import Table, open_table
from agile.types import Item, Reward, Session, Stream

SEARCH_ACTION = "SearchProduct"
GROUP = "questions"  # the scope of memory where no table names it
FIELDS = ("question", "answer", "options", "context", "product", "id", "sql", "explanation")
REMEDY = "Write one question a line, see docs/your-own-data.md."
FILES = "expected a file of JSON lines with the fields question and answer, see docs/your-own-data.md"


class JsonlTask:
    """Questions in file order; all of them share one memory in each stream.

    An answer is right if it is the gold one, letter case and white space folded; with options also by its letter. Where
    the gold answer is a list (names that a search may find, parted by commas), an answer is right that names some of
    them and nothing else; an empty list is answered by `none`. A name may hold commas.

    Args:
        data: The file to train on.
        test_data: The file to test on; without one the last fifth of the questions of `data`.
        database: A table file or SQLite database, see `agile.tools.tables`; with it the agent can search by SQL, and
            `product` is the name of a row, whose columns are shown.
        stream_length: Questions of a stream; None for all in one.
        max_items: Read only the first so many questions of each file.
        advice_counts: When an advised session is right, see `agile.tasks.scoring`.
        skip_bad_rows: Whether bad lines are left out and listed in `skipped`, not an error.

    Attributes:
        table: What was read of `database`.
        tools: The search, if there is a table.
        skipped: What is wrong with each line that was left out.

    Raises:
        AgileError: A file, line or field is missing or malformed. Questions are read when first asked for.
    """

    macro = False

    def __init__(
        self,
        data: Path,
        test_data: Path | None = None,
        *,
        database: Path | None = None,
        stream_length: int | None = None,
        max_items: int | None = None,
        advice_counts: AdviceCounts = "always",
        skip_bad_rows: bool = False,
    ) -> None:
        self.data, self.test_data = data, test_data
        self.stream_length, self.max_items, self.advice_counts = stream_length, max_items, advice_counts
        self.table: Table | None = None
        self.tools: dict[str, SqlSearch] = {}
        if database is not None:
            self.table = open_table(database)
            self.tools = {SEARCH_ACTION: SqlSearch(self.table.database, key=self.table.columns[0])}
        self.skipped: list[str] = []
        self._skipped = self.skipped if skip_bad_rows else None
        self._streams: dict[str, tuple[Stream, ...]] = {}

    def streams(self, split: str) -> Sequence[Stream]:
        """The questions of `train` or `test`, read once."""
        if not self._streams:
            self._streams = train_and_test(self._read, self.data, self.test_data, self.stream_length)
        return self._streams[split]

    def _read(self, path: Path) -> tuple[Item, ...]:
        def parse(row: Any, where: str) -> Item:
            return _parse(row, where, self.table)

        return read_items(
            lines(path, FILES), parse, path, max_items=self.max_items, skipped=self._skipped, remedy=REMEDY
        )

    def score(self, item: Item, session: Session) -> Reward:
        """See `agile.tasks.scoring`; what cannot be read as one of the options is wrong, and marked."""
        options = item.context.get("options")
        return question_reward(
            session,
            lambda answer: is_correct(item, answer),
            self.advice_counts,
            readable=lambda answer: not options or read_choice(answer, options) is not None,
        )

    @staticmethod
    def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
        """See the function of this name."""
        return is_correct(item, answer)

    def tool_answer(self, item: Item) -> str | None:
        """What the table answers to the row's `sql`; None where it has none, or it fails."""
        if not item.context["sql"]:
            return None
        result = self.tools[SEARCH_ACTION].search(item.context["sql"], item.group)
        return result.text if result.ok else None


def is_correct(item: Item, answer: str | None) -> bool:
    """Whether an answer is right, see `JsonlTask`.

    >>> choice = Item("1", "Which?", "red wine", "choice", context={"options": {"A": "beer", "B": "red wine"}})
    >>> is_correct(choice, "(b)"), is_correct(choice, "B: red wine"), is_correct(choice, "Red Wine")
    (True, True, True)
    >>> names = Item("2", "Which are red?", ["Merlot", "Chianti"], "search")
    >>> is_correct(names, "chianti , merlot"), is_correct(names, "Merlot, Riesling"), is_correct(names, "none")
    (True, False, False)
    """
    if answer is None:
        return False
    if isinstance(item.answer, list):
        return _names_only(answer, item.answer)
    if options := item.context.get("options"):
        chosen = read_choice(answer, options)
        return chosen is not None and fold(options[chosen]) == fold(item.answer)
    return fold(answer) == fold(item.answer)


def _names_only(text: str, names: Sequence[str]) -> bool:
    """Whether a text is some of the names, parted by commas, which a name may hold too; `none` if there are none."""
    known = {_parts(name) for name in names} - {()} or {("none",)}
    parts = tuple(part for part in _parts(text) if part != "none" or ("none",) in known)
    ends = {0}  # up to where the text is names
    for start in range(len(parts)):
        if start in ends:
            ends |= {start + len(name) for name in known if parts[start : start + len(name)] == name}
    return len(parts) in ends and bool(parts or not names)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(fold, text.split(",")) if part)


def _parse(row: Any, where: str, table: Table | None) -> Item:
    question, answer = field(row, "question", str, where), row.get("answer")
    if not fold(question):
        raise wrong(where, "question", "text that is not empty", question)
    if unknown := [name for name in row if name not in FIELDS]:
        raise AgileError(f"{where}, field {unknown[0]!r}: no such field; expected some of {', '.join(FIELDS)}.")
    options = _options(row.get("options"), where)
    if isinstance(answer, list) and not options:
        if not all(isinstance(name, str) and fold(name) for name in answer):
            raise wrong(where, "answer", "text, or a list of texts", answer)
    else:
        answer = field(row, "answer", str, where)
        if not fold(answer):
            raise wrong(where, "answer", "text that is not empty", answer)
    if options:
        chosen = read_choice(answer, options)
        if chosen is None:
            raise wrong(where, "answer", f"one of the options {show(options)}, or its letter", answer)
        answer = options[chosen]
    product, sql = optional_text(row, "product", where), optional_text(row, "sql", where)
    if table is not None and product and product not in table.rows:
        raise wrong(
            where, "product", f"one of the {len(table.rows)} values of the column {table.columns[0]!r}", product
        )
    if sql and table is None:
        raise wrong(where, "sql", "none, for there is no table (task.database)", sql)
    explanation = optional_text(row, "explanation", where)
    shown = {**(table.rows.get(product, {}) if table else {}), **_context(row.get("context"), where), **options}
    context = {
        "sql": sql,
        "knowledge": explanation,
        "long_answer": explanation,
        "metadata": shown,
        "columns": () if table is None else table.columns,
        "options": options,
    }
    kind = "choice" if options else "search" if sql else "text"
    item_id = optional_text(row, "id", where) or where.rpartition(" ")[2]
    return Item(item_id, question, answer, kind, table.name if table else GROUP, product, context)


def _options(found: Any, where: str) -> dict[str, str]:
    """Letters and texts of the options; of a list the letters are A, B, ..."""
    if found is None:
        return {}
    if isinstance(found, list):
        found = {chr(ord("A") + i): text for i, text in enumerate(found)}
    if not isinstance(found, dict) or not 2 <= len(found) <= 26 or not all(re.fullmatch("[A-Z]", x) for x in found):
        raise wrong(where, "options", "2 to 26 texts, or an object of the letters A, B, ... and texts", found)
    if not all(isinstance(text, str) and fold(text) for text in found.values()):
        raise wrong(where, "options", "texts that are not empty", found)
    if len({fold(text) for text in found.values()}) < len(found):
        raise wrong(where, "options", "texts that differ", found)
    return found


def _context(found: Any, where: str) -> dict[str, str]:
    """What is known, as names and texts."""
    if found is None:
        return {}
    known = {"context": found} if isinstance(found, str) else found
    if not isinstance(known, dict) or not all(isinstance(text, str) for text in known.values()):
        raise wrong(where, "context", "text, or an object of names and texts", found)
    return {name: text for name, text in known.items() if text.strip()}
