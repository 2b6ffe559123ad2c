"""Copies of streams: apart in everything but their questions."""

import asyncio
from dataclasses import replace

import pytest

from agile.copies import copies, original_id
from agile.errors import AgileError
from agile.policies import HFPolicy
from agile.rollout import collect
from tests.doors import llama, make_executor, streams
from tests.worlds import ListMemory


def test_copies_stand_side_by_side_and_know_their_original() -> None:
    two = streams(2, 3)
    found = copies(two, 2)
    assert [s.id for s in found] == ["s0#0", "s0#1", "s1#0", "s1#1"]
    assert [original_id(s.id) for s in found] == ["s0", "s0", "s1", "s1"]
    assert all(
        copy.items == original.items for copy, original in zip(found, [two[0], two[0], *two[1:] * 2], strict=True)
    )


def test_one_copy_is_the_stream_itself() -> None:
    two = streams(2, 3)
    assert copies(two, 1) == two and original_id("s0") == "s0"
    assert original_id("page#top#3") == original_id("page#top") == "page#top"
    assert copies([replace(two[0], id="shop#1")], 1)[0].id == "shop#1"


def test_a_stream_that_is_named_like_a_copy_is_refused() -> None:
    with pytest.raises(AgileError, match=r"'shop#1' is named like a copy.*Rename"):
        copies([replace(streams(1, 1)[0], id="shop#1")], 2)


def test_copies_are_played_with_seeds_and_memories_of_their_own() -> None:
    memories = []

    def memory(stream: object) -> ListMemory:
        memories.append(ListMemory())
        return memories[-1]

    policy, two = HFPolicy(llama()), copies(streams(1, 4), 2)
    a, b = asyncio.run(collect(make_executor(), policy, two, memory, seed=0, max_failed=1.0))
    assert len(memories) == 2
    assert [s.item_id for s in a.sessions] == [s.item_id for s in b.sessions]
    assert not {s.id for s in a.sessions} & {s.id for s in b.sessions}
    assert not {s.seed for s in a.sessions} & {s.seed for s in b.sessions}
    assert [s.segments for s in a.sessions] != [s.segments for s in b.sessions]
