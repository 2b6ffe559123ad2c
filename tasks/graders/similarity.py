"""How alike two texts are, by the libraries of the extra `graders`, each imported when it is first asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from agile.extras import needs
from agile.memory.encoders import CachedEncoder, SentenceEncoder, make_encoder
from agile.tasks.graders.models import Metric


def similarity(metric: Metric, text: str, reference: str) -> float:
    """Likeness in [0, 1]; 1 for two blank texts, 0 for one.

    - `cosine`: of MiniLM embeddings, negative ones as 0
    - `fuzzy_match`: rapidfuzz's `ratio`
    - `bleu`: sacrebleu's sentence BLEU, of no more n-grams than the text has
    - `gleu`: nltk's sentence GLEU
    - `meteor`: nltk's METEOR by words and stems, without synonyms: WordNet is a download of its own
    - `rouge_N`, `rouge_l`: F1 of rouge-score without stemming, over words of all scripts

    Raises:
        AgileError: The library is not installed.
    """
    if not text.strip() or not reference.strip():
        return float(text.strip() == reference.strip())
    with needs("graders"):
        score = _score(metric, text, reference)
    return min(1.0, max(0.0, score))


def _score(metric: Metric, text: str, reference: str) -> float:
    match metric:
        case "cosine":
            a, b = _encoder().encode([text, reference])
            return float(a @ b)
        case "fuzzy_match":
            from rapidfuzz import fuzz

            return float(fuzz.ratio(text, reference)) / 100
        case "bleu":
            from sacrebleu.metrics.bleu import BLEU

            return float(BLEU(effective_order=True).sentence_score(text, [reference]).score) / 100
        case "gleu":
            from nltk.translate.gleu_score import sentence_gleu

            return float(sentence_gleu([_tokens(reference)], _tokens(text)))
        case "meteor":
            from nltk.translate.meteor_score import single_meteor_score

            return float(single_meteor_score(_tokens(reference), _tokens(text), wordnet=_NoSynonyms()))
        case _:
            kind = "rougeL" if metric == "rouge_l" else metric.replace("rouge_", "rouge")
            return float(_rouge(kind).score(reference, text)[kind].fmeasure)


@cache
def _encoder() -> CachedEncoder:
    return make_encoder(SentenceEncoder.BUNDLED)


@cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Words())


class _Words:
    """rouge-score's own tokens for English; it would drop all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


class _NoSynonyms:
    """In place of nltk's WordNet."""

    def synsets(self, word: str) -> Sequence[Any]:
        return ()


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)
