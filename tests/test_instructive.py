"""Which sessions a report shows."""

from dataclasses import replace

from agile.calibration import Belief
from agile.instructive import FIRST, LEARNT, NEEDLESS, WRONG, instructive
from agile.types import Session
from tests.test_memory_use import session


def belief(found: Session, confidence: float, right: bool) -> Belief:
    return Belief(found.id, found.kind, found.advised, 0.5, confidence, right)


def test_three_headings_and_their_order() -> None:
    """Wrong with .6 and .9; asked though sure with .8; session 3 taught 4 and 5."""
    sessions = [
        session(0, [], right=False),
        session(1, [], right=False),
        session(2, [], asked=True),
        session(3, [], asked=True, written=(7,)),
        session(4, []),
        session(5, []),
    ]
    told = {
        "s/0": belief(sessions[0], 0.6, False),
        "s/1": belief(sessions[1], 0.9, False),
        "s/2": belief(sessions[2], 0.8, True),
        "s/3": belief(sessions[3], 0.8, False),
        "s/4": belief(sessions[4], 0.9, True),
    }
    chosen = instructive(sessions, told, {"s/4": [7], "s/5": [7, 8]})
    assert [(c.heading, c.session.id) for c in chosen] == [
        (WRONG, "s/1"),
        (WRONG, "s/0"),
        (NEEDLESS, "s/2"),
        (LEARNT, "s/3"),
        (LEARNT, "s/4"),
    ]
    assert chosen[0].why == "It gave its answer a probability of 90% and was wrong."
    assert chosen[3].why == "What it wrote was shown to 2 later sessions that did not ask and were right."


def test_shares_are_even_and_what_is_left_goes_to_first_sessions() -> None:
    wrong = [session(k, [], right=False) for k in range(30)]
    asked = [session(30 + k, [], asked=True) for k in range(2)]
    told = {s.id: belief(s, 0.5, s.advised) for s in (*wrong, *asked)}
    chosen = instructive([*wrong, *asked], told, {}, 20)
    assert [c.heading for c in chosen] == [WRONG] * 18 + [NEEDLESS] * 2
    assert len({c.session.id for c in chosen}) == 20
    assert [c.session.id for c in chosen[:18]] == [f"s/{k}" for k in range(18)]
    few = instructive([session(0, []), session(1, [], asked=True), session(2, [])], {}, {})
    assert [(c.heading, c.session.id) for c in few] == [(FIRST, "s/0"), (FIRST, "s/1")]


def test_who_taught_most_comes_first() -> None:
    sessions = [session(0, [], asked=True, written=(1,)), session(1, [], asked=True, written=(2,))]
    sessions += [session(k, []) for k in (2, 3, 4)]
    chosen = instructive(sessions, {}, {"s/2": [1], "s/3": [2], "s/4": [2]})
    assert [c.session.id for c in chosen if c.heading == LEARNT] == ["s/1", "s/3", "s/0", "s/2"]


def test_readers_of_another_stream_learnt_nothing() -> None:
    writer = session(0, [], asked=True, written=(1,))
    reader = replace(session(1, []), id="t/1", stream_id="t")
    assert [c.heading for c in instructive([writer, reader], {}, {"t/1": [1]})] == [FIRST, FIRST]
