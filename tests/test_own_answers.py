"""What the policy thinks of its answers, read from sessions."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from agile.measure import _examples
from agile.own_answers import beliefs, own_answers
from agile.play import Played
from agile.tokens import ActionCodec
from agile.types import Action, Completion, Fn, Item, Observation, Session, Source, Trajectory
from tests.worlds import item, make_codec, make_executor, play


class Unsure:
    """Asks, or answers, with a probability of .8; made to answer it says `no` with one of .25."""

    def __init__(self, codec: ActionCodec, *, asks: bool):
        self.codec, self.asks = codec, asks
        self.prompts: list[tuple[int, ...]] = []

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        self.prompts.append(tuple(prompt_ids))
        awaited = self.codec.awaited(prompt_ids)
        if awaited is not None:
            ids = self.codec.encode_argument(Action(awaited, "no"))
            each = math.log(0.25) / len(ids)
            return Completion(ids, (each,) * len(ids), "stop")
        action = Action(Fn.SEEK_ADVICE) if self.asks else Action(Fn.PREDICT_ANSWER, "yes")
        ids = self.codec.encode_action(action)
        rest = (math.log(0.5) / max(1, len(ids) - 1),) * (len(ids) - 1)
        return Completion(ids, (math.log(0.8), *rest), "stop")


class Key:
    def tool_answer(self, item: Item) -> str | None:
        return None

    def is_correct(self, item: Item, answer: str | None, used_search: bool) -> bool:
        return not used_search and answer == item.answer


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_answered_and_asked(kind: str) -> None:
    codec = make_codec(kind)
    executor = make_executor(codec=codec)
    question = item()
    policy = Unsure(codec, asks=True)
    asked = play(executor, policy)
    answered = play(executor, Unsure(codec, asks=False))
    sessions: list[Session] = [asked, answered]
    found = own_answers(policy, executor, [Trajectory("s", tuple(sessions))])
    assert list(found) == [asked.id] and found[asked.id].text == "no"
    assert policy.prompts[-1] == (
        *policy.prompts[0],
        codec.action_ids[Fn.PREDICT_ANSWER],
    )  # where it asked
    items = {("s", question.id): question}
    (told,) = beliefs([asked], items, codec, found, Key())
    assert told.asked and not told.right  # the gold answer is yes
    assert (told.readiness, told.confidence) == pytest.approx((0.2, 0.25))
    (told,) = beliefs([answered], items, codec, {}, Key())
    assert not told.asked and told.right
    assert (told.readiness, told.confidence) == pytest.approx((0.8, 0.5))
    assert beliefs([asked], items, codec, {}, Key()) == []  # it was not made to answer


def test_a_search_before_asking_counts_against_the_own_answer_one_after_does_not() -> None:
    codec = make_codec("bpe")
    executor, policy = make_executor(codec=codec), Unsure(codec, asks=True)
    asked = play(executor, policy)
    items = {("s", asked.item_id): item(answer="no")}
    found = own_answers(policy, executor, [Trajectory("s", (asked,))])
    search = Observation(Action("Search", "x"), Source.TOOL, "")
    for steps, right in (((search, *asked.steps), False), ((*asked.steps, search), True)):
        (told,) = beliefs([replace(asked, steps=steps)], items, codec, found, Key())
        assert told.right is right


def test_streams_may_share_ids() -> None:
    """The same id with another gold answer in each stream: what the agent would have said, and what a report shows."""
    codec = make_codec("bpe")
    executor, policy = make_executor(codec=codec), Unsure(codec, asks=True)
    asked = play(executor, policy)
    sessions = [replace(asked, id=f"{stream}/0", stream_id=stream) for stream in ("s", "t")]
    items = {("s", asked.item_id): item(answer="yes"), ("t", asked.item_id): item(answer="no")}
    trajectories = [Trajectory(s.stream_id, (s,)) for s in sessions]
    found = own_answers(policy, executor, trajectories)
    told = beliefs(sessions, items, codec, found, Key())
    assert [belief.right for belief in told] == [False, True]
    examples = _examples(Played(trajectories, codec, 0.0, found, {}), told, items)
    assert sorted((e["title"].partition("/")[0], dict(e["facts"])["gold"]) for e in examples) == [
        ("s", "yes"),
        ("t", "no"),
    ]
