from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from agile.advice import CallbackAdvisor
from agile.errors import AgileError
from agile.executor import Executor, Limits
from agile.policies import HFPolicy, ScriptedPolicy
from agile.protocols import Memory, Policy
from agile.rollout import collect, run_loop, status_counts, warn_of_failures
from agile.seeding import derive_seed
from agile.types import Action, AdviceRequest, Completion, Fn, Item, Reward, Segment, Session, Stream, Trajectory
from tests.worlds import ListMemory, Replay, item, make_codec, make_executor

STREAMS = [
    Stream(name, tuple(replace(item(f"is {name} {i} ?"), id=f"{name}/{i}") for i in range(length)))
    for name, length in (("a", 4), ("b", 1), ("c", 3))
]


def decide(context: str) -> Action:
    """Ask unless memory has a history entry."""
    if context.endswith("[Reflection]"):
        return Action(Fn.REFLECTION, "none")
    if "history" in context or "[SeekAdvice]" in context:
        return Action(Fn.PREDICT_ANSWER, "yes")
    return Action(Fn.SEEK_ADVICE)


class Jittery:
    """A scripted policy that takes its time, so that concurrent sessions interleave."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        for _ in range(seed % 5):
            await asyncio.sleep(0)
        return await self.policy.complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)


def scripted(kind: str = "bpe") -> Policy:
    return Jittery(ScriptedPolicy(make_codec(kind), decide))


def tiny_model() -> Policy:
    from agile.model import small_llama

    tokenizer = make_codec("word").tokenizer
    lm = small_llama(tokenizer, num_layers=1, hidden_size=16, num_heads=2, max_tokens=512, seed=1)
    return HFPolicy(lm)


def run(
    streams: Sequence[Stream],
    policy: Policy,
    executor: Executor | None = None,
    *,
    seed: int = 0,
    max_failed: float = 1.0,
) -> list[Trajectory]:
    executor = executor or make_executor(codec=make_codec("word"), limits=Limits(max_action_tokens=6))
    return asyncio.run(collect(executor, policy, streams, lambda s: ListMemory(), seed=seed, max_failed=max_failed))


def without_logprobs(session: Session) -> Session:
    segments = tuple(
        Segment(tuple(replace(s, logprobs=(0.0,) * len(s.logprobs)) for s in g.spans), g.end) for g in session.segments
    )
    return replace(session, segments=segments)


def logprobs(session: Session) -> list[float]:
    return [p for segment in session.segments for p in segment.logprobs]


@pytest.mark.parametrize("policy", [lambda: scripted("word"), tiny_model], ids=["scripted", "hf"])
def test_a_stream_is_the_same_alone_and_among_others(policy: type) -> None:
    together = run(STREAMS, policy())
    alone = [run([stream], policy())[0] for stream in STREAMS]
    reverse = run(STREAMS[::-1], policy())[::-1]
    for trajectory, *others in zip(together, alone, reverse, strict=True):
        for other in others:
            for a, b in zip(trajectory.sessions, other.sessions, strict=True):
                assert without_logprobs(a) == without_logprobs(b)
                assert logprobs(a) == pytest.approx(logprobs(b), abs=1e-5)
    sampled = [without_logprobs(s).segments for t in run(STREAMS, policy(), seed=1) for s in t.sessions]
    same = sampled == [without_logprobs(s).segments for t in together for s in t.sessions]
    assert same == isinstance(policy(), Jittery), "another seed, another sample; a script has none"


def test_sessions_of_a_stream_follow_each_other_and_share_its_memory() -> None:
    ended: list[Session] = []
    memories: dict[str, ListMemory] = {}

    def memory_for(stream: Stream) -> Memory:
        return memories.setdefault(stream.id, ListMemory())

    executor = make_executor()
    trajectories = asyncio.run(collect(executor, scripted(), STREAMS, memory_for, seed=3, on_session=ended.append))
    assert [t.stream_id for t in trajectories] == ["a", "b", "c"]
    for stream, trajectory in zip(STREAMS, trajectories, strict=True):
        sessions = trajectory.sessions
        assert [(s.id, s.index, s.item_id) for s in sessions] == [
            (f"{stream.id}/{i}", i, question.id) for i, question in enumerate(stream.items)
        ]
        assert [s.seed for s in sessions] == [derive_seed(3, stream.id, i) for i in range(len(sessions))]
        assert [s.advised for s in sessions] == [i == 0 for i in range(len(sessions))], "the first answer is remembered"
        assert [s.steps[0].text.split()[:2] for s in sessions] == [
            ["round", str(10 * i // len(sessions))] for i in range(len(sessions))
        ]
        assert len(memories[stream.id]) == 1
    assert sorted(s.id for s in ended) == sorted(s.id for t in trajectories for s in t.sessions)
    assert [s.index for s in ended if s.stream_id == "a"] == [0, 1, 2, 3]
    starts = [s.stream_id for s in ended[:3]]
    assert len({*starts}) > 1, "streams run concurrently"


def test_a_waiting_expert_holds_up_his_own_stream_alone() -> None:
    release = asyncio.Event()
    order: list[str] = []

    async def advise(request: AdviceRequest) -> str:
        if request.session_id == "a/0":
            await release.wait()
        return "yes"

    def on_session(session: Session) -> None:
        order.append(session.id)
        if session.id == "c/2":
            release.set()

    executor = make_executor(advisor=CallbackAdvisor(advise))
    run = collect(executor, scripted(), STREAMS, lambda s: ListMemory(), seed=0, on_session=on_session)
    asyncio.run(asyncio.wait_for(run, 30))
    assert order.index("c/2") < order.index("a/0")
    assert len(order) == 8


def test_a_policy_of_its_own_for_each_session() -> None:
    codec = make_codec()

    def teacher(question: Item, memory: Memory) -> Policy:
        assert isinstance(memory, ListMemory)
        return Replay([codec.encode_action(Action(Fn.PREDICT_ANSWER, question.id))])

    run = collect(make_executor(), Replay([]), STREAMS, lambda s: ListMemory(), seed=0, policy_for=teacher)
    for trajectory, stream in zip(asyncio.run(run), STREAMS, strict=True):
        assert [s.answer for s in trajectory.sessions] == [question.id for question in stream.items]


@pytest.mark.parametrize(("max_failed", "stops"), [(0.5, False), (0.49, True)])
def test_too_many_failures_stop_the_run_with_their_reason(max_failed: float, stops: bool) -> None:
    """Of 40 sessions every second one fails."""
    streams = [Stream("s", tuple(replace(item(), id=str(i)) for i in range(40)))]
    good = make_codec().encode_action(Action(Fn.PREDICT_ANSWER, "yes"))

    def policy_for(question: Item, memory: Memory) -> Policy:
        return Replay([] if int(question.id) % 2 else [good])  # an empty script raises

    ended: list[Session] = []
    run = collect(
        make_executor(),
        Replay([]),
        streams,
        lambda s: ListMemory(),
        seed=0,
        policy_for=policy_for,
        max_failed=max_failed,
        on_session=ended.append,
    )
    if not stops:
        assert sum(s.failed for s in asyncio.run(run)[0].sessions) == 20
        return
    with pytest.raises(AgileError, match=r"10 of 20 sessions failed, more than .* 0.49.*s/19, failed: policy: "):
        asyncio.run(run)
    assert len(ended) == 20, "what ended before was handed over; nothing after it is played"


def test_no_more_streams_than_allowed_are_under_way() -> None:
    """A stream that waits has no memory yet, and all are played in the end."""
    streams = [Stream(f"s{i}", (item(), item())) for i in range(50)]
    started: list[str] = []
    ended: list[Session] = []
    under_way: list[int] = []

    def memory_for(stream: Stream) -> Memory:
        started.append(stream.id)
        under_way.append(len(started) - sum(s.index == 1 for s in ended))
        return ListMemory()

    trajectories = asyncio.run(
        collect(make_executor(), scripted(), streams, memory_for, seed=0, on_session=ended.append, max_concurrent=7)
    )
    assert max(under_way) == 7
    assert [t.stream_id for t in trajectories] == [s.id for s in streams]
    assert status_counts(trajectories) == {"completed": 100}


def test_a_thread_that_never_ends_does_not_hold_up_the_end() -> None:
    release = threading.Event()

    async def main() -> str:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(release.wait, 60), 0.05)
        return "done"

    started = time.monotonic()
    assert run_loop(main()) == "done"
    assert time.monotonic() - started < 40
    release.set()


def test_statuses_are_counted() -> None:
    codec = make_codec()
    good = codec.encode_action(Action(Fn.PREDICT_ANSWER, "yes"))
    scripts: list[list[Sequence[int]]] = [[good], [], [[codec.end_id]] * 9, [good]]

    def policy_for(question: Item, memory: Memory) -> Policy:
        return Replay(scripts[int(question.id)])

    stream = Stream("s", tuple(replace(item(), id=str(i)) for i in range(4)))
    run = collect(make_executor(), Replay([]), [stream], lambda s: ListMemory(), seed=0, policy_for=policy_for)
    assert status_counts(asyncio.run(run)) == {"completed": 2, "failed": 1, "invalid_action": 1}
    assert status_counts([]) == {"completed": 0}


def test_failures_that_are_not_the_policys_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of 6 sessions 3 have a reward that is no number, 1 an empty script, 1 a policy that only errs."""
    codec = make_codec()
    good = codec.encode_action(Action(Fn.PREDICT_ANSWER, "yes"))
    scripts: list[list[Sequence[int]]] = [[good], [good], [], [good], [[codec.end_id]] * 9, [good]]

    def policy_for(question: Item, memory: Memory) -> Policy:
        return Replay(scripts[int(question.id)])

    def score(question: Item, session: Session) -> Reward:
        return Reward({"correct": math.nan if question.id in "13" else 1.0})

    stream = Stream("s", tuple(replace(item(), id=str(i)) for i in range(6)))
    executor = make_executor(score=score)
    run = collect(executor, Replay([]), [stream], lambda s: ListMemory(), seed=0, policy_for=policy_for, max_failed=1.0)
    played = asyncio.run(run)
    warn_of_failures("Iteration 3", played)
    (record,) = caplog.records
    expected = "Iteration 3: 3 of 6 sessions failed, not by the policy's doing; 2 of them: failed, task: ValueError: "
    assert record.getMessage() == expected + "the reward is {'correct': nan}, expected finite numbers"
    caplog.clear()
    warn_of_failures("Iteration 4", [replace(played[0], sessions=played[0].sessions[4:])])
    assert not caplog.records, "a policy that errs is looked at in the statuses"


def test_no_streams_no_trajectories() -> None:
    assert run([], scripted()) == []


def test_seeds_differ_by_name_and_place() -> None:
    seeds = {derive_seed(s, name, i) for s in range(5) for name in ("a", "b", "1") for i in range(50)}
    assert len(seeds) == 750
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "a1", 1) != derive_seed(0, "a", 11)
