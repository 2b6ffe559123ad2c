"""Calibrated recall: the strongest agent without a language model.

The tool where it helps. On all else it knows the questions that it asked an expert about, earlier in the stream, with
their answers. From these alone a gradient-boosted classifier, trained on the train streams, estimates whether the best
candidate answer is right, and the agent gives it where that is likelier than 1 - price; else it asks. So it shows what
a memory is worth to an agent that only has to know when to trust it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from agile.memory.encoders import Encoder
from agile.protocols import AnswerKey
from agile.tasks.choices import in_words, may_repeat
from agile.tasks.scoring import fold
from agile.types import Stream

MAX_TRAIN = 1000  # questions of a train stream, from its start: more of them take long to embed and change little
PLAYED_PRICES = (0.1, 0.2, 0.3, 0.4, 0.5)  # at which the train streams are played, for memories of every size
NUM_NEIGHBOURS = 8
NUM_COMMON = 2  # answers that the wording alone is judged by, the most frequent ones: yes and no
SHARPNESS = 10.0  # a neighbour's vote counts exp(10 * (cosine - 1/2))

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Codes = NDArray[np.int64]
Classifier = Callable[[Floats], NDArray[np.float64]]  # features (n, f) to probabilities of being right (n,)
Guesser = Callable[[Floats], Floats]  # embeddings (n, dim) to probabilities (n, classes)


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of a stream that no tool answers, n of them.

    Attributes:
        positions: Of each in its stream.
        similarity: Cosine of each pair, -1 where the first cannot have the answer of the second, (n, n).
        answers: Codes, (n,); those below NUM_COMMON are the common ones.
        products, kinds: Codes, (n,).
        guesses: What the wording alone tells: the probability of each kind but the first, then of each common answer
            and of any other, (n, kinds - 1 + NUM_COMMON + 1).
    """

    positions: list[int]
    vectors: Floats
    similarity: Floats
    answers: Codes
    products: Codes
    kinds: Codes
    guesses: Floats

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was decided about a stream's questions.

    Attributes:
        positions: Of the questions that no tool answers, in their stream.
        asks: Whether it asks, by price, (prices, n).
        right: Whether the best candidate is right, (prices, n).
    """

    positions: list[int]
    asks: Bools
    right: Bools


@dataclass(frozen=True, slots=True)
class CalibratedRecall:
    """What was learned from the train streams; it plays any others.

    Attributes:
        common: Codes of the common answers.
        kinds: Codes of the kinds of questions.
        guess: What the wording of questions tells, see `Questions.guesses`.
        classify: Whether candidates are right.
    """

    encoder: Encoder
    task: AnswerKey
    common: Mapping[str, int]
    kinds: Mapping[str, int]
    guess: Guesser
    classify: Classifier

    def decide(self, streams: Sequence[Stream], prices: Sequence[float]) -> list[Decisions]:
        """Play each stream at every price; each starts with an empty memory."""
        with threadpool_limits(1):
            questions = [_read(s, None, self.encoder, self.task, self.common, self.kinds) for s in streams]
            questions = [replace(q, guesses=self.guess(q.vectors)) for q in questions]
            asks, right, _ = _play(questions, [self.classify] * len(streams), prices)
        return [Decisions(q.positions, a, r) for q, a, r in zip(questions, asks, right, strict=True)]


def train(streams: Sequence[Stream], encoder: Encoder, task: AnswerKey, seed: int = 0) -> CalibratedRecall:
    """Learn from the first MAX_TRAIN questions of every train stream when an answer in memory can be trusted.

    The classifier learns from two kinds of memory: of all earlier questions, and of what an agent asks about that has
    learned from the first kind. Nothing is judged by what learned from it: of each half of the streams the other half
    tells what the wording means, and which questions are asked about. All runs on one thread, so that the same seed
    gives the same figures. Without train questions nothing is trusted.
    """
    items = [item for stream in streams for item in stream.items if isinstance(item.answer, str)]
    counts = Counter(fold(in_words(item)) for item in items if task.tool_answer(item) is None)
    common = {answer: code for code, (answer, _) in enumerate(counts.most_common(NUM_COMMON))}
    kinds = {kind: code for code, kind in enumerate(sorted({item.kind for item in items}))}
    with threadpool_limits(1):
        questions = [_read(stream, MAX_TRAIN, encoder, task, common, kinds) for stream in streams]
        questions = [q for q in questions if len(q)]
        if not questions:
            return CalibratedRecall(encoder, task, common, kinds, _no_guess, lambda features: np.zeros(len(features)))
        halves = [questions[::2], questions[1::2] or questions]
        guessers = [_guesser(half, len(kinds)) for half in halves]
        questions = [replace(q, guesses=guessers[1 - k % 2](q.vectors)) for k, q in enumerate(questions)]
        features, right = zip(*map(_with_all_known, questions), strict=True)
        firsts = [_boost(features[k::2] or features, right[k::2] or right, seed) for k in (0, 1)]
        played = _play(questions, [firsts[1 - k % 2] for k in range(len(questions))], PLAYED_PRICES)[2]
        classify = _boost([*features, played[0]], [*right, played[1]], seed)
        return CalibratedRecall(encoder, task, common, kinds, _guesser(questions, len(kinds)), classify)


def _read(
    stream: Stream,
    limit: int | None,
    encoder: Encoder,
    task: AnswerKey,
    common: Mapping[str, int],
    kinds: Mapping[str, int],
) -> Questions:
    """The questions of a stream, without `guesses`; answers are equal where letter case and white space are."""
    written = (i for i, item in enumerate(stream.items) if isinstance(item.answer, str))
    positions = list(islice((i for i in written if task.tool_answer(stream.items[i]) is None), limit))
    items = [stream.items[i] for i in positions]
    vectors = encoder.encode([item.question for item in items])
    codes, products = dict(common), dict[str, int]()
    for item in items:
        codes.setdefault(fold(in_words(item)), NUM_COMMON + len(codes))
    return Questions(
        positions,
        vectors,
        np.where(may_repeat(items), vectors @ vectors.T, -1).astype(np.float32),
        np.array([codes[fold(in_words(item))] for item in items], np.int64),
        np.array([products.setdefault(item.product, len(products)) for item in items], np.int64),
        np.array([kinds.get(item.kind, 0) for item in items], np.int64),
        np.zeros((len(items), 0), np.float32),
    )


def _no_guess(vectors: Floats) -> Floats:
    return np.full((len(vectors), NUM_COMMON + 1), 1 / (NUM_COMMON + 1), np.float32)


def _with_all_known(questions: Questions) -> tuple[Floats, Bools]:
    """Features of every question with a memory of all earlier ones, and whether the candidate is right."""
    found = [_look(questions, i, np.ones((1, i), np.bool_)) for i in range(len(questions))]
    candidates = np.concatenate([candidate for _, candidate in found])
    return np.concatenate([row for row, _ in found]), candidates == questions.answers


def _guesser(trains: Sequence[Questions], num_kinds: int) -> Guesser:
    """From the embedding of a question alone: of which kind it is, and whether its answer is a common one."""
    vectors = np.concatenate([q.vectors for q in trains])
    kind = _logistic(vectors, np.concatenate([q.kinds for q in trains]), num_kinds)
    answer = _logistic(vectors, np.minimum(np.concatenate([q.answers for q in trains]), NUM_COMMON), NUM_COMMON + 1)
    return lambda v: np.hstack([kind(v)[:, 1:], answer(v)])


def _logistic(vectors: Floats, labels: Codes, num_classes: int) -> Guesser:
    present = np.unique(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 60 steps are near enough, and nobody can do anything
        model: Any = LogisticRegression(max_iter=60).fit(vectors, labels) if len(present) > 1 else None

    def guess(new: Floats) -> Floats:
        chances = np.zeros((len(new), num_classes), np.float32)
        chances[:, present] = 1.0 if model is None or not len(new) else model.predict_proba(new)
        return chances

    return guess


def _boost(features: Sequence[Floats], right: Sequence[Bools], seed: int) -> Classifier:
    rows, labels = np.concatenate(features), np.concatenate(right)
    if labels.all() or not labels.any():
        return lambda new: np.full(len(new), float(labels[0]))
    model: Any = HistGradientBoostingClassifier(
        max_iter=200,
        learning_rate=0.06,
        min_samples_leaf=40,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=seed,
    ).fit(rows, labels)
    return lambda new: np.asarray(model.predict_proba(new)[:, 1], np.float64)


# --------------------------------------------------------------------------------------------------------------------
# Playing


def _play(
    streams: Sequence[Questions], classifiers: Sequence[Classifier], prices: Sequence[float]
) -> tuple[list[Bools], list[Bools], tuple[Floats, Bools]]:
    """Play streams side by side, each at every price: memory holds what was asked earlier, at that price.

    Args:
        classifiers: One for each stream.

    Returns:
        Whether it asks and whether the candidate is right, for each stream (prices, n); features and rightness of all.
    """
    asks = [np.zeros((len(prices), len(q)), np.bool_) for q in streams]
    right = [np.zeros((len(prices), len(q)), np.bool_) for q in streams]
    features: list[Floats] = []
    labels: list[Bools] = []
    bars = 1 - np.array(prices)
    for i in range(max(map(len, streams), default=0)):
        for classifier in dict.fromkeys(classifiers):
            live = [k for k, q in enumerate(streams) if i < len(q) and classifiers[k] is classifier]
            if not live:
                continue
            found = [_look(streams[k], i, asks[k][:, :i]) for k in live]
            chances = classifier(np.concatenate([rows for rows, _ in found])).reshape(len(live), -1)
            for k, chance, (rows, candidates) in zip(live, chances, found, strict=True):
                asks[k][:, i] = chance <= bars
                right[k][:, i] = candidates == streams[k].answers[i]
                features.append(rows)
                labels.append(right[k][:, i])
    if not features:
        return asks, right, (np.zeros((0, 1), np.float32), np.zeros(0, np.bool_))
    return asks, right, (np.concatenate(features), np.concatenate(labels))


def _look(q: Questions, i: int, known: Bools) -> tuple[Floats, Codes]:
    """What memories tell of question i: features (m, f), and the code of the best candidate answer (m,).

    Candidates are the answers of the nearest known questions and the common ones. Each neighbour votes for its answer,
    the wording for the common ones. The features: of each neighbour the cosine, whether it agrees with the candidate,
    is of the same product, and which common answer it gave; the votes for the candidate, for the next best, of all; the
    nearest of the same product; how much is known; what the wording tells; who contradicts.

    Args:
        known: Which of the earlier questions each of m memories holds, (m, i).
    """
    m, num = len(known), NUM_NEIGHBOURS
    each = np.arange(m)[:, None]
    width = max(i, num)
    cosines = np.full((m, width), -1.0, np.float32)
    cosines[:, :i] = np.where(known, q.similarity[i, :i], -1.0)
    answers, products = np.full(width, -1), np.full(width, -1)
    answers[:i], products[:i] = q.answers[:i], q.products[:i]

    nearest = np.argpartition(-cosines, num - 1, axis=1)[:, :num]
    nearest = nearest[each, np.argsort(-cosines[each, nearest], axis=1, kind="stable")]
    cosine = cosines[each, nearest]  # (m, num)
    there = cosine > -1
    given = np.where(there, answers[nearest], -1)
    vote = np.exp(SHARPNESS * (cosine - 0.5)) * there

    common = q.guesses[i, -NUM_COMMON - 1 : -1]
    options = np.hstack([given, np.broadcast_to(np.arange(NUM_COMMON), (m, NUM_COMMON))])
    votes = (vote[:, None, :] * (options[:, :, None] == given[:, None, :])).sum(2)
    for code, chance in enumerate(common):
        votes += np.where(options == code, chance, 0.0)
    votes = np.where(options < 0, -1.0, votes)
    best = votes.argmax(1)[:, None]
    candidate = options[each, best]  # (m, 1)
    against = np.where(options == candidate, -1.0, votes).max(1)
    everyone = vote.sum(1) + 1
    agrees = given == candidate
    contradicts = there & ~agrees

    same = np.where(products == q.products[i], cosines, -1.0)
    closest = same.argmax(1)[:, None]
    own = same[each, closest]
    own_answer = np.where(own > -1, answers[closest], -1)
    columns = (
        cosine,
        agrees,
        there & (products[nearest] == q.products[i]),
        np.where(given == 0, 1, np.where(given == 1, -1, 0)),
        votes[each, best] / everyone[:, None],
        against / everyone,
        np.log(everyone),
        own,
        own_answer == candidate,
        np.minimum(own_answer, NUM_COMMON),
        np.log1p(known.sum(1)),
        (same > -1).sum(1),
        np.broadcast_to(q.guesses[i], (m, q.guesses.shape[1])),
        q.guesses[i, -NUM_COMMON - 1 :][np.minimum(candidate, NUM_COMMON)],
        np.minimum(candidate, NUM_COMMON),
        (cosine * agrees).max(1),
        (vote * agrees).sum(1),
        contradicts.sum(1),
        np.where(contradicts, cosine, -1.0).max(1),
    )
    return np.column_stack(columns).astype(np.float32), candidate[:, 0]
