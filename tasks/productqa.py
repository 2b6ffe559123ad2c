"""ProductQA (arXiv 2405.14751): the official files, its streams and its scoring rules.

A folder holds `product_qa.db` and `<split>/<group>/{schema.json,metadata.json,qa.jsonl}`; MiniShop writes the same.
"""

from __future__ import annotations

import difflib
import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.tasks.rows import field, lines, listing, members, read_items, show, wrong
from agile.tasks.scoring import AdviceCounts, fold, question_reward
from agile.tools.sql import SqlSearch
from agile.types import Item, Reward, Session, Stream

DATABASE = "product_qa.db"
SEARCH_ACTION = "SearchProduct"
TYPES = ("search_qa", "fact_qa", "reasoning_qa")
FILES = "a product group is schema.json, metadata.json and qa.jsonl"


def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
    """Whether an answer is right by the official short-answer rules (the data set's `eval.py`).

    A search question (its gold answer is a list) is right if both sets of product ids are empty, or if the predicted
    one is not empty and within the gold set; ids are parted by commas or white space, `none` is the empty set. Any
    other answer must equal the gold one, letter case and white space folded, and must not come from a search.

    >>> search = Item("1", "Which are red?", ["B01", "B02"], "search")
    >>> is_correct(search, "B02", True), is_correct(search, "B02, B03", True), is_correct(search, "none", True)
    (True, False, False)
    >>> is_correct(Item("2", "Is it red?", "Yes", "fact"), " yes", False)
    True
    """
    if answer is None:
        return False
    if isinstance(item.answer, list):
        predicted = set() if fold(answer) == "none" else set(re.findall(r"[^\s,]+", answer))
        return predicted <= set(item.answer) if predicted else not item.answer
    return not used_search and fold(answer) == fold(item.answer)


class ProductQA:
    """Questions about the products of a shop, one stream per product group, in file order.

    Args:
        data: Folder of the official layout.
        train_groups, test_groups: Groups to read of that split, in this order; none named means all, sorted by name.
        max_items: Read only the first so many questions of each group.
        macro: Whether reports weigh every group alike.
        advice_counts: When an advised session is right, see `agile.tasks.scoring`.
        skip_bad_rows: Whether bad lines of qa.jsonl, and bad products, are left out and listed in `skipped`, not an
            error.

    Attributes:
        search: The tool that the gold SQL is written for.
        tools: It, by the name of its action.
        skipped: What is wrong with each line and product that was left out.

    Raises:
        AgileError: A folder, file, line or field is missing or malformed; the message names it, what was expected
            and what was found. Splits are read when first asked for.
    """

    def __init__(
        self,
        data: Path,
        train_groups: Sequence[str] | None = None,
        test_groups: Sequence[str] | None = None,
        max_items: int | None = None,
        *,
        macro: bool = False,
        advice_counts: AdviceCounts = "always",
        skip_bad_rows: bool = False,
    ) -> None:
        if max_items is not None and max_items < 1:
            raise AgileError(f"ProductQA: max_items is {max_items}; expected at least 1, or nothing for all questions.")
        self.data, self.max_items = Path(data), max_items
        self.database = self.data / DATABASE
        self._groups = {"train": train_groups, "test": test_groups}
        self._streams: dict[str, tuple[Stream, ...]] = {}
        self.search = SqlSearch(self.database)
        self.tools = {SEARCH_ACTION: self.search}
        self.macro, self.advice_counts = macro, advice_counts
        self.skipped: list[str] = []
        self._skipped = self.skipped if skip_bad_rows else None
        with closing(sqlite3.connect(f"{self.database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            self._tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}

    def streams(self, split: str) -> Sequence[Stream]:
        """The groups of `train`, `test` or any other folder of the data set, read once."""
        if split not in self._streams:
            folder = self.data / split
            names = self._groups.get(split) or _folders(folder)
            self._streams[split] = tuple(self._read(folder, name) for name in names)
        return self._streams[split]

    def _read(self, folder: Path, group: str) -> Stream:
        if not (folder / group).is_dir():
            near = difflib.get_close_matches(group, found := _folders(folder), 1) or found[:1]
            raise AgileError(f"{folder / group}: no such product group; did you mean {near[0]!r}? There are {found}.")
        if group not in self._tables:
            raise AgileError(
                f"{self.database}: expected a table {group!r} for the products of {folder / group}, found none "
                f"among its {len(self._tables)}. Database and questions must be of one release."
            )
        return Stream(group, _read_group(folder / group, self.search.columns(group), self.max_items, self._skipped))

    def score(self, item: Item, session: Session) -> Reward:
        """See `agile.tasks.scoring`; an answer after a search is judged as such, an expert's is not."""
        searched = session.called(SEARCH_ACTION) and not session.advised
        return question_reward(session, lambda answer: is_correct(item, answer, searched), self.advice_counts)

    @staticmethod
    def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
        """See the function of this name."""
        return is_correct(item, answer, used_search)

    def tool_answer(self, item: Item) -> str | None:
        """What the search tool answers to a search question's gold SQL.

        None for other questions, and where the gold SQL fails (`ORDER BY recharge_time ASE`, in 48 train questions).
        """
        if not isinstance(item.answer, list):
            return None
        result = self.search.search(item.context["sql"], item.group)
        return result.text if result.ok else None


def _folders(folder: Path) -> list[str]:
    """Names of the groups of a split, sorted."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise AgileError(
            f"{folder}: expected a folder with one folder per product group, found "
            f"{'an empty one' if folder.is_dir() else 'none'}. Set task.data to the folder that holds it."
        )
    return names


def _read_group(
    folder: Path, columns: Sequence[str], max_items: int | None, skipped: list[str] | None
) -> tuple[Item, ...]:
    schema = members(folder / "schema.json", "feature", FILES, skipped)
    products: dict[str, dict[str, str]] = {}
    for asin, features in members(folder / "metadata.json", "product", FILES, skipped).items():
        where = f"{folder / 'metadata.json'}, product {asin!r}"
        with listing(skipped):
            field(features, "title", str, where)
            for name, value in features.items():
                if value is not None and not isinstance(value, str):
                    raise wrong(where, name, "text or null", value)
            products[asin] = {name: value for name, value in features.items() if value is not None}
    path = folder / "qa.jsonl"

    def parse(row: Any, where: str) -> Item:
        return _parse(row, folder.name, schema, columns, products, where)

    return read_items(lines(path, FILES), parse, path, max_items=max_items, skipped=skipped)


def _product_of(products: Mapping[str, Any]) -> str:
    return f"a product of metadata.json ({len(products)} products)"


def _parse(
    row: Any,
    group: str,
    schema: Mapping[str, Any],
    columns: Sequence[str],
    products: Mapping[str, Mapping[str, str]],
    where: str,
) -> Item:
    """One line of qa.jsonl; features that the shop does not know (null) are left out of the metadata."""
    if not isinstance(row, dict):
        raise AgileError(f"{where}: expected a JSON object, found {show(row)}.")
    row_id, asin, question, long_answer, row_type = (
        field(row, name, str, where) for name in ("id", "asin", "question", "long_answer", "type")
    )
    if row_type not in TYPES:
        raise wrong(where, "type", f"one of {', '.join(TYPES)}", row_type)
    if asin not in products:
        raise wrong(where, "asin", _product_of(products), asin)
    extra = row.get("extra_data")
    if extra is None:
        extra = {}
    elif not isinstance(extra, dict):
        raise wrong(where, "extra_data", "an object or null", extra)
    answer: str | list[str]
    if row_type == "search_qa":
        answer = [
            field(gold, "asin", str, f"{where}, short_answer {i}")
            for i, gold in enumerate(field(row, "short_answer", list, where))
        ]
        for i, gold in enumerate(answer):
            if gold not in products:
                raise wrong(f"{where}, short_answer {i}", "asin", _product_of(products), gold)
        field(extra, "sql", str, f"{where}, extra_data")
    else:
        answer = field(row, "short_answer", str, where)
        if row_type == "reasoning_qa":
            field(extra, "knowledge", str, f"{where}, extra_data")
    context = {
        "sql": "",
        "knowledge": "",
        **extra,
        "long_answer": long_answer,
        "title": products[asin]["title"],
        "metadata": products[asin],
        "schema": schema,
        "columns": columns,
    }
    kind = field({"kind": row_type.removesuffix("_qa"), **extra}, "kind", str, f"{where}, extra_data")
    return Item(f"{group}/{row_id}", question, answer, kind, group, asin, context)
