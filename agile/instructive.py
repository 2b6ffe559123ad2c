"""Which sessions teach most about an agent. A pure function over what is known of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from agile.calibration import Belief
from agile.types import Session

NUM_SESSIONS = 20

WRONG = "Wrong and confident"
NEEDLESS = "Asked and need not have"
LEARNT = "Learnt once, used later"
FIRST = "The first of their kind"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A session worth reading: what it is an example of, and why it is one."""

    heading: str
    why: str
    session: Session


def instructive(
    sessions: Sequence[Session],
    beliefs: Mapping[str, Belief],
    bore: Mapping[str, Collection[int]],
    num: int = NUM_SESSIONS,
) -> list[Chosen]:
    """At most `num` sessions by heading: about a third for each of the three headings, in this order.

    *Wrong and confident*: answered by itself, wrong, the most confident first. *Asked and need not have*: it asked, and
    the answer that it would have given is right, the most confident first. *Learnt once, used later*: a session that
    wrote what later ones were shown and answered right without asking, that of most such sessions first, each followed
    by the first of them. Where a heading has too few, the others have more; what then is left goes to the first
    session of each kind of question, asked and not.

    Args:
        sessions: In order of their streams.
        beliefs: By session id; a session without one is neither of the first two.
        bore: Ids of the entries that a session was shown and that bore on its question, by session id.
    """
    known = [(s, beliefs[s.id]) for s in sessions if s.id in beliefs]
    wrong = [
        Chosen(WRONG, f"It gave its answer a probability of {b.confidence:.0%} and was wrong.", s)
        for s, b in sorted(known, key=lambda pair: -pair[1].confidence)
        if not b.asked and not b.right
    ]
    needless = [
        Chosen(NEEDLESS, f"Made to answer it is right, with a probability of {b.confidence:.0%}.", s)
        for s, b in sorted(known, key=lambda pair: -pair[1].confidence)
        if b.asked and b.right
    ]
    pools = [wrong, needless, _learnt(sessions, bore)]
    chosen = _shared(pools, num)
    taken = {c.session.id for c in chosen}
    firsts: dict[tuple[str, bool], Session] = {}
    for session in sessions:
        firsts.setdefault((session.kind, session.advised), session)
    rest = [
        Chosen(FIRST, f"The first question of kind {s.kind} that it {'asked about' if s.advised else 'answered'}.", s)
        for s in firsts.values()
        if s.id not in taken
    ]
    return chosen + rest[: num - len(chosen)]


def _shared(pools: Sequence[Sequence[Chosen]], num: int) -> list[Chosen]:
    """At most `num` of all pools, shared as evenly as they are large; no session twice."""
    takes = [0] * len(pools)
    while sum(takes) < num and any(take < len(pool) for take, pool in zip(takes, pools, strict=True)):
        fewest = min((take, k) for k, take in enumerate(takes) if take < len(pools[k]))[1]
        takes[fewest] += 1
    taken = [c for take, pool in zip(takes, pools, strict=True) for c in pool[:take]]
    return list({c.session.id: c for c in taken}.values())


def _learnt(sessions: Sequence[Session], bore: Mapping[str, Collection[int]]) -> list[Chosen]:
    """Writers, each followed by the first session that used what it wrote."""
    writers = {(s.stream_id, number): s for s in sessions if s.advised for number in s.written}
    readers: dict[str, list[Session]] = {}
    for session in sessions:
        if session.correct and not session.advised:
            known = {writers[key].id for n in bore.get(session.id, ()) if (key := (session.stream_id, n)) in writers}
            for writer_id in known:
                readers.setdefault(writer_id, []).append(session)
    by_id = {s.id: s for s in sessions}
    found = []
    for writer_id, users in sorted(readers.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        times = f"{len(users)} later session{'s' if len(users) > 1 else ''}"
        why = f"What it wrote was shown to {times} that did not ask and were right."
        found.append(Chosen(LEARNT, why, by_id[writer_id]))
        found.append(Chosen(LEARNT, f"It was shown what {writer_id} had learnt, and did not ask.", users[0]))
    return found
