"""`agile preferences`: which sessions make a pair, and that TRL gets exactly the tokens that were played."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agile.executor import Executor
from agile.preferences import Preference, answer_decision, find_preferences, preference
from agile.replay import RunParts
from agile.session_log import JsonLines, append_sessions, logged_sessions
from agile.tokens import ActionCodec
from agile.types import Action, Advice, Fn, Item, Reward, Session, SessionStatus, Source
from tests.families import ASKS, family_codec
from tests.tiny import agile
from tests.worlds import NoteAgent, item, make_codec, make_executor, play, script

YES, NO = Action(Fn.PREDICT_ANSWER, "yes"), Action(Fn.PREDICT_ANSWER, "no")


def session(*actions: Action, executor: Executor | None = None, question: Item | None = None) -> Session:
    executor = executor or make_executor()
    return play(executor, script(executor.codec, *actions), question)


def asked(answer: str = "yes") -> Session:
    """An expert was asked, and answered so."""
    played = session(Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "none"), Action(Fn.PREDICT_ANSWER, answer))
    return replace(played, advice=Advice(answer, price=0.3), reward=Reward({"correct": 1.0, "advice": -0.3}))


def found(*sessions: Session, codec: ActionCodec | None = None) -> tuple[list[Preference], dict[str, int]]:
    pairs, counts = find_preferences(lambda: sessions, codec or make_codec())
    return pairs, {key: n for key, n in counts.items() if n and key not in ("sessions", "wrong")}


def trl_ids(codec: ActionCodec, pair: Preference, answer: str) -> tuple[int, ...]:
    """What TRL's DPOTrainer and RewardTrainer make of it: the end token behind it, then tokens from the whole text."""
    end = codec.tokenizer.eos_token
    text = pair.prompt + answer
    return tuple(codec.tokenizer(text=text if answer.endswith(end) else text + end)["input_ids"])


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_an_expert_corrects_what_the_agent_answered_elsewhere(kind: str) -> None:
    codec = make_codec(kind)
    wrong = session(NO, executor=make_executor(codec=codec))
    (pair,), counts = found(wrong, asked(), codec=codec)
    assert counts == {}
    assert (pair.session, pair.source) == ("s/0", "expert")
    spans = wrong.segments[0].spans
    at = next(i for i, span in enumerate(spans) if span.source is Source.LLM)
    context = tuple(i for span in spans[:at] for i in span.token_ids)
    assert trl_ids(codec, pair, pair.rejected) == context + spans[at].token_ids
    assert trl_ids(codec, pair, pair.chosen) == context + codec.encode_action(YES)
    assert tuple(codec.tokenizer(text=pair.prompt)["input_ids"]) == context


@pytest.mark.parametrize(
    ("sessions", "reason"),
    [
        ([session(NO)], {"uncorrected": 1}),
        ([session(YES), asked()], {}),
        ([session(NO), asked("no")], {"same": 1}),
        ([session(NO), asked(), asked("no")], {"disputed": 1}),
        ([replace(session(NO), status=SessionStatus.TRUNCATED), asked()], {}),
        ([session(Action("SearchProduct", "SELECT 1"), NO), asked()], {"searched": 1}),
        ([replace(session(NO), stream_id="t"), asked()], {"uncorrected": 1}),
        ([replace(session(NO), segments=()), asked()], {"undecided": 1}),
        ([session(NO, question=item("is it <end> ?")), asked()], {"not_exact": 1}),
    ],
    ids=[
        "nobody asked",
        "right",
        "expert errs too",
        "disputed",
        "broken off",
        "search",
        "stream",
        "no tokens",
        "typed",
    ],
)
def test_what_makes_no_pair(sessions: Sequence[Session], reason: dict[str, int]) -> None:
    assert found(*sessions) == ([], reason)


def test_a_pair_is_kept_once_and_the_task_may_answer_for_the_expert() -> None:
    twice = [session(NO), session(NO)]
    pairs, counts = find_preferences(lambda: twice, make_codec(), gold=lambda session: "yes")
    assert [pair.source for pair in pairs] == ["gold"] and counts["repeated"] == 1 and counts["wrong"] == 2


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "vicuna"])
def test_chat_formats_give_their_tokens_back(family: str, special: bool) -> None:
    codec = family_codec(family, special)
    agent = NoteAgent(ASKS)
    executor = make_executor(agent, codec=codec, tools={"Add": None}, score=lambda item, session: Reward({}))  # type: ignore[dict-item]
    played = session(NO, executor=executor)
    decision = answer_decision(played, codec)
    assert decision is not None
    pair = preference(codec, decision, "yes", played.id, "expert")
    # That llama's turns end otherwise than its texts, and TRL puts the end of a text behind every answer.
    assert (pair is None) == (family == "llama")
    if pair is not None:
        assert trl_ids(codec, pair, pair.rejected) == decision.context + decision.written


def test_thinking_is_seen_and_not_preferred() -> None:
    codec = family_codec("qwen", True)
    thought = codec.encode("<think>steel is washable</think>\n\n")
    assert codec.num_thinking(thought) == len(thought)
    played = session(NO, executor=make_executor(NoteAgent(ASKS), codec=codec, tools={"Add": None}))  # type: ignore[dict-item]
    spans = played.segments[0].spans
    at = next(i for i, span in enumerate(spans) if span.source is Source.LLM)
    span = spans[at]
    longer = replace(span, token_ids=thought + span.token_ids, logprobs=(0.0,) * (len(thought) + len(span.token_ids)))
    segment = replace(played.segments[0], spans=(*spans[:at], longer, *spans[at + 1 :]))
    decision = answer_decision(replace(played, segments=(segment,)), codec)
    assert decision is not None and decision.written == span.token_ids
    assert decision.context[-len(thought) :] == thought


def test_a_name_that_the_executor_wrote_is_not_chosen() -> None:
    """After advice the answer's name stands in the context; a desk may still correct what was said then."""
    codec = make_codec()
    played = session(Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "none"), NO)
    decision = answer_decision(played, codec)
    assert decision is not None and decision.named
    pair = preference(codec, decision, "yes", played.id, "desk")
    assert pair is not None
    assert trl_ids(codec, pair, pair.chosen) == decision.context + codec.encode_argument(YES)


def test_the_command_writes_the_pairs_of_a_run(made: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "pairs.jsonl"
    shutil.copytree(made, run)
    parts = RunParts(run)
    (first, *_) = logged_sessions(run)
    stream = parts.stream(first)
    assert stream is not None
    log = JsonLines(run / "sessions-0.jsonl")
    for index, question in enumerate(stream.items):
        played = session(Action(Fn.PREDICT_ANSWER, "none"), executor=parts.executor(first), question=question)
        append_sessions(log, [replace(played, id=f"{stream.id}/{index}", stream_id=stream.id)], stage="ppo", step=3)
    log.close()
    advised = {s.session.item_id for s in logged_sessions(run) if s.session.advised}
    said = [question for question in stream.items if not isinstance(question.answer, list)]
    assert agile("preferences", run).exit_code == 0
    pairs = [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()]
    assert len(pairs) == len({q.id for q in stream.items} & advised) > 0
    result = agile("preferences", run, "--gold", "--out", out)
    assert result.exit_code == 0 and "8 with a wrong answer" in result.output, result.output
    assert len(pairs) <= len(out.read_text().splitlines()) <= len(said)
    assert all({"prompt", "chosen", "rejected"} < set(line) and "none" in line["rejected"] for line in pairs)


def test_a_run_that_played_tests_alone_has_none(made: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((made / "config.yaml").read_bytes())
    first = (made / "sessions-0.jsonl").read_text().splitlines()[0]
    record = json.loads(first)
    (tmp_path / "test-sft.jsonl").write_text(json.dumps({"agent": "sft", "session": record["session"]}) + "\n")
    result = agile("preferences", tmp_path)
    assert result.exit_code == 2 and "played no session in training" in result.output
