"""Text similarity: each metric on texts whose value is known."""

from __future__ import annotations

import builtins
from typing import Any, get_args

import pytest

from agile.errors import AgileError
from agile.tasks.graders.models import Metric
from agile.tasks.graders.similarity import similarity

CAT = "the cat sat on the mat"
QUICK = [
    ("fuzzy_match", "abcd", "abcd", 1.0),
    ("fuzzy_match", "abcd", "abce", 0.75),  # 2 * 3 common / 8
    ("fuzzy_match", "abcd", "wxyz", 0.0),
    ("fuzzy_match", "ABCD", "abcd", 0.0),
    ("bleu", CAT, CAT, 1.0),
    ("bleu", "cat", "cat", 1.0),  # of no more n-grams than there are
    ("bleu", "dog", "cat", 0.0),
    ("bleu", "the cat", "the dog", 0.5),  # unigrams 1/2; bigrams 0/1, smoothed to 1/2
]
# With nltk, which takes many seconds to import, or a model.
SLOW = [
    ("gleu", CAT, CAT, 1.0),
    ("gleu", "the cat", "the dog", 1 / 3),  # of 2 unigrams and a bigram
    ("gleu", "dog", "cat", 0.0),
    ("meteor", "a b c d", "a b c d", 1 - 0.5 / 4**3),  # one chunk of four
    ("meteor", "cats", "cat", 0.5),  # by stem; one chunk of one
    ("meteor", "dog", "cat", 0.0),
    ("rouge_1", "the cat", "the dog ran", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
    ("rouge_1", "Cat!", "cat", 1.0),
    ("rouge_1", "猫 犬", "猫 鳥", 0.5),
    ("rouge_2", CAT, "the cat sat", 2 * (2 / 5) * 1 / (2 / 5 + 1)),
    ("rouge_2", "cat", "cat", 0.0),  # no bigram
    ("rouge_3", CAT, CAT, 1.0),
    ("rouge_4", "a b c d e", "a b c d x", 0.5),
    ("rouge_5", "a b c d e", "a b c d e", 1.0),
    ("rouge_l", "a x b y c", "a b c", 2 * (3 / 5) / (3 / 5 + 1)),
    ("rouge_l", "c b a", "a b c", 1 / 3),
    ("cosine", CAT, CAT, 1.0),
]


@pytest.mark.parametrize(("metric", "text", "reference", "expected"), QUICK)
def test_likeness(metric: Metric, text: str, reference: str, expected: float) -> None:
    assert similarity(metric, text, reference) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "text", "reference", "expected"), SLOW)
def test_likeness_of_heavier_libraries(metric: Metric, text: str, reference: str, expected: float) -> None:
    assert similarity(metric, text, reference) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_cosine_tells_meanings_apart() -> None:
    near = similarity("cosine", "A man is eating food.", "Someone has a meal.")
    far = similarity("cosine", "A man is eating food.", "The stock market fell sharply.")
    assert 0 <= far < 0.3 < near <= 1


@pytest.mark.parametrize("metric", get_args(Metric))
def test_blank_texts_need_no_library(metric: Metric) -> None:
    assert similarity(metric, "", "  ") == 1.0
    assert similarity(metric, "x", "") == similarity(metric, "\n", "x") == 0.0


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("rapidfuzz"):
            raise ModuleNotFoundError("No module named 'rapidfuzz'", name="rapidfuzz")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(AgileError, match=r"rapidfuzz is not installed.*agile-agents\[graders\]"):
        similarity("fuzzy_match", "a", "b")
