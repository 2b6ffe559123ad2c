"""Training through the gateway: the executor's loss, resuming, learning with a control, advice, other processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from agile.advice import CallbackAdvisor
from agile.batching import session_rows
from agile.chat_template import chat_turns
from agile.errors import AgileError
from agile.executor import Limits
from agile.gateway import Gateway
from agile.learner import Learner
from agile.session_log import read_lines
from agile.tokens import ActionCodec
from agile.types import Action, Fn, Reward, Session, SessionStatus, Source, Trajectory
from tests.families import ASKS
from tests.gateway.agents import KEY, call, gateway, make_model, said, sampled, tell
from tests.test_metrics_doc import NAMED
from tests.tiny import agile
from tests.worlds import Add, NoteAgent, Replay, item, make_executor, play

PLAIN = {"kl_coef": 0.0, "value_warmup_epochs": 0, "batch_size": 8, "num_epochs": 1}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


async def ask(t: Any, *messages: Any, **options: Any) -> str:
    answer = await t.client.chat.completions.create(model="agile", messages=list(messages), **options)
    return answer.choices[0].message.content or ""


def test_the_executor_and_the_gateway_learn_the_same_from_the_same_tokens(model: Path, tmp_path: Path) -> None:
    """One session of the executor in the chat format, and the same conversation by a client."""
    with Learner(tmp_path / "a", model=str(model), ppo=PLAIN) as learner:
        turns, end_id = chat_turns(learner.tokenizer, instructions="Act.")
        codec = ActionCodec(learner.tokenizer, ASKS, special_tokens=False, turns=turns, end_id=end_id)
        actions = Action(Fn.REFLECTION, "1 and 2"), Action("Add", "1 2"), Action(Fn.PREDICT_ANSWER, "yes")
        replay = Replay([codec.encode_action(a) for a in actions])
        executor = make_executor(
            NoteAgent(spec=ASKS), codec=codec, tools={"Add": Add()}, limits=Limits(max_action_tokens=40)
        )
        session = play(executor, replay, item("1 + 2 ?"))
        assert session.status is SessionStatus.COMPLETED and len(session_rows(session)) == 2
        # what a client would send between the answers, window by window
        windows: list[list[tuple[str, str]]] = []
        for segment in session.segments:
            windows.append([("", "")])
            for span in segment.spans:
                shown, sampled_text = windows[-1][-1]
                text = codec.decode(span.token_ids)
                if span.source is Source.LLM:
                    windows[-1][-1:] = [(shown, text.removesuffix("<|im_end|>")), ("", "")]
                elif span.source is not Source.TEMPLATE:
                    windows[-1][-1] = shown + text, sampled_text
        tell(learner, *[answer for window in windows for _, answer in window[:-1]])

        async def converse(g: Gateway) -> None:
            async with g, g.trajectory(id="s") as t:
                for window in windows:
                    messages: list[Any] = [{"role": "system", "content": "Act."}]
                    for shown, _ in window[:-1]:
                        messages.append(user(shown))
                        messages.append({"role": "assistant", "content": await ask(t, *messages)})
                t.reward = 1.0

        g = gateway(learner)
        asyncio.run(converse(g))
        (captured,) = g.ended
        rows, expected_rows = session_rows(captured), session_rows(session)
        for row, expected in zip(rows, expected_rows, strict=True):
            num = len(row)  # what the executor shows after the last action is seen by nobody
            assert row.token_ids.tolist() == expected.token_ids[:num].tolist()
            assert row.action_mask.tolist() == expected.action_mask[:num].tolist()
            assert not expected.action_mask[num:].any() and row.end is expected.end
        whole = replace(session, reward=captured.reward, stream_id="s")
    metrics = []
    for name, played in (("b", captured), ("c", whole)):
        with Learner(tmp_path / name, model=str(model), ppo={**PLAIN, "estimator": "gae"}) as learner:
            with pytest.raises(AgileError, match=rf"reward of session {played.id} is nan, expected a finite number"):
                learner.step([Trajectory("s", (replace(played, reward=Reward({"correct": np.nan})),))])
            metrics.append(learner.step([Trajectory("s", (played,))]))
    assert metrics[0].keys() <= NAMED, "docs/metrics.md explains what a learner logs"
    for figures in metrics[1:]:
        for key in ("policy", "value", "entropy", "grad_norm", "ratio", "num_action_tokens"):
            assert figures[key] == pytest.approx(metrics[0][key], abs=1e-5), key


def play_games(learner: Learner, rewards: Callable[[str], float], steps: int, size: int = 16) -> list[float]:
    """Ask one question over and over; returns the mean reward of each step."""
    found = []

    async def agent(g: Gateway) -> None:
        async with g.trajectory(group="q") as t:
            t.reward = rewards(await ask(t, user("is it washable ?"), max_tokens=2))

    async def run() -> None:
        async with gateway(learner) as g:
            for _ in range(steps):
                await asyncio.gather(*(agent(g) for _ in range(size)))
                found.append(float(np.mean([s.reward.total for s in g.ended if s.reward])))
                await g.train_step()

    asyncio.run(run())
    return found


GROUP = {
    "kl_coef": 0.0,
    "value_warmup_epochs": 0,
    "value_coef": 0.0,
    "estimator": "group",
    "lr": 0.01,
    "num_epochs": 2,
    "batch_size": 64,
}


@pytest.mark.slow
def test_an_agent_behind_the_gateway_learns_and_its_control_does_not(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def short(text: str) -> float:
        return float("e" in text)

    def chance(text: str) -> float:
        return float(rng.random() < 0.3)

    after = {}
    for name, rewards in (("learns", short), ("control", chance)):
        seen: list[float] = []

        def score(text: str, rewards: Callable[[str], float] = rewards, seen: list[float] = seen) -> float:
            seen.append(short(text))
            return rewards(text)

        with Learner(tmp_path / name, model=str(model), ppo=GROUP) as learner:
            play_games(learner, score, 15)
        after[name] = np.mean(seen[:32]), np.mean(seen[-64:])
    assert after["learns"][1] > after["learns"][0] + 0.3
    assert after["control"][1] < after["control"][0] + 0.2


def test_resumed_it_is_the_same_training(model: Path, tmp_path: Path) -> None:
    """Two steps, a stop, and one more, against three steps at once: bit for bit, and every trajectory is logged."""

    def rewards(text: str) -> float:
        return float("e" in text)

    settings: dict[str, Any] = {"model": str(model), "ppo": {**GROUP, "checkpoint_every": 1}}
    trajectories = []
    with Learner(tmp_path / "whole", **settings) as learner:
        for _ in range(3):

            async def run(g: Gateway) -> list[Session]:
                async def agent() -> None:
                    async with g.trajectory(group="q") as t:
                        t.reward = rewards(await ask(t, user("is it washable ?"), max_tokens=2))

                async with g:
                    await asyncio.gather(*(agent() for _ in range(6)))
                return list(g.ended)

            sessions = asyncio.run(run(gateway(learner)))
            trajectories.append([Trajectory(s.stream_id, (s,)) for s in sessions])
            learner.step(trajectories[-1])
    with Learner(tmp_path / "parts", **settings) as learner:
        for played in trajectories[:2]:
            learner.step(played)
    with pytest.raises(AgileError, match="holds a run already"):
        Learner(tmp_path / "parts", **settings)
    with pytest.raises(AgileError, match="was started with another config: seed was 0, is now 1"):
        Learner(tmp_path / "parts", resume=True, seed=1, **settings)
    with Learner(tmp_path / "parts", resume=True, **settings) as learner:
        assert learner.steps == 2 and learner.policy.version == 2
        learner.step(trajectories[2])
    for name in ("ppo/model.safetensors", "sessions-0.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert len(list(read_lines(tmp_path / "whole" / "sessions-0.jsonl"))) == 18
    shown = agile("show", tmp_path / "whole", "--session", "q#0/0", "--step", "2", "--logprobs")
    assert shown.exit_code == 0 and "is it washable ?" in shown.output and "reward" in shown.output
    refused = agile("show", tmp_path / "whole", "--session", "q#0/0", "--values")
    assert refused.exit_code != 0 and "agile.Learner" in refused.output


def test_new_weights_serve_the_next_call_and_open_trajectories_go_on(model: Path, tmp_path: Path) -> None:
    async def run(g: Gateway) -> None:
        async with g, g.trajectory(id="long") as long:
            first = await ask(long, user("a"), max_tokens=4)
            for reward in (0.0, 1.0):
                async with g.trajectory() as t:
                    await ask(t, user("b"), max_tokens=4)
                    t.reward = reward
            await g.train_step()
            await ask(long, user("a"), {"role": "assistant", "content": first}, user("c"), max_tokens=4)
            long.reward = 0.0

    with Learner(tmp_path / "run", model=str(model), ppo=PLAIN) as learner:
        before = [p.clone() for p in learner.engine.module.lm.parameters()]
        g = gateway(learner)
        asyncio.run(run(g))
        after = list(learner.engine.module.lm.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (session,) = g.ended
    assert [s.policy_version for segment in session.segments for s in segment.spans if s.logprobs] == [0, 1]


def test_advice_is_asked_within_the_call_and_paid_from_the_reward(learner: Learner) -> None:
    told = tell(learner, call("seek_advice", question="steel ?"), "yes", "no")
    asked = []

    def expert(request: Any) -> str:
        asked.append((request.item.question, request.message, request.price))
        return "steel is washable"

    async def run(g: Gateway) -> None:
        async with g, g.trajectory() as t:
            assert await ask(t, user("is it ?")) == "yes"  # the client knows nothing of it
            assert await ask(t, user("is it ?"), {"role": "assistant", "content": "yes"}, user("sure ?")) == "no"
            t.reward = 1.0

    g = gateway(learner, advisor=CallbackAdvisor(expert), advice_price=0.25)
    asyncio.run(run(g))
    (session,) = g.ended
    assert asked == [("is it ?", "steel ?", 0.25)]
    assert session.reward is not None and session.reward.components == {"reward": 1.0, "advice": -0.25}
    assert session.advised and session.price == 0.25
    (segment,) = session.segments  # the expert's words stay in the context of later calls
    assert [s.source for s in segment.spans].count(Source.LLM) == 3 and sampled(session) == said(told)
    advice = next(s for s in segment.spans if s.source is Source.ADVISOR)
    assert "steel is washable" in learner.tokenizer.decode(list(advice.token_ids))
    assert "seek_advice" in learner.tokenizer.decode(list(segment.spans[0].token_ids))


def test_without_an_answer_advice_costs_nothing_and_asking_ends(learner: Learner) -> None:
    tell(learner, *[call("seek_advice", question="steel ?")] * 6)

    async def run(g: Gateway) -> None:
        async with g, g.trajectory() as t:
            await ask(t, user("is it ?"))
            t.reward = 1.0

    g = gateway(learner, advisor=CallbackAdvisor(lambda request: None))
    asyncio.run(run(g))
    assert g.ended[0].reward is not None and g.ended[0].reward.components == {"reward": 1.0}
    assert len([s for s in g.ended[0].segments[0].spans if s.source is Source.ADVISOR]) == 4


REMOTE = """
import json, sys, urllib.request
def post(path, key, **body):
    request = urllib.request.Request(sys.argv[1] + path, json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": "Bearer " + key})
    return json.load(urllib.request.urlopen(request))
t = post("/trajectories", sys.argv[2], group="far")
for question in ("a", "b"):
    post("/chat/completions", t["api_key"], model="agile", messages=[{"role": "user", "content": question}])
print(post("/trajectories/" + t["id"].replace("#", "%23") + "/end", sys.argv[2], reward=0.5))
post("/trajectories", sys.argv[2], id="silent")
"""


@pytest.mark.slow
def test_an_agent_in_another_process_needs_nothing_but_http(learner: Learner) -> None:
    tell(learner, "one", "two")

    async def run(g: Gateway) -> None:
        async with g:
            words = [sys.executable, "-c", REMOTE, g.base_url, KEY]
            output = await asyncio.to_thread(subprocess.check_output, words, timeout=600)
            assert json.loads(output.decode().replace("'", '"')) == {"id": "far#0", "calls": 2}
            while len(g.ended) < 2:  # the one that went silent
                await asyncio.sleep(0.05)
            client = openai.AsyncOpenAI(base_url=g.base_url, api_key="wrong", max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
            await client.close()

    g = gateway(learner, idle_s=5)  # more than a busy machine needs between two calls
    asyncio.run(asyncio.wait_for(run(g), 900))
    done, silent = g.ended
    assert done.stream_id == "far#0" and done.item_id == "far" and len(done.segments) == 2
    assert silent.status is SessionStatus.FAILED and "idle_s" in silent.error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "model is"),
        ({"model": "nowhere/at-all"}, "Cannot load a tokenizer from nowhere/at-all"),
        ({"model": "x", "ppo": {"learning_rate": 1}}, "Unknown key ppo.learning_rate. Did you mean ppo.lr"),
        ({"model": "x", "ppo": {"estimator": "group"}}, "ppo.value_coef=0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AgileError) as raised:
        Learner(tmp_path / "run", **settings)
    assert words in str(raised.value)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    with Learner(tmp_path / "run", model=str(path), ppo=PLAIN) as learner, pytest.raises(AgileError, match="no chat"):
        Gateway(learner)
