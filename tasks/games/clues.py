"""A clue puzzle in the manner of Temporal Clue: who did it, where and when, from statements that leave one answer.

One of four suspects did it, in one of four places, at one of four hours. Statements rule suspects out, tie suspects to
places and places to hours, some by what was, some by what was not. They are shuffled, and some are about people and
places that turn out not to matter.
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
        holds: Whether it was so, and nothing else, or was not so.
    """

    subject: str
    value: str
    holds: bool

    def __str__(self) -> str:
        if not self.value:
            return f"{self.subject} was away ."
        if self.subject in WHO:
            return f"{self.subject} {'was only in' if self.holds else 'was never in'} {self.value} ."
        return f"{self.subject} {'was open only at' if self.holds else 'was locked at'} {self.value} ."

    def allows(self, answer: Answer) -> bool:
        """Whether the answer agrees with it."""
        who, where, when = answer
        if not self.value:
            return who != self.subject
        found = where if self.subject == who else when if self.subject == where else None
        return found is None or (found == self.value) == self.holds


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
    answer = tuple(rng.choice(part) for part in PARTS)
    who, where, _ = answer
    statements = [Statement(name, "", False) for name in WHO if name != who]
    other_who, other_where = rng.choice([w for w in WHO if w != who]), rng.choice([w for w in WHERE if w != where])
    for subject, values, value in (
        (who, WHERE, where),
        (other_who, WHERE, rng.choice(WHERE)),
        (where, WHEN, answer[2]),
        (other_where, WHEN, rng.choice(WHEN)),
    ):
        if rng.random() < 0.5:
            statements.append(Statement(subject, value, True))
        else:
            statements += [Statement(subject, v, False) for v in values if v != value]
    rng.shuffle(statements)
    return Puzzle(tuple(statements), answer)


def read(text: str) -> tuple[str, ...] | None:
    """The parts of an answer as it was said; None if it does not name a suspect, a place and an hour in this order."""
    parts = tuple(text.split())
    return parts if len(parts) == 3 and all(p in of for p, of in zip(parts, PARTS, strict=True)) else None


def score(puzzle: Puzzle, text: str) -> float:
    """The share of the three parts that are right; 0 for what is no answer."""
    parts = read(text)
    return sum(a == b for a, b in zip(parts, puzzle.answer, strict=True)) / len(PARTS) if parts else 0.0


def follows(statements: Sequence[Statement], said: Sequence[str]) -> set[str]:
    """What the next part can be by what is said of the part before it, the suspects' by who was away."""
    part, about = PARTS[len(said)], [s for s in statements if (s.subject == said[-1] if said else not s.value)]
    if not said:
        return {name for name in part if name not in {s.subject for s in about}}
    about = [s for s in about if s.value]
    return {v for v in part if all((s.value == v) == s.holds for s in about)} if about else set()


def hasty(puzzle: Puzzle, rng: random.Random, *, care: float) -> str:
    """What a weak detective says: with probability `care` a part that follows, else the first of its kind that is read.

    A part follows from the part before it, right or wrong, as far as anything was said of that one.
    """
    said: list[str] = []
    for part in PARTS:
        left = follows(puzzle.statements, said)
        if len(left) == 1 and rng.random() < care:
            said += left
        else:
            said.append(next(word for word in str(puzzle).split() if word in part))
    return " ".join(said)
