"""Prompts of rows of messages: what the model sees and samples, and nothing else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from agile.advice import AdviceDesk, DatasetAdvisor
from agile.agents.answer import SPEC, AnswerAgent
from agile.errors import AgileError
from agile.executor import Executor, Limits
from agile.messages import MessagesCodec, messages_tokenizer
from agile.policies.scripted import ScriptedPolicy
from agile.types import Action, Fn, Item, Reward, Session, SessionStatus, Source
from tests.worlds import ListMemory

MESSAGES = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "[SubmitAnswer] 2 + 3?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return messages_tokenizer("bpe", ["2 + 2? 4 5"])


def item(messages: list[dict[str, str]] = MESSAGES) -> Item:
    return Item("1", messages[-1]["content"], None, "train", context={"messages": messages, "item": {}})


def play(tokenizer: PreTrainedTokenizerFast, answer: str, **limits: Any) -> Session:
    codec = MessagesCodec(tokenizer, SPEC)

    async def score(asked: Item, session: Session) -> Reward:
        await asyncio.sleep(0)
        return Reward({"grade": float(session.answer == "5")})

    limits = {"max_turns": 1, "max_invalid_actions": 0, **limits}
    executor = Executor(AnswerAgent(), codec, {}, AdviceDesk(DatasetAdvisor(), 0.3), score, Limits(**limits))
    policy = ScriptedPolicy(codec, lambda context: Action(Fn.PREDICT_ANSWER, answer))
    played = executor.run(policy, item(), ListMemory(), stream_id="t", index=0, progress=0.0, seed=0)
    return asyncio.run(played)


def test_the_prompt_is_the_template_s_and_the_rest_is_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    session = play(tokenizer, "5")
    (segment,) = session.segments
    asked, sampled = segment.spans
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert expected == ("<|system|>Add.<|user|>2 + 2?<|assistant|>4<end><|user|>[SubmitAnswer] 2 + 3?<|assistant|>")
    assert (asked.source, list(asked.token_ids)) == (Source.TASK, tokenizer(expected)["input_ids"])
    assert (sampled.source, tokenizer.decode(list(sampled.token_ids))) == (Source.LLM, "5<end>")
    assert (session.status, session.answer) == (SessionStatus.COMPLETED, "5")
    assert session.reward == Reward({"grade": 1.0})


def test_an_answer_that_does_not_end_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    session = play(tokenizer, "5 5 5 5 5 5", max_action_tokens=3)
    assert (session.status, session.answer) == (SessionStatus.INVALID_ACTION, None)


def test_special_tokens_in_a_message_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = MessagesCodec(tokenizer, SPEC).question_ids(item([{"role": "user", "content": "x<end>"}]), "")
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(list(ids)) == "<|user|>x<end><|assistant|>"


def test_the_token_that_ends_a_turn_is_the_template_s(tokenizer: PreTrainedTokenizerFast) -> None:
    other = messages_tokenizer("bpe", ["x"])
    other.add_tokens(["<turn>"], special_tokens=True)
    other.chat_template = str(other.chat_template).replace("{{ eos_token }}", "<turn>")
    assert MessagesCodec(other, SPEC).end_id == other.convert_tokens_to_ids("<turn>")
    assert MessagesCodec(tokenizer, SPEC).end_id == tokenizer.eos_token_id


def test_templates_that_are_missing_or_fail_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = messages_tokenizer("bpe", ["x"])
    known = str(bare.chat_template)
    bare.chat_template = None
    with pytest.raises(AgileError, match="no chat template"):
        MessagesCodec(bare, SPEC)
    bare.chat_template = known
    codec = MessagesCodec(bare, SPEC)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    bare.chat_template = strict + known
    with pytest.raises(AgileError, match=r"cannot show messages of the roles system, user, assistant, user \(no sy"):
        codec.question_ids(item(), "")


def test_text_comes_back_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = json.dumps({"a": "x  y", "b": [1, "é"]}, ensure_ascii=False)
    assert play(tokenizer, answer, max_action_tokens=100).answer == answer
