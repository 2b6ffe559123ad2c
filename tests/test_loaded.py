"""`agile.load`: an agent in a program, which asks a function of ours and remembers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import agile
from agile.errors import AgileError
from agile.loaded import LoadedAgent
from agile.policies.scripted import ScriptedPolicy
from agile.types import Action, AdviceRequest, AdviceStatus

QUESTION = "is it heavy ?"


def decide(context: str) -> Action:
    if context.rstrip().endswith("[Reflection]"):
        return Action("Reflection", "none")
    if "answer:" in context:
        return Action("PredictAnswer", context.rsplit("answer:", 1)[1].split()[0])
    if "history 1.00 same" in context:
        return Action("PredictAnswer", context.rsplit("->", 1)[1].split()[0])
    return Action("PredictAnswer", "none") if "no advice" in context else Action("SeekAdvice")


def scripted(agent: LoadedAgent) -> LoadedAgent:
    """With a script in the place of the random weights."""

    class Policy(ScriptedPolicy):
        def close(self) -> None:
            pass

    agent._policy.close()
    agent._policy = Policy(agent._executor.codec, decide)  # type: ignore[assignment]
    return agent


@pytest.fixture
def agent(made: Path) -> Iterator[LoadedAgent]:
    with scripted(agile.load(made)) as agent:
        yield agent


def test_it_asks_once_and_remembers(agent: LoadedAgent) -> None:
    asked: list[str] = []

    def expert(request: AdviceRequest) -> str:
        asked.append(request.item.question)
        return "yes"

    product, other = agent.products[:2]
    first = agent.ask(QUESTION, product=product, advisor=expert)
    assert (str(first), first.advised, asked) == ("yes", True, [QUESTION])
    again = agent.ask(QUESTION, product=product, advisor=expert)
    assert (str(again), again.advised, len(asked)) == ("yes", False, 1)
    assert agent.ask(QUESTION, product=other, advisor=lambda request: "no").text == "no"
    assert first.session.id != again.session.id


def test_async_advisors_run_where_the_asker_is_and_questions_at_once(agent: LoadedAgent) -> None:
    products = agent.products[:3]

    async def main() -> list[str]:
        here, together = asyncio.get_running_loop(), asyncio.Barrier(3)

        async def expert(request: AdviceRequest) -> str:
            assert asyncio.get_running_loop() is here
            await together.wait()  # all three are asked before one is answered
            return "yes"

        answers = await asyncio.gather(*(agent.ask_async(QUESTION, product=p, advisor=expert) for p in products))
        return [str(answer) for answer in answers]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == ["yes"] * 3


def test_without_anybody_to_ask_the_agent_hears_so(agent: LoadedAgent) -> None:
    answer = agent.ask(QUESTION, product=agent.products[0])
    assert answer.text == "none" and answer.session.advice is not None
    assert answer.session.advice.status is AdviceStatus.REFUSED
    broken = agent.ask(QUESTION, product=agent.products[0], advisor=lambda request: 1 / 0)  # type: ignore[return-value,arg-type]
    assert broken.session.advice is not None and broken.session.advice.status is AdviceStatus.FAILED


def test_who_gives_up_waits_no_longer(agent: LoadedAgent) -> None:
    asked = threading.Event()

    async def main() -> None:
        async def expert(request: AdviceRequest) -> str:
            asked.set()
            await asyncio.sleep(3600)
            return "never"

        asking = asyncio.create_task(agent.ask_async(QUESTION, product=agent.products[0], advisor=expert))
        await asyncio.to_thread(asked.wait, 60)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(asyncio.wait_for(main(), 90))


def test_memory_outlasts_the_program_where_it_is_told_to(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    with scripted(agile.load(str(made), memory=str(path))) as agent:
        product = agent.products[0]
        agent.ask(QUESTION, product=product, advisor=lambda request: "yes")
    agent.close()
    with pytest.raises(AgileError, match="is closed"):
        agent.ask(QUESTION, product=product)
    with scripted(agile.load(made, memory=path)) as agent:
        again = agent.ask(QUESTION, product=product)
        assert (str(again), again.advised, again.session.id) == ("yes", False, "asked/1")


def test_what_cannot_be_asked(agent: LoadedAgent, tmp_path: Path) -> None:
    with pytest.raises(AgileError, match="expected one of " + agent.products[0]):
        agent.ask(QUESTION, product="nothing")
    with pytest.raises(AgileError, match="expected text"):
        agent.ask("  ", product=agent.products[0])
    with pytest.raises(AgileError, match="Options cannot be chosen from"):
        agent.ask(QUESTION, product=agent.products[0], options={"A": "x", "B": "y"})
    with pytest.raises(AgileError, match="no trained agent"):
        agile.load(tmp_path)


def test_the_model_itself_plays(made: Path) -> None:
    """Random weights: whatever they do, it is an answer or the reason why there is none."""
    with agile.load(made) as agent:
        answer = agent.ask(QUESTION, product=agent.products[0], advisor=lambda request: "yes")
        assert answer.text is not None or answer.session.failed
