"""Imitation sessions are rollouts: what the teacher did, replayed token by token, gives the same session."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from agile.agents.product_qa import SPEC, ProductQAAgent, ProductQATeacher, random_memory
from agile.chat_template import chat_turns
from agile.executor import Executor, Limits
from agile.imitation import Imitation, jobs
from agile.memory.encoders import HashingEncoder, make_encoder
from agile.memory.store import SqliteMemory
from agile.tasks.productqa import ProductQA
from agile.tokens import ActionCodec, Turns, add_action_tokens, build_tokenizer
from agile.types import Session, SessionStatus, Source
from tests.families import family_tokenizer
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
    imitation = Imitation(
        executor,
        ProductQATeacher(executor.codec, AGENT, judge_yes).policy,
        random_memory,
        lambda stream: SqliteMemory(make_encoder("hashing")),
        prices=(0.3,),
        seed=seed,
    )
    return asyncio.run(imitation.sessions(jobs(shop.streams("train"), 2)))


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


# --------------------------------------------------------------------------------------------------------------------
# Other formats of prompts

INSTRUCTIONS = "You may [SearchProduct] or [SeekAdvice], which costs 0.3; end with [PredictAnswer]."


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_the_teacher_plays_the_same_in_every_format(
    shop: ProductQA, executor: Executor, sessions: list[Session], chat: bool, special: bool, told: bool
) -> None:
    """Whatever stands around its actions, and though the instructions name them all."""
    tokenizer = family_tokenizer("qwen")
    if special:
        add_action_tokens(tokenizer, SPEC)
    instructions = INSTRUCTIONS if told else ""
    turns, end_id = chat_turns(tokenizer, instructions=instructions)
    if not chat:
        opening = tuple(tokenizer(f"{instructions}\n\n", add_special_tokens=False)["input_ids"]) if told else ()
        turns = Turns(opening=opening)
    codec = ActionCodec(tokenizer, SPEC, special_tokens=special, turns=turns, end_id=end_id)
    limits = Limits(max_context_tokens=4096, max_session_tokens=4096)
    other = Executor(AGENT, codec, executor.tools, executor.desk, executor.score, limits)
    played = teach(shop, other)
    assert [(s.steps, s.answer, s.written) for s in played] == [(s.steps, s.answer, s.written) for s in sessions]
