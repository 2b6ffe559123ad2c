"""Agents that do not learn: what a report must hold a trained agent against. No language model is called."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agile.calibrated import train
from agile.errors import AgileError
from agile.evaluate import Outcome, rates
from agile.memory.encoders import Encoder
from agile.protocols import AnswerKey
from agile.tasks.choices import in_words, may_repeat
from agile.tasks.scoring import fold
from agile.types import Item, Stream

NAMES = ("always_ask", "never_ask", "router", "recall", "calibrated_recall", "oracle")
SCOPES = ("product", "group")
THRESHOLDS = tuple(i / 20 for i in range(10, 21))  # .5 to 1

Swept = dict[tuple[str, float], list[Outcome]]  # by scope and threshold


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """How a baseline did, and what is to be said of it (plain JSON values)."""

    outcomes: list[Outcome]
    detail: Mapping[str, Any] = field(default_factory=dict)


def run_baselines(
    names: Sequence[str],
    train_streams: Sequence[Stream],
    test_streams: Sequence[Stream],
    prices: Sequence[float],
    encoder: Encoder,
    task: AnswerKey,
    seed: int = 0,
    *,
    macro: bool = False,
) -> dict[float, dict[str, BaselineRun]]:
    """Run the named baselines on the test streams at each price; `macro` as in `agile.evaluate.summarise`.

    Only `never_ask` and `calibrated_recall` read the train streams, only the latter and `recall` encode.

    Raises:
        AgileError: A name is unknown, or `oracle` is named for items without MiniShop's `settled_by`.
    """

    def always(run: BaselineRun) -> dict[float, BaselineRun]:
        return dict.fromkeys(prices, run)

    def recalls() -> dict[float, BaselineRun]:
        swept = sweep_recall(test_streams, encoder, task)
        return {price: best_recall(swept, price, macro) for price in prices}

    run: dict[str, Callable[[], dict[float, BaselineRun]]] = {
        "always_ask": lambda: always(BaselineRun(always_ask(test_streams))),
        "never_ask": lambda: always(never_ask(train_streams, test_streams, task)),
        "router": lambda: always(BaselineRun(router(test_streams, task))),
        "recall": recalls,
        "calibrated_recall": lambda: calibrated_recall(train_streams, test_streams, prices, encoder, task, seed),
        "oracle": lambda: {price: BaselineRun(oracle(test_streams, price, task)) for price in prices},
    }
    for name in names:
        if name not in run:
            near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.0)[0]
            raise AgileError(f"Unknown baseline {name!r}; did you mean {near!r}? There are {', '.join(NAMES)}.")
    found = {name: run[name]() for name in names}
    return {price: {name: found[name][price] for name in names} for price in prices}


def always_ask(streams: Sequence[Stream]) -> list[Outcome]:
    """Ask about everything: accuracy 1, score 1 - price."""
    return [_outcome(stream, i, correct=True, advised=True) for stream in streams for i in range(len(stream.items))]


def never_ask(train_streams: Sequence[Stream], streams: Sequence[Stream], task: AnswerKey) -> BaselineRun:
    """The tool where it helps, else the answer that the question's kind has most often in the train streams."""
    counts: dict[str, Counter[str]] = {}
    for item in (item for stream in train_streams for item in stream.items):
        if isinstance(item.answer, str):
            counts.setdefault(item.kind, Counter())[fold(item.answer)] += 1
    majority = {kind: counter.most_common(1)[0][0] for kind, counter in sorted(counts.items())}
    results = []
    for stream in streams:
        for i, item in enumerate(stream.items):
            answer = task.tool_answer(item)
            guess = majority.get(item.kind, "") if answer is None else answer
            results.append(_outcome(stream, i, task.is_correct(item, guess, answer is not None), advised=False))
    return BaselineRun(results, {"answers": majority})


def router(streams: Sequence[Stream], task: AnswerKey) -> list[Outcome]:
    """The tool where it helps, else ask."""
    results = []
    for stream in streams:
        for i, item in enumerate(stream.items):
            answer = task.tool_answer(item)
            correct = answer is None or task.is_correct(item, answer, True)
            results.append(_outcome(stream, i, correct, advised=answer is None))
    return results


def sweep_recall(streams: Sequence[Stream], encoder: Encoder, task: AnswerKey) -> Swept:
    """The router, but it repeats the answer of the most similar question it asked about, if that is similar enough.

    With options it looks at questions alone whose answer is one of them, in words.

    Returns:
        What it does at every scope (it looks among the earlier questions of the stream about the same product, or of
        the same group) and threshold of similarity.
    """
    swept: Swept = {(s, t): [] for s in SCOPES for t in THRESHOLDS}
    for stream in streams:
        routed = router([stream], task)
        asked = [i for i, outcome in enumerate(routed) if outcome.advised]
        items = [stream.items[i] for i in asked]
        vectors = encoder.encode([item.question for item in items])
        similarity = np.where(may_repeat(items), vectors @ vectors.T, -2.0)  # (n, n)
        for scope in SCOPES:
            for threshold, sources in zip(THRESHOLDS, _sources(similarity, items, scope), strict=True):
                results = list(routed)
                for i, item, source in zip(asked, items, sources, strict=True):
                    if source >= 0:
                        correct = task.is_correct(item, in_words(items[source]), False)
                        results[i] = _outcome(stream, i, correct, advised=False)
                swept[scope, threshold] += results
    return swept


def best_recall(swept: Swept, price: float, macro: bool = False) -> BaselineRun:
    """Recall at the scope and threshold that score best for this price, weighed as the report is (`macro`).

    They are chosen on these very streams, which favours the baseline.

    Returns:
        The outcomes at the best setting; `detail` holds its `scope` and `threshold`, and in `sweep` accuracy,
        advice rate and score of every setting.
    """
    reached = {setting: rates(results, price, macro) for setting, results in swept.items()}
    scope, threshold = max(reached, key=lambda setting: reached[setting]["score"])
    sweep = [{"scope": s, "threshold": t, **figures} for (s, t), figures in reached.items()]
    return BaselineRun(swept[scope, threshold], {"scope": scope, "threshold": threshold, "sweep": sweep})


def calibrated_recall(
    train_streams: Sequence[Stream],
    test_streams: Sequence[Stream],
    prices: Sequence[float],
    encoder: Encoder,
    task: AnswerKey,
    seed: int = 0,
) -> dict[float, BaselineRun]:
    """The router, but it answers from memory where a classifier trusts that, see `agile.calibrated`."""
    decided = train(train_streams, encoder, task, seed).decide(test_streams, prices)
    runs = {}
    for k, price in enumerate(prices):
        results: list[Outcome] = []
        for stream, decisions in zip(test_streams, decided, strict=True):
            routed = router([stream], task)
            for position, asks, right in zip(
                decisions.positions, decisions.asks[k].tolist(), decisions.right[k].tolist(), strict=True
            ):
                routed[position] = _outcome(stream, position, correct=asks or right, advised=asks)
            results += routed
        runs[price] = BaselineRun(results)
    return runs


def _sources(similarity: NDArray[np.float32], items: Sequence[Item], scope: str) -> NDArray[np.int64]:
    """Which earlier item each item takes its answer from at each threshold, -1 where it asks: (len(THRESHOLDS), n)."""
    scopes = [(item.group, item.product if scope == "product" else "") for item in items]
    codes = np.unique(np.array(scopes), axis=0, return_inverse=True)[1].reshape(-1)
    similarity = np.where(codes[:, None] == codes[None, :], similarity, -2.0)
    thresholds = np.array(THRESHOLDS) - 1e-5  # the cosine of a text with itself misses 1 by rounding
    sources = np.full((len(thresholds), len(items)), -1)
    for i in range(1, len(items)):
        # Only questions that were asked have an answer to repeat. argmax takes the earliest of equals, as memory does.
        known = np.where(sources[:, :i] < 0, similarity[i, :i], -2.0)
        nearest = known.argmax(axis=1)
        similar = known[np.arange(len(thresholds)), nearest] >= thresholds
        sources[:, i] = np.where(similar, nearest, -1)
    return sources


def oracle(streams: Sequence[Stream], price: float, task: AnswerKey) -> list[Outcome]:
    """What one who knows a MiniShop world's priors, reads all that is shown and forgets nothing achieves myopically.

    Each item's context names the fact that settles it (`settled_by`, equal for all items that it settles, empty if what
    is shown settles it), the likeliest answer (`guess`) and its probability (`prior`). Asking makes the fact known. An
    unknown fact is guessed if `prior` exceeds 1 - price, else asked about. The guess is scored as any answer.

    Raises:
        AgileError: An item without a tool lacks these keys.
    """
    results = []
    for stream in streams:
        known: set[Any] = {None, ""}
        for i, item in enumerate(stream.items):
            answer = task.tool_answer(item)
            if answer is not None:
                results.append(_outcome(stream, i, task.is_correct(item, answer, True), advised=False))
                continue
            if missing := [key for key in ("settled_by", "prior", "guess") if key not in item.context]:
                raise AgileError(
                    f"oracle: {item.id} has no {', '.join(missing)} in its context, as MiniShop writes it; leave the "
                    "oracle out of the baselines of other data."
                )
            settled = item.context["settled_by"] in known
            guesses = not settled and item.context["prior"] > 1 - price
            if not settled and not guesses:
                known.add(item.context["settled_by"])
            correct = not guesses or task.is_correct(item, item.context["guess"], False)
            results.append(_outcome(stream, i, correct, advised=not settled and not guesses))
    return results


def _outcome(stream: Stream, position: int, correct: bool, advised: bool) -> Outcome:
    item = stream.items[position]
    return Outcome(item.id, stream.id, position, len(stream.items), item.kind, correct, advised)
