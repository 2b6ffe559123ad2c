"""HotPotQA (arXiv 1809.09600), distractor setting: the official files, its search and its scoring rules."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agile.errors import AgileError
from agile.tasks.rows import entries, field, read_items, show, wrong
from agile.tasks.scoring import AdviceCounts, question_reward
from agile.tasks.split import train_and_test
from agile.tools.passages import PASSAGES, SEPARATOR, PassageSearch, Rank
from agile.types import Item, Reward, Session, Stream

CLOSED = ("yes", "no", "noanswer")  # answers that share words with no other
TYPES = ("bridge", "comparison")
FILES = "the distractor files are hotpot_train_v1.1.json and hotpot_dev_distractor_v1.json"


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, without punctuation, articles and superfluous white space.

    >>> normalise("The  Beatles' \\"Help!\\"")
    'beatles help'
    """
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def exact_match(gold: str, answer: str) -> bool:
    """The official EM: whether both are the same once normalised."""
    return normalise(gold) == normalise(answer)


def f1(gold: str, answer: str) -> float:
    """The official F1 of the words of both, repeated ones as often as they stand; `yes`, `no` and `noanswer` match
    themselves alone.

    >>> f1("Eiffel Tower, Paris", "the Eiffel Tower")
    0.8
    """
    expected, found = normalise(gold), normalise(answer)
    if expected != found and (expected in CLOSED or found in CLOSED):
        return 0.0
    common = sum((Counter(expected.split()) & Counter(found.split())).values())
    if not common:
        return 0.0
    precision, recall = common / len(found.split()), common / len(expected.split())
    return 2 * precision * recall / (precision + recall)


class HotPotQA:
    """Questions over paragraphs of Wikipedia, two of which settle each.

    Right is an answer with exact match. A session that never answers, because it searched on until a limit ended it, is
    wrong: the first public code counts a session that ran out of searches as if an expert had answered it, right and
    paid for. Here advice is what an expert gave, and nothing else.

    Args:
        data: The official file to train on.
        test_data: The official file to test on; without one the last fifth of the questions of `data`.
        rank: How the search ranks paragraphs.
        stream_length: Questions of a stream; they share nothing, so short streams play more of them at once.
        max_items: Read only the first so many questions of each file.
        advice_counts: When an advised session is right, see `agile.tasks.scoring`.
        skip_bad_rows: Whether bad entries are left out and listed in `skipped`, not an error.

    Attributes:
        tools: The search.
        skipped: What is wrong with each entry that was left out.

    Raises:
        AgileError: A file, entry or field is missing or malformed. Files are read when first asked for.
    """

    macro = False

    def __init__(
        self,
        data: Path,
        test_data: Path | None = None,
        *,
        rank: Rank,
        stream_length: int = 10,
        max_items: int | None = None,
        advice_counts: AdviceCounts = "always",
        skip_bad_rows: bool = False,
    ) -> None:
        self.data, self.test_data = data, test_data
        self.stream_length, self.max_items, self.advice_counts = stream_length, max_items, advice_counts
        self.search = PassageSearch(rank)
        self.tools = {self.search.name: self.search}
        self.skipped: list[str] = []
        self._skipped = self.skipped if skip_bad_rows else None
        self._streams: dict[str, tuple[Stream, ...]] = {}

    def streams(self, split: str) -> Sequence[Stream]:
        """The questions of `train` or `test` in file order, read once."""
        if not self._streams:
            self._streams = train_and_test(self._read, self.data, self.test_data, self.stream_length)
        return self._streams[split]

    def _read(self, path: Path) -> tuple[Item, ...]:
        return read_items(
            entries(path, FILES), _parse, path, max_items=self.max_items, skipped=self._skipped, id_field="_id"
        )

    def score(self, item: Item, session: Session) -> Reward:
        return question_reward(session, lambda answer: self.is_correct(item, answer, False), self.advice_counts)

    @staticmethod
    def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
        """Exact match."""
        return answer is not None and exact_match(item.answer, answer)

    @staticmethod
    def figures(played: Sequence[tuple[Item, Session]]) -> dict[str, float]:
        """Means over sessions of exact match and F1: both 1 where advice counts as right, 0 where a session failed."""
        exact = [float(bool(s.correct)) for _, s in played]
        overlap = [
            right if s.advised or s.failed or s.answer is None else f1(item.answer, s.answer)
            for right, (item, s) in zip(exact, played, strict=True)
        ]
        return {"exact match": sum(exact) / len(exact), "f1": sum(overlap) / len(overlap)}

    @staticmethod
    def tool_answer(item: Item) -> str | None:
        """None: a search finds paragraphs, not answers."""
        return None


def _parse(row: Any, where: str) -> Item:
    """One entry; supporting facts are kept as titles, each once.

    The numbers of their sentences are not used: the official dev file has one that is out of range (sentence 902).
    """
    row_id, question, answer, kind = (field(row, name, str, where) for name in ("_id", "question", "answer", "type"))
    if kind not in TYPES:
        raise wrong(where, "type", f"one of {', '.join(TYPES)}", kind)
    if not answer.strip():
        raise wrong(where, "answer", "text that is not empty", answer)
    passages: list[str] = []
    by_title: dict[str, str] = {}
    twice: set[str] = set()
    for number, paragraph in enumerate(_filled(row, "context", where), 1):
        title, sentences = _pair(paragraph, list, f"{where}, context {number}")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise AgileError(f"{where}, context {number}: expected sentences of text, found {show(sentences)}.")
        passages.append(f"{title}{SEPARATOR}{' '.join(''.join(sentences).split())}")
        twice |= {title} & by_title.keys()
        by_title[title] = passages[-1]
    facts = _filled(row, "supporting_facts", where)
    titles = [_pair(fact, int, f"{where}, supporting_facts {n}")[0] for n, fact in enumerate(facts, 1)]
    for title in titles:
        if title not in by_title:
            raise wrong(where, "supporting_facts", f"a title of the context ({sorted(by_title)})", title)
        if title in twice:
            raise wrong(where, "supporting_facts", "a title that one paragraph alone has", title)
    context = {
        PASSAGES: tuple(passages),
        "supporting": {title: by_title[title] for title in titles},  # each once, in order
        "level": str(row.get("level", "")),
        "long_answer": "",
    }
    return Item(row_id, question, answer, kind, context=context)


def _filled(row: Any, name: str, where: str) -> list[Any]:
    if not (found := field(row, name, list, where)):
        raise wrong(where, name, "a list that is not empty", found)
    return list(found)


def _pair(value: Any, kind: type, where: str) -> tuple[str, Any]:
    """A title and what comes with it, as JSON lists of two hold them."""
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not isinstance(value[0], str)
        or not isinstance(value[1], kind)
    ):
        expected = "[title, [sentence, ...]]" if kind is list else "[title, number of the sentence]"
        raise AgileError(f"{where}: expected {expected}, found {show(value)}.")
    return value[0], value[1]
