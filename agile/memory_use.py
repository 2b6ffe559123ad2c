"""What memory held and how often it helped. Pure functions over sessions.

What bears on a question is defined twice. **By similarity**: an entry that the session was shown whose cosine to the
question is at least a threshold (`agent.similar`, the paper's 0.46), which needs no gold knowledge. **Exactly**, where
the task names the fact that settles a question (MiniShop's `settled_by`, ProductQA's `knowledge`): an entry that says
that knowledge, or the same question of the same product. Questions that no fact of memory can settle, as those that a
search answers, are left out of the exact count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agile.types import Item, MemoryKind, Retrieved, Session, Trajectory

SIMILAR = 0.46  # the paper's, of questions that are alike


@dataclass(frozen=True, slots=True)
class Use:
    """How memory served one session.

    Attributes:
        retrieved: Whether an entry that it was shown bears on the question.
        held: Whether memory held one, shown or not; None where that is not known.
        asked: Whether an expert answered.
        right: Whether the session was right; of an asked one that says nothing of memory.
    """

    kind: str
    position: int
    length: int
    retrieved: bool
    held: bool | None
    asked: bool
    right: bool


def settling_fact(item: Item) -> str | None:
    """The fact that settles a question and that memory can hold; empty if there is none, None if nobody knows."""
    context = item.context
    if "settled_by" in context:
        return str(context["settled_by"] or "")
    return str(context["knowledge"] or "") if "knowledge" in context else None


def settles(item: Item, entry: Retrieved) -> bool:
    """Whether an entry says the knowledge that settles the question, or answers the same question of the product."""
    found = entry.item
    if found.kind is MemoryKind.KNOWLEDGE:
        return bool(item.context.get("knowledge")) and found.text == item.context["knowledge"]
    return found.product == item.product and found.key == item.question


def bearing(session: Session, item: Item, similar: float = SIMILAR) -> list[int]:
    """Ids of the entries that a session was shown and that bear on its question: exactly, where the task knows."""
    if settling_fact(item) is None:
        return [e.item.id for e in _shown(session) if e.similarity >= similar]
    return [e.item.id for e in _shown(session) if settling_fact(item) and settles(item, e)]


def uses_by_similarity(trajectories: Iterable[Trajectory], similar: float = SIMILAR) -> list[Use]:
    """One use for each session: what it was shown bears on the question if it is similar enough."""
    return [
        _use(session, len(trajectory.sessions), any(e.similarity >= similar for e in _shown(session)), None)
        for trajectory in trajectories
        for session in trajectory.sessions
    ]


def exact_uses(trajectories: Iterable[Trajectory], items: Mapping[tuple[str, str], Item]) -> list[Use]:
    """One use for each session about a question of which the task names a settling fact.

    Memory holds the fact once a session of the stream has asked about a question that it settles.

    Args:
        items: Questions by stream and id, see `Session.key`.
    """
    uses = []
    for trajectory in trajectories:
        known: set[str] = set()
        for session in trajectory.sessions:
            item = items[session.key]
            if fact := settling_fact(item):
                retrieved = any(settles(item, entry) for entry in _shown(session))
                uses.append(_use(session, len(trajectory.sessions), retrieved, retrieved or fact in known))
                if session.advised and session.written:
                    known.add(fact)
    return uses


def memory_use(uses: Sequence[Use], bins: int = 8) -> dict[str, Any]:
    """Counts in all, by kind and over the stream; plain JSON values.

    Returns:
        The counts of `counts`, `by_type` (those of each kind) and `by_position` (those of equal parts of the stream,
        with `from` and `to` in [0, 1]).
    """
    parts = _grouped(uses, lambda use: use.position * bins // use.length)
    kinds = _grouped(uses, lambda use: use.kind)
    return {
        **counts(uses),
        "by_type": {kind: counts(kinds[kind]) for kind in sorted(kinds)},
        "by_position": [{"from": k / bins, "to": (k + 1) / bins, **counts(parts[k])} for k in sorted(parts)],
    }


def counts(uses: Sequence[Use]) -> dict[str, int | None]:
    """How many sessions: `n` in all.

    They part into `retrieved_right` and `retrieved_wrong` (answered without asking), `retrieved_asked` (asked all the
    same) and `not_retrieved`. Of the last, `not_retrieved_right` answered right by themselves, `not_retrieved_asked`
    asked, and `missed` had an entry in memory that bore on them and was not shown (None where that is not known).
    """
    shown = [use for use in uses if use.retrieved]
    others = [use for use in uses if not use.retrieved]
    return {
        "n": len(uses),
        "retrieved_right": sum(use.right and not use.asked for use in shown),
        "retrieved_wrong": sum(not use.right and not use.asked for use in shown),
        "retrieved_asked": sum(use.asked for use in shown),
        "not_retrieved": len(others),
        "not_retrieved_right": sum(use.right and not use.asked for use in others),
        "not_retrieved_asked": sum(use.asked for use in others),
        "missed": None if any(use.held is None for use in others) else sum(bool(use.held) for use in others),
    }


def _grouped(uses: Sequence[Use], key: Callable[[Use], Any]) -> dict[Any, list[Use]]:
    groups: dict[Any, list[Use]] = {}
    for use in uses:
        groups.setdefault(key(use), []).append(use)
    return groups


def _use(session: Session, length: int, retrieved: bool, held: bool | None) -> Use:
    return Use(session.kind, session.index, length, retrieved, held, session.advised, bool(session.correct))


def _shown(session: Session) -> list[Retrieved]:
    """The entries that stood in the prompt; a read may have found more."""
    shown = {number for number, _ in session.retrieved}
    return [entry for read in session.reads for entry in read.entries if entry.item.id in shown]
