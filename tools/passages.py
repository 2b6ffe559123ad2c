"""Search over the passages that come with a question: the best one that the session has not shown yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agile.types import Item, Observation, ToolResult

PASSAGES = "passages"  # the key in an item's context
MAX_SEARCHES = 5
NOTHING = "none"
SEPARATOR = " : "  # between a title and its text

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index

Rank = Callable[[str, Sequence[str]], NDArray[np.float64]]
"""Scores of passages for a query, the higher the better, shape (number of passages,)."""


class PassageSearch:
    """A tool that shows passages of the question one by one: the best hit that is not yet in the context.

    Args:
        rank: How well passages fit a query, see `dense` and `bm25`.
        name: The action that calls this tool.
        max_searches: Of one session; a further one is answered with an error.
    """

    def __init__(self, rank: Rank, *, name: str = "Search", max_searches: int = MAX_SEARCHES) -> None:
        self.rank = rank
        self.name = name
        self.max_searches = max_searches
        self.description = f"Find a passage; at most {max_searches} times."

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        """The best passage of `item.context["passages"]` that none of `earlier` shows; `none` if all are shown."""
        shown = [step.text for step in earlier if step.action.name == self.name and step.ok]
        if len(shown) >= self.max_searches:
            return ToolResult(f"error : all {self.max_searches} searches are used up\n", ok=False)
        hidden = [passage for passage in item.context[PASSAGES] if f"{passage}\n" not in shown]
        if not hidden:
            return ToolResult(f"{NOTHING}\n")
        best = int(np.argmax(self.rank(argument, hidden)))  # of equals the first
        return ToolResult(f"{hidden[best]}\n")


def embedded_texts(passages: Sequence[str]) -> list[str]:
    """What `dense` embeds of passages `title : text`: all of it, and the title alone."""
    return [*passages, *(passage.partition(SEPARATOR)[0] for passage in passages)]


def dense(encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> Rank:
    """The cosine of the query to a passage or to its title, whichever is larger: a title finds its passage.

    Args:
        encode: From texts to vectors of length 1.
    """

    def rank(query: str, passages: Sequence[str]) -> NDArray[np.float64]:
        vectors = encode([query, *embedded_texts(passages)])
        cosines = vectors[1:] @ vectors[0]
        return np.asarray(cosines.reshape(2, -1).max(axis=0), np.float64)

    return rank


def bm25(query: str, passages: Sequence[str]) -> NDArray[np.float64]:
    """BM25 of passages and of their titles, added up: a title finds its passage. Indexed over these passages alone."""
    titles = [passage.partition(SEPARATOR)[0] for passage in passages]
    return _bm25(query, passages) + _bm25(query, titles)


def _bm25(query: str, texts: Sequence[str]) -> NDArray[np.float64]:
    """By the library bm25s, Lucene's variant with English stop words."""
    import bm25s  # it loads numba where that is installed, and vLLM does not start in a process that has llvmlite

    words = bm25s.tokenize([query, *texts], stopwords="en", return_ids=False, show_progress=False)
    if not any(words[1:]):
        return np.zeros(len(texts))
    index = bm25s.BM25()
    index.index(words[1:], show_progress=False)
    known = [word for word in words[0] if word in index.vocab_dict]
    return np.asarray(index.get_scores(known), np.float64) if known else np.zeros(len(texts))
