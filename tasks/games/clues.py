"""A clue puzzle in the manner of Temporal Clue: who did it, where and when, from statements that leave one answer.

One of four suspects did it, in one of four places, at one of four hours. Three were away; where each of them might have
been, and when each place might have been entered, is said by what was or by what was not. The statements are shuffled,
and most are about suspects and places that turn out not to matter. A statement is written as one word, which is one
token of a small vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

WHO = ("ann", "bob", "cleo", "dan")
WHERE = ("attic", "cellar", "hall", "library")
WHEN = ("seven", "eight", "nine", "ten")
PARTS = (WHO, WHERE, WHEN)
ALL = tuple(product(*PARTS))

Answer = tuple[str, str, str]  # who, where, when


@dataclass(frozen=True, slots=True)
class Statement:
    """What is known of a subject: where somebody was or was not, when a place was open or locked, or who was away.

    Attributes:
        value: The place of a suspect, or the hour of a place; "" for a suspect who was away.
        holds: Whether it was so, and nothing else; else it was not so.
    """

    subject: str
    value: str
    holds: bool

    def __str__(self) -> str:
        if not self.value:
            return f"{self.subject}-away"
        return f"{self.subject}{'' if self.holds else '-not'}-{'in' if self.subject in WHO else 'at'}-{self.value}"

    def allows(self, answer: Answer) -> bool:
        """Whether the answer agrees with it."""
        who, where, when = answer
        if not self.value:
            return who != self.subject
        found = where if self.subject == who else when if self.subject == where else None
        return found is None or (found == self.value) == self.holds


STATEMENTS = tuple(Statement(name, "", True) for name in WHO) + tuple(
    Statement(subject, value, holds)
    for subjects, values in ((WHO, WHERE), (WHERE, WHEN))
    for subject, value, holds in product(subjects, values, (True, False))
)  # all that can be stated


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Statements, and the one answer that they leave."""

    statements: tuple[Statement, ...]
    answer: Answer

    def __str__(self) -> str:
        return " ".join(str(s) for s in self.statements)


def solutions(statements: Sequence[Statement]) -> list[Answer]:
    """All answers that agree with the statements, by trying each."""
    return [answer for answer in ALL if all(s.allows(answer) for s in statements)]


def generate(rng: random.Random) -> Puzzle:
    """A puzzle with exactly one solution."""
    who, where, when = (rng.choice(part) for part in PARTS)
    statements = [Statement(name, "", True) for name in WHO if name != who]
    known = {name: rng.choice(WHERE) for name in WHO} | {place: rng.choice(WHEN) for place in WHERE}
    for subject, value in (known | {who: where, where: when}).items():
        if rng.random() < 0.5:
            statements.append(Statement(subject, value, True))
        else:
            statements += [Statement(subject, v, False) for v in (WHERE if subject in WHO else WHEN) if v != value]
    rng.shuffle(statements)
    return Puzzle(tuple(statements), (who, where, when))


def read(text: str) -> tuple[str, ...] | None:
    """The parts of an answer as it was said; None if it does not name a suspect, a place and an hour in this order."""
    parts = tuple(text.split())
    return parts if len(parts) == 3 and all(p in of for p, of in zip(parts, PARTS, strict=True)) else None


def score(puzzle: Puzzle, text: str) -> float:
    """The share of the three parts that are right; 0 for what is no answer."""
    parts = read(text)
    return sum(a == b for a, b in zip(parts, puzzle.answer, strict=True)) / len(PARTS) if parts else 0.0


def hasty(puzzle: Puzzle, rng: random.Random, *, care: float) -> str:
    """What a weak detective says, who may overlook that somebody was away or not there.

    Each part is looked up in the statements about the part before it. Where they say what was not so, it is what they
    leave with probability `care`, else what they mention, the first of those by the alphabet or the clock.
    """
    said: list[str] = []
    for part in PARTS:
        about = [s for s in puzzle.statements if (s.value and s.subject == said[-1] if said else not s.value)]
        named = [s.value or s.subject for s in about]
        if len(named) > 1 and rng.random() < care:
            named = [name for name in part if name not in named]
        said.append(min(named, key=part.index))
    return " ".join(said)
