"""`agile replay`: what was logged comes out again, token for token, and a change is named where it first shows."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from agile.agents.product_qa import ProductQAAgent
from agile.build import Setup
from agile.config import load_config
from agile.executor import Executor, Limits
from agile.protocols import Policy
from agile.replay import first_difference, replay_session
from agile.rescore import rescore_run
from agile.session_log import read_lines, session_from_json
from agile.tasks.productqa import ProductQA
from agile.tokens import ActionCodec, Turns
from agile.types import Action, AdviceRequest, Fn, Item, Reward, Segment, Session, SessionStatus, Source, to_json
from tests.test_executor_noise import Noise
from tests.tiny import TinyRun, agile
from tests.worlds import AGENT, NOTES, ListMemory, item, make_codec, make_executor, note_executor, play, script

LIMITS = Limits(
    max_turns=8, max_context_tokens=250, max_session_tokens=300, max_action_tokens=30, max_invalid_actions=5
)


def logged(session: Session) -> Session:
    """As it comes back from its log."""
    return session_from_json(json.loads(json.dumps(to_json(session))))


def replayed(executor: Executor, session: Session, question: Item | None = None, progress: float = 0.0) -> Session:
    return asyncio.run(replay_session(executor, session, question or item(), progress))


# --------------------------------------------------------------------------------------------------------------------
# Whatever happens in a session, its replay is identical


@cache
def thinking_codec() -> ActionCodec:
    """A chat format whose turns lose their thinking, with action names as plain text."""
    plain = make_codec()
    opening, to_llm, before, to_user = (
        plain.encode(text) for text in ("<user> rules\n", "\n<llm> <think> ", "\n<llm> ", "\n<user> ")
    )
    turns = Turns(opening, to_llm, before, to_user, keep_thinking=False)
    return ActionCodec(plain.tokenizer, plain.spec, special_tokens=False, turns=turns)


class Thinker(Noise):
    """Noise that at times says an action in words, with thinking before it."""

    async def complete(self, prompt_ids: Any, **kwargs: Any) -> Any:
        completion = await super().complete(prompt_ids, **kwargs)
        codec, rng = thinking_codec(), self.rng
        name = rng.choice([Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER, "SearchProduct"])
        said = rng.choice(["red ? </think> ", "", "</think>", "\u2603"]) + rng.choice([f"[{name}]", f"[{name}] x", "x"])
        ids = (*codec.encode(said), codec.end_id)[: kwargs["max_tokens"]]
        return completion if rng.random() < 0.2 else replace(completion, token_ids=ids, logprobs=(-0.5,) * len(ids))


def noisy_executor(kind: str) -> tuple[Executor, type[Noise], ActionCodec]:
    if kind == "notes":
        return note_executor(LIMITS), Noise, make_codec("bpe", NOTES)
    codec = thinking_codec() if kind == "thinking" else make_codec()
    return make_executor(codec=codec, limits=LIMITS), Thinker if kind == "thinking" else Noise, make_codec()


@pytest.mark.parametrize("kind", ["product_qa", "notes", "thinking"])
def test_every_session_is_replayed_as_it_was(kind: str) -> None:
    executor, noise, codec = noisy_executor(kind)
    policy = noise(codec, random.Random(kind))

    async def checked() -> list[Session]:
        found = []
        for index in range(150):
            session = await executor.run(
                policy, item(), ListMemory(), stream_id="s", index=index, progress=0.5, seed=index
            )
            recorded = logged(session)
            again = await replay_session(executor, recorded, item(), 0.5)
            assert again == recorded, first_difference(recorded, again, executor.codec)
            found.append(session)
        return found

    sessions = asyncio.run(checked())
    statuses = {session.status for session in sessions}
    assert {SessionStatus.COMPLETED, SessionStatus.TRUNCATED} <= statuses
    sources = {span.source for s in sessions for segment in s.segments for span in segment.spans}
    assert (Source.CARRIED in sources and Source.TEMPLATE in sources) == (kind == "thinking")
    assert (kind == "product_qa") <= any(s.advised for s in sessions)


class Hanging:
    """Waits for ever in whichever role it is put; its memory and its tool raise."""

    name: str = "hangs"
    description: str = "hangs"

    async def complete(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(60)

    async def advise(self, request: AdviceRequest) -> Any:
        await asyncio.sleep(60)

    async def __call__(self, argument: str, item: Item, earlier: Any = ()) -> Any:
        await asyncio.sleep(60)


class Broken(ListMemory):
    def retrieve(self, *args: Any) -> Any:
        raise OSError("disk gone")


class NoWrites(ListMemory):
    def write(self, items: Any) -> Any:
        if items:
            raise OSError("disk full")
        return []


ASK = (Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "steel"), Action(Fn.PREDICT_ANSWER, "yes"))
SEARCH = (Action("SearchProduct", "SELECT 1"), Action(Fn.PREDICT_ANSWER, "yes"))
HURRY = Limits(max_stage_s=0.2)


@pytest.mark.parametrize(
    ("executor", "actions", "memory", "status"),
    [
        (make_executor(advisor=Hanging(), limits=HURRY), ASK, None, SessionStatus.ADVISOR_TIMEOUT),
        (make_executor(tools={"SearchProduct": Hanging()}, limits=HURRY), SEARCH, None, SessionStatus.TOOL_TIMEOUT),
        (make_executor(limits=HURRY), None, None, SessionStatus.POLICY_TIMEOUT),
        (make_executor(limits=Limits(max_seconds=0.0)), ASK, None, SessionStatus.TRUNCATED),
        (make_executor(), ASK, Broken(), SessionStatus.FAILED),
        (make_executor(), ASK, NoWrites(), SessionStatus.FAILED),
        (make_executor(), ASK[:1], None, SessionStatus.FAILED),
    ],
    ids=["advisor", "tool", "policy", "clock", "memory", "write", "script"],
)
def test_what_failed_is_replayed_up_to_there(
    executor: Executor, actions: tuple[Action, ...] | None, memory: ListMemory | None, status: SessionStatus
) -> None:
    policy: Policy = Hanging() if actions is None else script(executor.codec, *actions)
    session = play(executor, policy, memory=memory)
    assert session.status == status
    assert replayed(executor, logged(session)) == session


# --------------------------------------------------------------------------------------------------------------------
# Differences


@cache
def asked() -> Session:
    return play(make_executor(), script(make_codec(), *ASK))


def test_a_changed_prompt_is_found_at_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, question, expected = make_codec(), ProductQAAgent.question, asked()
    monkeypatch.setattr(ProductQAAgent, "question", lambda *a: question(*a).replace("question:", "questiom:"))
    found = first_difference(expected, replayed(make_executor(), expected), codec)
    assert found is not None
    old = question(AGENT, item(), 0.0, 0.3)
    tokens = zip(codec.encode(old), codec.encode(old.replace("question:", "questiom:")), strict=False)
    number = 1 + next(n for n, (a, b) in enumerate(tokens) if a != b)  # after [GetQuestion]
    assert found.where == f"segment 0, token {number}"
    row = [(i, s.source) for s in expected.segments[0].spans for i in s.token_ids]
    assert f"(id {row[number][0]}, task)" in found.expected
    assert "color: red" in codec.decode([i for i, _ in row[:number]]) and "[GetQuestion]" in found.hint


def test_a_changed_score_is_found() -> None:
    executor = make_executor(score=lambda question, session: Reward({"correct": 0.5}))
    found = first_difference(asked(), replayed(executor, asked()), make_codec())
    assert found is not None
    assert (found.where, found.expected) == ("reward", "1 {'correct': 1.0}")
    assert found.found == "0.5 {'correct': 0.5}"


def test_a_changed_tokenizer_is_named() -> None:
    codec = make_codec()
    words = ActionCodec(codec.tokenizer, codec.spec)
    words.encode = lambda text: tuple(i for c in text for i in codec.encode(c))  # type: ignore[assignment]
    found = first_difference(asked(), replayed(make_executor(codec=words), asked()), codec)
    assert found is not None
    assert found.where.startswith("segment 0, token") and "tokenizer is not the one" in found.hint


def test_a_score_that_raises_and_a_parser_that_refuses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(question: Item, session: Session) -> Reward:
        raise KeyError("gold")

    found = first_difference(asked(), replayed(make_executor(score=score), asked()), make_codec())
    assert found is not None
    assert (found.where, found.expected, found.found) == ("status", "completed", "failed")

    monkeypatch.setattr(ActionCodec, "parse", lambda *a: "no")
    found = first_difference(asked(), replayed(make_executor(), asked()), make_codec())
    assert found is not None
    assert "error : no" in found.hint and "today it ends with" in found.hint


def test_segments_that_end_otherwise_differ() -> None:
    session = asked()
    shorter = replace(session, segments=(Segment(session.segments[0].spans[:-1], session.segments[0].end),))
    found = first_difference(session, shorter, make_codec())
    assert found is not None
    assert "and then the segment ends" in found.found
    assert first_difference(session, session, make_codec()) is None


# --------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def test_a_run_is_identical(made: Path) -> None:
    result = agile("replay", made)
    assert (result.exit_code, result.output) == (0, "32 of 32 sessions identical\n")
    assert agile("replay", made, "--step", "2").output == "16 of 16 sessions identical\n"
    assert agile("replay", f"out={made}", "--session", "shop_0000/3").output == "2 of 2 sessions identical\n"
    one = agile("replay", made, "--session", "shop_0000/3", "--step", "1")
    assert one.output == "1 of 1 sessions identical\n"


def test_a_torn_last_line_is_skipped(run: Path) -> None:
    log = run / "sessions-0.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert agile("replay", run).output.endswith("31 of 31 sessions identical\n")


def test_a_changed_template_names_session_and_token(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = ProductQAAgent.advice
    monkeypatch.setattr(ProductQAAgent, "advice", lambda *a: advice(*a).replace("answer:", "answer :"))
    result = agile("replay", made)
    assert result.exit_code == 1
    sessions = [session_from_json(record["session"]) for record in read_lines(made / "sessions-0.jsonl")]
    number, first = next((n, s) for n, s in enumerate(sessions) if s.advised)
    assert f"{number} sessions identical, then {first.id} (step 1, sessions-0.jsonl): segment 0, token" in result.output
    assert "[SeekAdvice]: another text" in result.output


def test_a_changed_score_of_the_task_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProductQA, "is_correct", staticmethod(lambda *a: False))
    monkeypatch.setattr("agile.tasks.productqa.is_correct", lambda *a: False)
    result = agile("replay", made)
    assert result.exit_code == 1
    assert "reward\n  expected  1 {'correct': 1.0}\n  found     0 {'correct': 0.0}" in result.output


def test_other_data_are_named(run: Path) -> None:
    group = run / "minishop" / "train" / "shop_0000" / "qa.jsonl"
    lines = group.read_text().splitlines()
    group.write_text("\n".join(lines[::-1]) + "\n")
    result = agile("replay", run)
    assert result.exit_code == 1 and "the task's data have changed" in result.output


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--session", "shop_00/3"], "has no session 'shop_00/3'; the nearest of its 16 ids is 'shop_000"),
        (["--session", "shop_0000/3", "--step", "9"], "session shop_0000/3 has no step 9; it has 1, 2."),
        (["--step", "9"], "has no step 9; it has 1, 2."),
        (["--rescore", "nowhere"], "nowhere is no model"),
    ],
)
def test_what_is_not_there_is_named(made: Path, words: list[str], part: str) -> None:
    result = agile("replay", made, *words)
    assert result.exit_code == 2
    assert part in " ".join(result.output.split())


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for word in ("replay", "show"):
        assert "no such folder" in agile(word, tmp_path / "none").output
    log = run / "sessions-0.jsonl"
    log.write_text('{"step": 1, "session": {"id": "a"}}\n')
    assert "expected a session as this version logs it" in " ".join(agile("replay", run).output.split())
    shutil.rmtree(run / "sft")
    log.unlink()
    assert "holds no sessions" in agile("replay", run).output


def test_a_trained_run_is_identical_in_training_and_tests(tiny_run: TinyRun) -> None:
    assert agile("replay", tiny_run.path).output == "48 of 48 sessions identical\n"
    scored = agile("replay", tiny_run.path, "--rescore", tiny_run.path / "sft")
    assert "agree to 0.0001 nats: version 0, test of " in scored.output and "test of sft" in scored.output


# --------------------------------------------------------------------------------------------------------------------
# Rescore


def test_the_model_that_played_agrees_and_another_does_not(made: Path, run: Path) -> None:

    found = rescore_run(made, made / "sft", Console(quiet=True), step=2)["version 0"]
    assert found.max_difference < 1e-4 and found.outside == 0
    assert found.mean_ratio == pytest.approx(1, abs=1e-4)

    setup = Setup(load_config(made / "config.yaml", ["seed=5"]), made)
    other = setup.language_model(setup.tokenizer(made / "sft"))
    other.save_pretrained(run / "other")
    shutil.copy(run / "sft" / "tokenizer.json", run / "other")
    shutil.copy(run / "sft" / "tokenizer_config.json", run / "other")
    drift = rescore_run(made, run / "other", Console(quiet=True), step=2)["version 0"]

    differences = []  # the plain forward, a session at a time
    for record in read_lines(made / "sessions-0.jsonl"):
        if record["step"] == 2:
            for segment in session_from_json(record["session"]).segments:
                ids = torch.tensor([segment.token_ids])
                with torch.no_grad():
                    logprobs = other(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
                mask = segment.action_mask[1:]
                was = torch.tensor(segment.logprobs[1:])
                differences += (logprobs - was)[torch.tensor(mask)].tolist()
    ratios = np.exp(differences)
    assert drift.num_tokens == len(differences)
    assert drift.max_difference == pytest.approx(np.abs(differences).max(), abs=1e-5)
    assert drift.mean_difference == pytest.approx(np.abs(differences).mean(), abs=1e-5)
    assert drift.mean_ratio == pytest.approx(ratios.mean(), rel=1e-4)
    assert drift.outside == pytest.approx(((ratios < 0.9) | (ratios > 1.1)).mean(), abs=0.01)

    printed = agile("replay", made, "--rescore", made / "sft", "--step", "2")
    assert printed.exit_code == 0 and "agree to 0.0001 nats: version 0" in printed.output
