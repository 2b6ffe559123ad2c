"""Imitation sessions are rollouts: what the teacher did, replayed token by token, gives the same session."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from agile.agents.product_qa import SPEC, ProductQAAgent, Teacher, random_memory
from agile.executor import Executor, Limits
from agile.imitation import imitation_sessions
from agile.memory.encoders import HashingEncoder, make_encoder
from agile.memory.store import SqliteMemory
from agile.tasks.productqa import ProductQA
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import Session, SessionStatus, Source
from tests.worlds import Replay, make_executor, write_shop

AGENT = ProductQAAgent(group_k=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> ProductQA:
    return write_shop(tmp_path_factory.mktemp("imitation"))


@pytest.fixture(scope="module")
def executor(shop: ProductQA) -> Executor:
    texts = AGENT.corpus([item for stream in shop.streams("train") for item in stream.items])
    codec = ActionCodec(build_tokenizer("bpe", texts, SPEC, 500), SPEC)
    return make_executor(AGENT, codec=codec, tools={"SearchProduct": shop.search}, score=shop.score)


def teach(shop: ProductQA, executor: Executor, seed: int = 0, judge_yes: float = 0.2) -> list[Session]:
    return imitation_sessions(
        executor,
        shop.streams("train"),
        teach=Teacher(executor.codec, AGENT, judge_yes).policy,
        initial_memory=random_memory,
        new_memory=partial(SqliteMemory, make_encoder("hashing")),
        sessions_per_item=2,
        seed=seed,
    )


@pytest.fixture(scope="module")
def sessions(shop: ProductQA, executor: Executor) -> list[Session]:
    return teach(shop, executor)


def test_every_question_is_played_each_time_with_a_memory_of_its_own(shop: ProductQA, sessions: list[Session]) -> None:
    expected = [
        (f"{stream.id}#{repeat}", index, item.id)
        for stream in shop.streams("train")
        for index, item in enumerate(stream.items)
        for repeat in range(2)
    ]
    assert [(s.stream_id, s.index, s.item_id) for s in sessions] == expected
    assert all(s.status == SessionStatus.COMPLETED and s.reward is not None for s in sessions)
    assert {s.reward.components["correct"] for s in sessions if s.reward} == {1.0}, "the teacher knows the answers"
    assert len({s.seed for s in sessions}) == len(sessions)
    shown = [len(s.retrieved) for s in sessions]
    assert 0 in shown and max(shown) == 3


def test_a_replayed_session_is_the_same_session(shop: ProductQA, executor: Executor, sessions: list[Session]) -> None:
    """Ids, masks, sources, steps and reward: the format of imitation is the format of rollouts."""
    streams = {stream.id: stream for stream in shop.streams("train")}
    for session in sessions:
        stream = streams[session.stream_id.split("#")[0]]
        item = stream.items[session.index]
        memory = SqliteMemory(HashingEncoder())
        memory.write(random_memory(item, stream.items, np.random.default_rng(session.seed)))
        spans = [span for segment in session.segments for span in segment.spans]
        policy = Replay([span.token_ids for span in spans if span.source is Source.LLM])
        run = executor.run(
            policy,
            item,
            memory,
            stream_id=session.stream_id,
            index=session.index,
            progress=session.index / len(stream.items),
            seed=session.seed,
        )
        replayed = asyncio.run(run)
        assert [(g.token_ids, g.action_mask, g.end) for g in replayed.segments] == [
            (g.token_ids, g.action_mask, g.end) for g in session.segments
        ]
        assert replace(replayed, segments=session.segments) == session


def test_the_same_seed_teaches_the_same(shop: ProductQA, executor: Executor, sessions: list[Session]) -> None:
    assert teach(shop, executor) == sessions
    assert teach(shop, executor, seed=1) != sessions


def test_sessions_that_do_not_complete_are_left_out(
    shop: ProductQA, executor: Executor, sessions: list[Session]
) -> None:
    lengths = [len(s.segments[0].token_ids) for s in sessions]
    limits = Limits(max_context_tokens=sorted(lengths)[len(lengths) // 2])
    tight = Executor(AGENT, executor.codec, executor.tools, executor.desk, executor.score, limits)
    fitting = [s for s, n in zip(sessions, lengths, strict=True) if n <= limits.max_context_tokens]
    assert teach(shop, tight) == fitting
    assert 0 < len(fitting) < len(sessions)
