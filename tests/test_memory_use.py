"""What memory held and how often it helped, by hand."""

from dataclasses import replace
from typing import Any

from agile.memory_use import Use, bearing, counts, exact_uses, memory_use, settling_fact, uses_by_similarity
from agile.types import (
    Advice,
    Item,
    MemoryItem,
    MemoryKind,
    MemoryRead,
    Retrieved,
    Reward,
    Session,
    SessionStatus,
    Trajectory,
)


def session(
    index: int, entries: list[Retrieved], *, asked: bool = False, right: bool = True, written: tuple[int, ...] = ()
) -> Session:
    return Session(
        id=f"s/{index}",
        stream_id="s",
        index=index,
        item_id=f"q{index}",
        kind="fact",
        seed=0,
        segments=(),
        steps=(),
        retrieved=tuple((e.item.id, e.similarity) for e in entries),
        written=written,
        advice=Advice("yes") if asked else None,
        answer="yes",
        status=SessionStatus.COMPLETED,
        reward=Reward({"correct": float(right or asked)}),
        reads=(MemoryRead(tuple(entries)),),
    )


def item(index: int, **context: Any) -> Item:
    return Item(f"q{index}", "is it heavy ?", "yes", "fact", "shop", "p1", context)


def entry(number: int, similarity: float, product: str = "p1", **values: Any) -> Retrieved:
    values = {"kind": MemoryKind.HISTORY, "key": "is it heavy ?", "text": "is it heavy ? -> yes", **values}
    return Retrieved(MemoryItem(**values, group="shop", product=product, id=number), similarity)


def test_settling_facts() -> None:
    assert settling_fact(item(0, settled_by="p1/heavy")) == "p1/heavy"
    assert settling_fact(item(0, settled_by="")) == "" == settling_fact(item(0, knowledge=""))
    assert settling_fact(item(0, knowledge="steel is heavy")) == "steel is heavy"
    assert settling_fact(item(0)) is None


def test_exact_and_by_similarity_differ() -> None:
    """Asked and kept; shown the fact; shown another product's; not shown, though memory has it; no fact settles it."""
    trajectory = Trajectory(
        "s",
        (
            session(0, [], asked=True, written=(1,)),
            session(1, [entry(1, 1.0)]),
            session(2, [entry(2, 1.0, product="p2")], right=False),
            session(3, [], right=False),
            session(4, [entry(1, 0.2)]),
        ),
    )
    items = {("s", f"q{k}"): item(k, settled_by="" if k == 4 else "p1/heavy") for k in range(5)}
    exact = exact_uses([trajectory], items)
    assert [(u.retrieved, u.held) for u in exact] == [(False, False), (True, True), (False, True), (False, True)]
    assert counts(exact) == {
        "n": 4,
        "retrieved_right": 1,
        "retrieved_wrong": 0,
        "retrieved_asked": 0,
        "not_retrieved": 3,
        "not_retrieved_right": 0,
        "not_retrieved_asked": 1,
        "missed": 2,
    }
    near = uses_by_similarity([trajectory])
    assert [u.retrieved for u in near] == [False, True, True, False, False]
    assert counts(near)["retrieved_wrong"] == 1 and counts(near)["missed"] is None
    assert [bearing(s, items[s.key]) for s in trajectory.sessions] == [[], [1], [], [], []]
    assert bearing(trajectory.sessions[2], item(2)) == [2]  # where the task says nothing, similarity does


def test_knowledge_settles_by_its_words() -> None:
    known = entry(1, 0.1, kind=MemoryKind.KNOWLEDGE, key="k", text="steel is heavy", product="")
    trajectory = Trajectory("s", (session(0, [known]),))
    assert exact_uses([trajectory], {("s", "q0"): item(0, knowledge="steel is heavy")})[0].retrieved
    assert not exact_uses([trajectory], {("s", "q0"): item(0, knowledge="wood is heavy")})[0].retrieved


def test_streams_may_share_ids() -> None:
    known = entry(1, 0.1, kind=MemoryKind.KNOWLEDGE, key="k", text="steel is heavy", product="")
    trajectories = [Trajectory(stream, (replace(session(0, [known]), stream_id=stream),)) for stream in ("s", "t")]
    facts = {"s": "steel is heavy", "t": "wood is heavy"}
    items = {(stream, "q0"): item(0, knowledge=fact) for stream, fact in facts.items()}
    assert [use.retrieved for use in exact_uses(trajectories, items)] == [True, False]


def test_what_was_read_but_not_shown_does_not_count() -> None:
    found = session(0, [])
    hidden = Trajectory("s", (replace(found, reads=(MemoryRead((entry(1, 1.0),)),)),))
    assert not uses_by_similarity([hidden])[0].retrieved


def test_the_threshold_itself_is_similar_enough() -> None:
    trajectory = Trajectory("s", (session(0, [entry(1, 0.46)]), session(1, [entry(1, 0.459)])))
    assert [u.retrieved for u in uses_by_similarity([trajectory])] == [True, False]


def test_advice_that_was_not_kept_is_not_held() -> None:
    """Such as advice that could not be read."""
    trajectory = Trajectory("s", (session(0, [], asked=True), session(1, [], right=False)))
    items = {("s", f"q{k}"): item(k, settled_by="p1/heavy") for k in range(2)}
    assert [u.held for u in exact_uses([trajectory], items)] == [False, False]


def test_counts_part_the_sessions() -> None:
    uses = [
        Use("a", k, 8, retrieved, None, asked, right)
        for k, (retrieved, asked, right) in enumerate(
            (r, a, c) for r in (False, True) for a in (False, True) for c in (False, True)
        )
    ]
    found = memory_use(uses)
    parts = ("retrieved_right", "retrieved_wrong", "retrieved_asked", "not_retrieved")
    assert sum(found[p] for p in parts) == found["n"] == 8
    assert [p["n"] for p in found["by_position"]] == [1] * 8 and list(found["by_type"]) == ["a"]
