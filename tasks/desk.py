"""Questions that people asked a server, with the answers that people gave or confirmed, as a task to learn from.

A line of the file is one question: `id`, `question`, `answer`, `group`, `product`, `context` (what was known of it),
and who said so, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agile.protocols import Task, Tool
from agile.tasks.rows import cut, field, lines, read_items
from agile.tasks.scoring import AdviceCounts, fold, question_reward
from agile.types import Item, Reward, Session, Stream

QUESTIONS = "desk.jsonl"
SERVED = "served"  # kind of these questions
FILES = "expected the file that a run of task.desk writes to its folder"


class DeskTask:
    """Train questions of a server; tools, and questions to test on, are those of the task that was served.

    An answer is right if it is what people said, letter case and white space folded. Questions of one group are a
    stream, in the order in which they were asked, or several. A stream is endless, as to the agent that is served.

    Args:
        data: The file of questions.
        shop: The task that was served.
        stream_length: Most questions of a stream; None for all.

    Raises:
        AgileError: The file is missing or malformed. It is read when first asked for.
    """

    macro = False

    def __init__(
        self, data: Path, shop: Task, *, stream_length: int | None = None, advice_counts: AdviceCounts = "always"
    ) -> None:
        self.data, self.shop = data, shop
        self.stream_length, self.advice_counts = stream_length, advice_counts
        self._train: tuple[Stream, ...] = ()

    @property
    def tools(self) -> Mapping[str, Tool]:
        return self.shop.tools

    @property
    def skipped(self) -> Sequence[str]:
        return self.shop.skipped

    def streams(self, split: str) -> Sequence[Stream]:
        """What people asked (`train`), or the streams of the task that was served."""
        if split != "train":
            return self.shop.streams(split)
        if not self._train:
            items = read_items(lines(self.data, FILES), _parse, self.data)
            groups: dict[str, list[Item]] = {}
            for item in items:
                groups.setdefault(item.group, []).append(item)
            self._train = tuple(
                Stream(name, part, endless=True)
                for group, asked in groups.items()
                for name, part in cut(f"{SERVED}-{group}", asked, self.stream_length)
            )
        return self._train

    def score(self, item: Item, session: Session) -> Reward | Awaitable[Reward]:
        if item.kind != SERVED:
            return self.shop.score(item, session)
        return question_reward(session, lambda answer: self.is_correct(item, answer, False), self.advice_counts)

    def is_correct(self, item: Item, answer: str | None, used_search: bool) -> bool:
        """Whether people say so."""
        if item.kind != SERVED:
            return self.shop.is_correct(item, answer, used_search)
        return answer is not None and fold(answer) == fold(item.answer)

    def tool_answer(self, item: Item) -> str | None:
        """Of the task that was served; nobody noted what a tool says to these questions."""
        return None if item.kind == SERVED else self.shop.tool_answer(item)


def _parse(row: Any, where: str) -> Item:
    texts = [field(row, name, str, where) for name in ("id", "question", "answer", "group", "product")]
    question_id, question, answer, group, product = texts
    return Item(question_id, question, answer, SERVED, group, product, field(row, "context", dict, where))
