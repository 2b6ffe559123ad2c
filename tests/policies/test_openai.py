"""A prompted agent: contexts read back into steps, the conversation made of them, and answers as action tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agile.errors import AgileError
from agile.policies.endpoint import Endpoint, Prices
from agile.policies.openai import OpenAIPolicy, messages
from agile.policies.transcript import Transcript, read_context
from agile.types import Completion, Fn, Session, SessionStatus, Usage
from tests.stub_endpoint import Reply, StubEndpoint, called, refused, said, stub_endpoint
from tests.worlds import LIMITS, Replay, check_session, make_codec, make_executor, note_executor, play

CODEC = make_codec("bpe")
NONE_ID = CODEC.tokenizer.unk_token_id


@pytest.fixture
def stub() -> Iterator[StubEndpoint]:
    with stub_endpoint() as stub:
        yield stub


def make_policy(stub: StubEndpoint, tools: str = "text", cache: Path | None = None, **changes: Any) -> OpenAIPolicy:
    end = Endpoint(stub.url, "tiny", api_key_env=None, backoff_s=0.01, cache=cache, prices=Prices(input=10, output=30))
    return OpenAIPolicy(CODEC, 0.3, end, tools=tools, **changes)


def read(ids: Sequence[int]) -> Transcript:
    return read_context(CODEC, ids, NONE_ID)


def contexts(session: Session) -> list[Transcript]:
    return [read(segment.token_ids) for segment in session.segments]


def talk(conversation: Sequence[dict[str, Any]]) -> str:
    """A conversation without its system prompt, as a person reads it."""
    lines = []
    for message in conversation[1:]:
        calls = [
            f"{c['id']} {c['function']['name']} {c['function']['arguments']}" for c in message.get("tool_calls", ())
        ]
        text = message["content"] if message["content"] is not None else " ".join(calls)
        lines.append(f"{message['role']} {message.get('tool_call_id', '')}".strip() + f": {text}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The conversation

STORY = (
    said("I would look first."),
    said("[Reflection] too early"),
    said("Let me see.\n**[SearchProduct]** SELECT 1\n[PredictAnswer] imagined"),
    said("[SeekAdvice]"),
    said("[Reflection] steel is washable"),
    said("[PredictAnswer] yes"),
)
AS_TEXT = """\
user: [GetQuestion]
round 0
color: red
question: is it washable ?
[RetrieveMemory]
similar 0
Next: [SearchProduct] argument, or [SeekAdvice], or [PredictAnswer] argument
assistant: I would look first.
user: error : expected one of SearchProduct SeekAdvice PredictAnswer
Next: [SearchProduct] argument, or [SeekAdvice], or [PredictAnswer] argument
assistant: [Reflection] too early
user: error : expected one of SearchProduct SeekAdvice PredictAnswer
Next: [SearchProduct] argument, or [SeekAdvice], or [PredictAnswer] argument
assistant: [SearchProduct] SELECT 1
user: found SELECT 1
Next: [PredictAnswer] argument, or [SeekAdvice], or [SearchProduct] argument
assistant: [SeekAdvice]
user: expert: steel is washable
answer: yes
Next: [Reflection] argument
assistant: [Reflection] steel is washable
user: [UpdateMemory]
Next: [PredictAnswer] argument"""
AS_TOOLS = """\
user: [GetQuestion]
round 0
color: red
question: is it washable ?
[RetrieveMemory]
similar 0
assistant: I would look first.
user: error : expected one of SearchProduct SeekAdvice PredictAnswer
assistant: call00003 Reflection {"argument": "too early"}
tool call00003: error : expected one of SearchProduct SeekAdvice PredictAnswer
assistant: call00004 SearchProduct {"argument": "SELECT 1"}
tool call00004: found SELECT 1
assistant: call00005 SeekAdvice {}
tool call00005: expert: steel is washable
answer: yes
assistant: call00006 Reflection {"argument": "steel is washable"}
tool call00006: [UpdateMemory]"""


def test_a_session_as_text(stub: StubEndpoint) -> None:
    stub.script(*STORY)
    session = play(make_executor(), make_policy(stub))
    assert (session.status, session.answer, session.advised) == (SessionStatus.COMPLETED, "yes", True)
    check_session(session, CODEC, LIMITS)
    assert talk(stub.requests[-1]["messages"]) == AS_TEXT
    assert all("tools" not in r and "seed" not in r and r["temperature"] == 0 for r in stub.requests)
    assert stub.requests[0]["messages"][0]["content"].startswith("You are the agent product_qa.")
    assert [len(r["messages"]) for r in stub.requests] == [2, 4, 6, 8, 10, 12]
    for earlier, later in zip(stub.requests, stub.requests[1:], strict=False):  # what a cache of prefixes needs
        assert later["messages"][: len(earlier["messages"])] == earlier["messages"]


def test_the_same_as_tools(stub: StubEndpoint) -> None:
    stub.script(
        called("SearchProduct", '{"argument": "SELECT 1"}'),
        called("SeekAdvice", "{}"),
        called("Reflection", '{"argument": "steel is washable"}'),
        called("PredictAnswer", '{"argument": "yes"}'),
    )
    session = play(make_executor(), make_policy(stub, "native"))
    assert (session.answer, session.advised) == ("yes", True)
    offered = [[t["function"]["name"] for t in r["tools"]] for r in stub.requests]
    assert offered == [
        ["SearchProduct", "SeekAdvice", "PredictAnswer"],
        ["PredictAnswer", "SeekAdvice", "SearchProduct"],
        ["Reflection"],
        ["PredictAnswer"],
    ]
    forced = [r["tool_choice"] if isinstance(r["tool_choice"], str) else "named" for r in stub.requests]
    assert forced == ["required", "required", "named", "named"]


def test_the_story_as_tools(stub: StubEndpoint) -> None:
    stub.script(*STORY)
    session = play(make_executor(), make_policy(stub))
    ids = session.segments[-1].token_ids
    before_answer = ids[: ids.index(CODEC.action_ids[Fn.PREDICT_ANSWER]) + 1]
    assert talk(messages(CODEC.spec, read(before_answer), "system", native=True)) == AS_TOOLS


def test_usage_is_summed_into_the_session(stub: StubEndpoint) -> None:
    stub.script(*STORY)
    session = play(make_executor(), make_policy(stub))
    assert session.usage == Usage(600, 240, 60, session.usage.cost)
    assert session.usage.cost == pytest.approx(6 * (100 * 10 + 10 * 30) / 1e6)
    assert all(p == 0.0 for g in session.segments for p in g.logprobs)


# --------------------------------------------------------------------------------------------------------------------
# Reading contexts back


ANY = st.text(max_size=12)
CHOICES = st.one_of(
    st.tuples(st.sampled_from([a.name for a in CODEC.spec.actions]), ANY), st.tuples(st.just(""), ANY.filter(str.strip))
)


@settings(max_examples=60)
@example([(("", "0"), False)] * 2 + [(("SearchProduct", ""), False)] + [(("", "0"), False)] * 5)
@given(st.lists(st.tuples(CHOICES, st.booleans()), min_size=8, max_size=8))
def test_what_the_executor_wrote_is_read_back(answers: list[tuple[tuple[str, str], bool]]) -> None:
    """Whatever a model says, cut off or not: names, arguments and observations of every step, and what is legal."""

    class Say(Replay):
        async def complete(
            self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
        ) -> Completion:
            (name, argument), whole = answers[len(self.prompts) % len(answers)]
            self.prompts.append(tuple(prompt_ids))
            ids = policy.encode(name, argument, read(prompt_ids).forced, whole=whole)
            end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
            return Completion(ids[:end][:max_tokens], (0.0,) * len(ids[:end][:max_tokens]), "stop")

    policy = OpenAIPolicy(CODEC, 0.3, Endpoint("http://127.0.0.1:9", "m", api_key_env=None))
    session = play(make_executor(), Say([]))
    read_back = contexts(session)
    found = [step for context in read_back for step in context.steps]
    # a name without an argument, which ended the session: in a context under way, its argument would be asked for
    cut_off = read_back[-1].forced is not None
    assert len(found) + cut_off == len(session.steps)
    for step, expected in zip(found, session.steps, strict=not cut_off):
        if expected.text.startswith("error : expected one of"):
            assert step.name not in step.legal
        elif expected.ok:
            assert (step.name, step.argument) == (expected.action.name, expected.action.argument)
        assert step.observation == expected.text or step is found[-1], "the last one may not be shown any more"


def test_legal_actions_are_the_executors(stub: StubEndpoint) -> None:
    stub.script(*STORY)
    assert play(make_executor(), make_policy(stub)).advised
    shown = [r["messages"][-1]["content"].rsplit("\n", 1)[-1] for r in stub.requests]
    assert "[SeekAdvice]" in shown[3] and shown[4:] == ["Next: [Reflection] argument", "Next: [PredictAnswer] argument"]


def test_a_context_that_was_cleared(stub: StubEndpoint) -> None:
    codec = make_codec("bpe", note_executor().agent.spec)
    stub.script(said("[Reflection] it is red"), said("[Add] 1 2"), said("[Add] 3 4"), said("[PredictAnswer] 7"))
    end = Endpoint(stub.url, "tiny", api_key_env=None)
    session = play(note_executor(), OpenAIPolicy(codec, 0.3, end, tools="text"))
    assert session.answer == "7"
    assert talk(stub.requests[-1]["messages"]) == (
        "user: [RetrieveMemory]\nnote: it is red\n"
        "Next: [Add] argument, or [PredictAnswer] argument, or [GetQuestion]\n"
        "assistant: [Add] 1 2\nuser: 3\nNext: [Add] argument, or [PredictAnswer] argument\n"
        "assistant: [Add] 3 4\nuser: 7\nNext: [Add] argument, or [PredictAnswer] argument"
    )


# --------------------------------------------------------------------------------------------------------------------
# Answers

READ, SEARCH = CODEC.action_ids[Fn.RETRIEVE_MEMORY], CODEC.action_ids["SearchProduct"]
PREDICT, ASK = CODEC.action_ids[Fn.PREDICT_ANSWER], CODEC.action_ids[Fn.SEEK_ADVICE]
END = CODEC.end_id
YES = CODEC.encode("yes")


def complete(policy: OpenAIPolicy, prompt: Sequence[int], max_tokens: int = 60, seed: int = 0) -> tuple[int, ...]:
    run = policy.complete(prompt, max_tokens=max_tokens, stop={END, ASK}, seed=seed)
    return asyncio.run(asyncio.wait_for(run, 30)).token_ids


@pytest.mark.parametrize(
    ("reply", "prompt", "expected"),
    [
        (said("[PredictAnswer] yes"), (READ,), (PREDICT, *YES, END)),
        (said("[PredictAnswer]: yes  \n"), (READ,), (PREDICT, *YES, END)),
        (said("[PredictAnswer] ye", "length"), (READ,), (PREDICT, *CODEC.encode("ye"))),
        (said("[SeekAdvice] please"), (READ,), (ASK,)),
        (said("yes"), (READ,), (NONE_ID, *YES, END)),
        (said("[Nothing] yes"), (READ,), (NONE_ID, *CODEC.encode("[Nothing] yes"), END)),
        (said(None, refusal="yes"), (READ,), (NONE_ID, *YES, END)),
        (said("yes"), (READ, PREDICT), (*YES, END)),
        (said("[PredictAnswer] yes"), (READ, PREDICT), (*YES, END)),
        (said([{"type": "text", "text": "[PredictAnswer] yes"}]), (READ,), (PREDICT, *YES, END)),  # type: ignore[arg-type]
        (called("PredictAnswer", '{"argument": "yes"}'), (READ,), (PREDICT, *YES, END)),
        (called("PredictAnswer", '{"answer": " yes"}'), (READ,), (PREDICT, *YES, END)),
        (called("PredictAnswer", "yes"), (READ,), (PREDICT, *YES, END)),
        (called("PredictAnswer", "{}"), (READ,), (PREDICT, END)),
        (called("SeekAdvice", ""), (READ,), (ASK,)),
        (called("Nothing", '{"argument": "yes"}'), (READ,), (NONE_ID, *CODEC.encode("[Nothing] yes"), END)),
        (called("PredictAnswer", '{"argument": "yes"}'), (READ, PREDICT), (*YES, END)),
    ],
)
def test_answers_become_the_tokens_of_an_action(
    stub: StubEndpoint, reply: Reply, prompt: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    stub.script(reply)
    assert complete(make_policy(stub), prompt) == expected


def test_an_answer_is_cut_to_the_room_there_is(stub: StubEndpoint) -> None:
    stub.script(said("[PredictAnswer] " + "yes " * 50))
    assert len(complete(make_policy(stub), (READ,), max_tokens=5)) == 5


def test_a_seed_is_sent_only_where_it_matters(stub: StubEndpoint) -> None:
    complete(make_policy(stub, temperature=0.7), (READ,), seed=2**40 + 5)
    complete(make_policy(stub, temperature=None), (READ,), seed=6)
    assert [(r.get("temperature"), r.get("seed")) for r in stub.requests] == [(0.7, 5), (None, 6)]


# --------------------------------------------------------------------------------------------------------------------
# What endpoints accept


@pytest.mark.parametrize("status", [400, 404, 422])
def test_tools_are_tried_once(
    stub: StubEndpoint, status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rejection is remembered with the answers, so that a bench that goes on does not try again."""
    rejection = refused(status, '"auto" tool choice requires --enable-auto-tool-choice')
    stub.reply = lambda body: rejection if "tools" in body else said("[PredictAnswer] yes")
    policy = make_policy(stub, "auto", tmp_path / "a.sqlite")

    async def together() -> None:
        prompts = [(READ, *CODEC.encode(str(i))) for i in range(6)]
        await asyncio.gather(*(policy.complete(p, max_tokens=50, stop={END}, seed=0) for p in prompts))

    asyncio.run(together())
    assert sum("tools" in r for r in stub.requests) == 1 and len(stub.requests) == 7
    assert caplog.text.count("does not take actions as tools") == 1
    asyncio.run(policy.endpoint.close())
    assert complete(make_policy(stub, "auto", tmp_path / "a.sqlite"), (READ, *CODEC.encode("3"))) == (
        *(PREDICT, *YES, END),
    )
    assert len(stub.requests) == 7


def test_tools_that_are_ignored(stub: StubEndpoint) -> None:
    stub.script(said("Hello!"), said("[PredictAnswer] yes"))
    policy = make_policy(stub, "auto")
    run = policy.complete((READ,), max_tokens=50, stop={END}, seed=0)
    completion = asyncio.run(run)
    assert completion.token_ids == (PREDICT, *YES, END)
    assert completion.usage.completion_tokens == 20, "both answers were paid for"
    assert ["tools" in r for r in stub.requests] == [True, False]


def test_tools_that_are_taken(stub: StubEndpoint) -> None:
    stub.script(called("PredictAnswer", '{"argument": "yes"}'), said("yes"), said("[PredictAnswer] no"))
    policy = make_policy(stub, "auto")
    for prompt in ((READ,), (READ, *YES), (READ, *YES, *YES)):
        complete(policy, prompt)
    assert all("tools" in r for r in stub.requests) and len(stub.requests) == 3


def test_models_that_want_another_name_for_the_limit(stub: StubEndpoint) -> None:
    rejection = refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    stub.reply = lambda body: rejection if "max_tokens" in body else said("[PredictAnswer] yes")
    policy = make_policy(stub, max_tokens=77)
    for prompt in ((READ,), (READ, *YES)):
        assert complete(policy, prompt) == (PREDICT, *YES, END)
    assert [r.get("max_completion_tokens") for r in stub.requests] == [None, 77, 77]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (refused(404, "The model `tiny` does not exist"), r"evaluate\.prompted\.model"),
        (refused(400, "no", code="model_not_found"), r"evaluate\.prompted\.model"),
        (refused(400, "temperature must be 1"), r"rejected the first request .*temperature .null sends none"),
    ],
)
def test_what_all_requests_have_wrong_ends_it_at_once(stub: StubEndpoint, reply: Reply, expected: str) -> None:
    stub.script(reply)
    with pytest.raises(AgileError, match=expected):
        play(make_executor(), make_policy(stub))
    assert len(stub.requests) == 1


def test_a_request_that_is_too_long_fails_its_session_alone(stub: StubEndpoint) -> None:
    stub.script(refused(400, "maximum context length is 8192 tokens", code="context_length_exceeded"))
    session = play(make_executor(), make_policy(stub))
    assert session.status == SessionStatus.FAILED and "maximum context length" in session.error


def test_requests_are_plain_json(stub: StubEndpoint) -> None:
    complete(make_policy(stub, "native"), (READ, *CODEC.encode("ü \u2713"), SEARCH, *YES, END))
    assert json.loads(json.dumps(stub.requests[0])) == stub.requests[0]
    assert "ü ✓" in json.dumps(stub.requests[0], ensure_ascii=False)
