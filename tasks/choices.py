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
    r"^\W*(?:so|thus|therefore|hence)?[,\s]*"
    r"(?:(?:my|the)?\s*(?:final|correct|right|best)?\s*(?:answer|ans|option|choice)\b\s*(?:is|would be|[:=.\-])?"
    r"|i(?:[\u2019']d|[\u2019']ll| would| will)?\s+(?:choose|pick|select|go\s+(?:with|for))\b)"
    r"\s*(?:(?:the\s+)?(?:option|choice|answer)\b)?\s*[:=\-]?\s*",
    re.IGNORECASE,
)
_FRAMED = re.compile(
    r"\\boxed\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?([^{}]*)\}|<answer>(.*?)</answer>", re.IGNORECASE
)
_CLAIM = re.compile(
    r"\banswer\s*(?:is|would be|[:=])\s*:?\s*(?:option|choice)?\s*[(\[\"'*]*([A-Za-z])(?=$|[\s.,:;)\]\"'*])",
    re.IGNORECASE,
)
_LETTER = re.compile(r"^[(\[{\"'*]*([A-Za-z])[)\]}\"'*]*(?:\s*[.,:)]|\s+-)?[\s*)]*(.*)$", re.DOTALL)
_MARK = re.compile(r"^[(\[{\"'*]*[A-Za-z](?:[)\]}*]+|[)\]}\"'*]*\s*[.,:)]|\s+-\s)")  # more than a letter and a space
_ALTERNATIVE = re.compile(
    r"^[\s)\]*\"'.]*(?:or|and|and/or|/|,|&)\s*(?:(?:option|choice)\s+)?[(\[*\"']*[A-Za-z](?![A-Za-z])", re.IGNORECASE
)
_RIGHT = re.compile(r"^[)\]}\"'*]*\s+is\s+(?:the\s+)?(?:correct|right|best)\b", re.IGNORECASE)


def read_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text chooses, or None if it chooses none, or more than one.

    Understood are the letter (`B`, `b`, `(b)`, `B.`), the letter and more (`B: text`, `B is correct`, `B because ...`
    after `the answer is`, `B` on a line of its own), the words of one option alone, and each of these after words such
    as `The answer is` or `I choose`. What stands in a frame, `\\boxed{B}` or `<answer>B</answer>`, goes before all
    else; a letter goes before words, where an option's words are another's letter (blood group `A` as option B). A
    letter with the words of another option is no choice.

    Args:
        options: The words of each option by its letter, `A` and on.

    >>> options = {"A": "Iron", "B": "Copper sulphate", "C": "Zinc", "D": "Iron and zinc"}
    >>> [read_choice(t, options) for t in ("B", "(b)", "B: Copper sulphate", "copper sulphate.", "The answer is B.")]
    ['B', 'B', 'B', 'B', 'B']
    >>> [read_choice(t, options) for t in ("", "E", "A or B", "B: Zinc", "A metal", "not zinc")]
    [None, None, None, None, None, None]
    """
    plain = unicodedata.normalize("NFKC", text).replace("**", "")
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip()]
    whole = " ".join(lines)
    if framed := {_said((match[1] or match[2] or "").strip(), options) for match in _FRAMED.finditer(whole)}:
        return framed.pop() if len(framed) == 1 else None
    if (found := _alone(whole, options)) is not None:
        return found
    claims = {c[1].upper() for c in _CLAIM.finditer(whole) if _is_letter(whole[c.start(1) :], options)}
    said: set[str] = set()
    named: set[str] = set()  # by its words alone behind the first line, as explanations and lists do
    for number, line in enumerate(lines):
        if (choice := _said(line, options)) is not None:
            (named if number and choice == _option(line, options) else said).add(choice)
    if len(said) == 1 and claims | named <= said:
        return said.pop()
    if len(claims) == 1 and len(said) != 1:  # the options are gone through, one a line, before the answer
        return claims.pop()
    return _said(whole, options) if not said and not claims else None


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


def _said(text: str, options: Mapping[str, str]) -> str | None:
    """The choice that a line is, or that stands in it after words such as `The answer is`."""
    if (found := _read(text, options)) is not None:
        return found
    opening = _OPENING.match(text)
    return _read(text[opening.end() :], options, told=True) if opening else None


def _alone(text: str, options: Mapping[str, str]) -> str | None:
    """The choice if the text is a letter, the words of an option, or a letter with its words, and nothing else."""
    match = _LETTER.match(text)
    letter, rest = (match[1].upper(), match[2]) if match else ("", "")
    if letter in options and not _fold(rest):
        return letter
    if (of_words := _option(text, options)) is not None:
        return of_words
    if match is None or letter not in options or not _parted(text[match.end(1) :]):
        return None
    return letter if _fold(rest) == _fold(options[letter]) else None


def _read(text: str, options: Mapping[str, str], *, told: bool = False) -> str | None:
    """The choice if the text is one, or begins with a letter that is meant as one.

    Args:
        told: Whether words before it said that an answer comes.
    """
    if (found := _alone(text, options)) is not None:
        return found
    match = _LETTER.match(text)
    if match is None or (letter := match[1].upper()) not in options or not _parted(text[match.end(1) :]):
        return None
    if _option(match[2], options) is not None:  # the words of another one
        return None
    meant = _MARK.match(text) or _RIGHT.match(text[match.end(1) :]) or (told and match[1].isupper())
    return letter if meant else None


def _parted(after: str) -> bool:
    """Whether what follows a letter leaves it one, and the only one: no word goes on, no second letter stands there."""
    return not (after[0].isalnum() or after[0] == "-" or _ALTERNATIVE.match(after))


def _is_letter(text: str, options: Mapping[str, str]) -> bool:
    """Whether a single letter after `answer is` means an option: `a` before a word is the article, `A line` may be an
    option itself, and the words of another option take the letter back."""
    letter, after = text[0].upper(), text[1:]
    if letter not in options or _ALTERNATIVE.match(after):
        return False
    if {_option(text, options), _option(after.lstrip(" .,:;)]-"), options)} - {None, letter}:
        return False
    return text[0].isupper() or not re.match(r"\s+\w", after)


def _option(text: str, options: Mapping[str, str]) -> str | None:
    """The one option of these words."""
    same = [letter for letter, words in options.items() if _fold(words) == _fold(text)] if _fold(text) else []
    return same[0] if len(same) == 1 else None


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .\"'*")
