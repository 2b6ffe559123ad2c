"""Reading a free text as one of the options of a multiple-choice question."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from agile.tasks.scoring import fold
from agile.types import Item

_OPENING = re.compile(
    r"^\W*(?:so|thus|therefore|hence)?[,\s]*(?:my|the)?\s*(?:final|correct|right|best)?\s*(?:answer|ans|option|choice)\b"
    r"\s*(?:is|would be|[:=.\-])?\s*(?:option|choice)?\s*[:=\-]?\s*",
    re.IGNORECASE,
)
_CLAIM = re.compile(
    r"\banswer\s*(?:is|would be|[:=])\s*:?\s*(?:option|choice)?\s*[(\[\"'*]*([A-Za-z])(?=$|[\s.,:;)\]\"'*])",
    re.IGNORECASE,
)
_LETTER = re.compile(r"^[(\[{\"'*]*([A-Za-z])[)\]}\"'*]*(?:\s*[.:)]|\s+-)?[\s*)]*(.*)$", re.DOTALL)
_MARK = re.compile(r"^[(\[{\"'*]*[A-Za-z](?:[)\]}*]+|[)\]}\"'*]*\s*[.:)]|\s+-\s)")  # more than a letter and a space
_ALTERNATIVE = re.compile(r"^[\s)\]*\"'.]*(?:or|and|and/or|/|,|&)\s*[(\[*\"']*[A-Za-z](?![A-Za-z])", re.IGNORECASE)


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text chooses, or None if it chooses none, or more than one.

    Understood are the letter (`B`, `b`, `(b)`, `B.`), the letter and more (`B: text`, `B because ...` after `the answer
    is`), the words of one option alone, and each of these after words such as `The answer is`. A letter goes before
    words, where an option's words are another's letter (blood group `A` as option B). A letter with the words of
    another option is no choice.

    Args:
        options: The words of each option by its letter, `A` and on.

    >>> options = {"A": "Iron", "B": "Copper sulphate", "C": "Zinc", "D": "Iron and zinc"}
    >>> [read_choice(t, options) for t in ("B", "(b)", "B: Copper sulphate", "copper sulphate.", "The answer is B.")]
    ['B', 'B', 'B', 'B', 'B']
    >>> [read_choice(t, options) for t in ("", "E", "A or B", "B: Zinc", "A metal", "not zinc")]
    [None, None, None, None, None, None]
    """
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    claims = {c[1].upper() for c in _CLAIM.finditer(text) if _is_letter(c[1], text[c.end() :], options)}
    if len(claims) > 1:
        return None
    if (found := _read(text, options)) is not None:
        return found
    if opening := _OPENING.match(text):
        return _read(text[opening.end() :], options, told=True)
    return claims.pop() if claims else None


def in_words(item: Item) -> str:
    """The gold answer in words: letters mean other options in other questions.

    >>> in_words(Item("1", "Which?", "B", "chemistry", context={"options": {"A": "Zinc", "B": "Iron"}}))
    'Iron'
    """
    options, answer = item.context.get("options") or {}, str(item.answer)
    return answer if answer in options.values() else options.get(answer, answer)


def may_repeat(items: Sequence[Item]) -> NDArray[np.bool_]:
    """Whether item i can be answered with what item j was answered, (n, n): with options, if it is one of them."""
    possible = np.ones((len(items), len(items)), np.bool_)
    words = np.array([fold(in_words(item)) for item in items])
    for i, item in enumerate(items):
        if options := item.context.get("options"):
            possible[i] = np.isin(words, [fold(option) for option in options.values()])
    return possible


def _read(text: str, options: Mapping[str, str], *, told: bool = False) -> str | None:
    """The choice if the whole text is one; `told`: words before it said that an answer comes."""
    match = _LETTER.match(text)
    letter, rest = (match[1].upper(), match[2]) if match else ("", "")
    if letter in options and not _fold(rest):
        return letter
    if (of_words := _option(text, options)) is not None:
        return of_words
    if match is None or letter not in options:
        return None
    after = text[match.end(1) :]
    if after[0].isalnum() or after[0] == "-" or _ALTERNATIVE.match(after):  # a word, or more than one letter
        return None
    if _option(rest, options) not in (None, letter):
        return None
    same = _fold(rest) == _fold(options[letter])
    marked = _MARK.match(text) is not None or (told and match[1].isupper())
    return letter if same or marked else None


def _is_letter(letter: str, after: str, options: Mapping[str, str]) -> bool:
    """Whether a single letter after `answer is` means an option: `a` before a word is the article."""
    if letter.upper() not in options or _ALTERNATIVE.match(after):
        return False
    return letter.isupper() or not re.match(r"\s+\w", after)


def _option(text: str, options: Mapping[str, str]) -> str | None:
    """The one option of these words."""
    same = [letter for letter, words in options.items() if _fold(words) == _fold(text)] if _fold(text) else []
    return same[0] if len(same) == 1 else None


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .\"'*")
