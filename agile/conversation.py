"""What was said before a question: earlier turns are data of the item, in its context under `turns`.

A turn is a pair of a role, `user` or `assistant`, and a text in one line; the oldest comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agile.types import Item

TURNS = "turns"
MOST_TURNS = 20
Turn = Sequence[str]


def in_full(question: str, known: Mapping[str, Any]) -> str:
    """A question after those that the user asked before it: in other words nobody else could tell what it means.

    >>> in_full("and the red one ?", {"turns": [["user", "is p1 warm ?"], ["assistant", "yes"]]})
    'is p1 warm ? and the red one ?'
    """
    before = [text for role, text in known.get(TURNS, ()) if role == "user"]
    return " ".join([*before, question])


def shown_turns(item: Item, most: int) -> list[str]:
    """A line for each of the last turns before a question."""
    turns = item.context.get(TURNS, ())
    return [f"{'user' if role == 'user' else 'agent'}: {text}" for role, text in turns[max(0, len(turns) - most) :]]


def last_turns(turns: Sequence[Turn], max_chars: int) -> list[list[str]]:
    """The newest turns that fit, each in one line.

    >>> last_turns([("user", "a" * 9), ("assistant", "b  c"), ("user", " ")], 9)
    [['assistant', 'b c']]
    """
    kept: list[list[str]] = []
    for role, text in reversed(turns):
        line = " ".join(text.replace("\0", "").split())
        max_chars -= len(line)
        if max_chars < 0 or len(kept) == MOST_TURNS:
            break
        if line:
            kept.append([role, line])
    return kept[::-1]
