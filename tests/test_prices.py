"""The price of advice: drawn or scheduled for a stream, said in the prompt, paid in the reward, scored in reports."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agile.agents.product_qa import ProductQAAgent
from agile.config import load_config
from agile.copies import original_id
from agile.errors import AgileError
from agile.evaluate import Outcome, rates
from agile.prices import priced
from agile.prompts import instructions
from agile.rollout import collect, run_loop
from agile.stages.collection import chosen_streams
from agile.stages.validation import validate
from agile.types import Action, Fn, Stream
from tests.worlds import AGENT, ListMemory, item, make_codec, make_executor, script

STREAMS = [Stream(f"s{i}", (item(),)) for i in range(200)]
ASK = (Action(Fn.SEEK_ADVICE), Action(Fn.REFLECTION, "none"), Action(Fn.PREDICT_ANSWER, "yes"))


def prices_of(progress: float = 0.0, first: float | None = None, drawn: tuple[float, ...] = ()) -> list[float | None]:
    rng = np.random.default_rng(0)
    return [s.price for s in priced(STREAMS, 0.3, first_price=first, drawn_from=drawn, progress=progress, rng=rng)]


def test_constant_schedule_and_drawn() -> None:
    assert set(prices_of(0.7)) == {0.3}
    schedule = [prices_of(progress, first=0.1)[0] for progress in (0.0, 0.5, 1.0)]
    assert schedule == pytest.approx([0.1, 0.2, 0.3])
    drawn = prices_of(drawn=(0.1, 0.5))
    assert set(drawn) == {0.1, 0.5} and 70 < drawn.count(0.1) < 130


def test_rollouts_draw_a_price_each_unless_they_are_compared() -> None:
    def played(**ppo: Any) -> dict[str, set[float | None]]:
        task = SimpleNamespace(advice_price=0.3, first_price=None, training_prices=(0.1, 0.5))
        knobs = SimpleNamespace(streams_per_iteration=4, rollouts_per_stream=8, num_iterations=2, **ppo)
        setup: Any = SimpleNamespace(config=SimpleNamespace(seed=0, ppo=knobs, task=task), train_streams=STREAMS[:6])
        found: dict[str, set[float | None]] = {}
        for stream in chosen_streams(setup, 0):
            found.setdefault(original_id(stream.id), set()).add(stream.price)
        return found

    free, compared = played(estimator="gae"), played(estimator="group")
    assert set(free) == set(compared) and len(free) == 4
    assert all(prices == {0.1, 0.5} for prices in free.values())
    assert all(len(prices) == 1 for prices in compared.values())
    assert set().union(*compared.values()) == {0.1, 0.5}


def test_each_iteration_has_streams_of_its_own_and_the_last_has_the_price_itself() -> None:
    task = SimpleNamespace(advice_price=0.3, first_price=0.1, training_prices=())
    knobs = SimpleNamespace(streams_per_iteration=4, rollouts_per_stream=1, num_iterations=3, estimator="gae")
    setup: Any = SimpleNamespace(config=SimpleNamespace(seed=0, ppo=knobs, task=task), train_streams=STREAMS)
    found = [chosen_streams(setup, i) for i in range(3)]
    assert [streams[0].price for streams in found] == pytest.approx([0.1, 0.2, 0.3])
    assert len({tuple(s.id for s in streams) for streams in found}) == 3
    assert found == [chosen_streams(setup, i) for i in range(3)]


def test_the_price_of_a_stream_is_shown_paid_and_logged() -> None:
    agent = ProductQAAgent(show_schema=False, show_price=True)
    executor = make_executor(agent, codec=make_codec())
    assert "advice costs 0.45\n" in agent.question(item(), 0.0, 0.45)
    assert "costs" not in AGENT.question(item(), 0.0, 0.45)
    streams = [Stream("dear", (item(),), price=0.45), Stream("usual", (item(),))]
    dear, usual = (
        t.sessions[0]
        for t in run_loop(
            collect(
                executor,
                script(executor.codec, *ASK),
                streams,
                lambda stream: ListMemory(),
                seed=0,
                policy_for=lambda question, memory: script(executor.codec, *ASK),
            )
        )
    )
    assert (dear.price, usual.price) == (0.45, 0.3)
    assert dear.advice is not None and usual.advice is not None
    assert (dear.advice.price, usual.advice.price) == (0.45, 0.3)


def test_validation_plays_at_the_prices_of_training_in_turn() -> None:
    class Now:
        def play_now(self, play: Any, version: int) -> Any:
            return run_loop(play())

    def noted(policy: Any, decide: Any, temperatures: list[float], context: str) -> Action:
        temperatures.append(policy.temperature)
        action: Action = decide(context)
        return action

    drawn = ["agent.show_price=true", "task.training_prices=[0.1,0.5]", "task.advice_price=0.3"]
    executor = make_executor(ProductQAAgent(show_schema=False, show_price=True), codec=make_codec())
    for overrides, score in ((drawn, 1 - (0.1 + 0.5 + 0.1) / 3), (["task.advice_price=0.3"], 0.7)):
        setup: Any = SimpleNamespace(
            config=load_config(None, overrides), validation_streams=STREAMS[:3], memory=lambda stream: ListMemory()
        )
        asking: Any = script(executor.codec, *3 * ASK)
        asking.temperature = 1.0
        temperatures: list[float] = []
        asking.decide = partial(noted, asking, asking.decide, temperatures)
        collector: Any = Now()
        assert validate(setup, executor, asking, collector, 1)["validation/score"] == pytest.approx(score)
        assert set(temperatures) == {0.0} and asking.temperature == 1.0, "greedy, and only while it is validated"


def test_a_rate_may_have_a_price_for_each_outcome() -> None:
    results = [Outcome(str(i), "s", i, 4, "fact", correct=True, advised=i < 2) for i in range(4)]
    assert rates(results, 0.2)["score"] == pytest.approx(0.9)
    assert rates(results, [0.1, 0.5, 0.9, 0.9])["score"] == pytest.approx(0.85)


def test_instructions_leave_the_price_to_the_question() -> None:
    text = instructions(AGENT.spec, None)
    assert "Advice costs what stands above the question" in text and "asked at most once" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.training_prices=[0.1,0.5]"], "set agent.show_price=true"),
        (["task.training_prices=[0.1]", "task.first_price=0.2"], "remove one of them"),
        (["task.training_prices=[0.1,1.5]"], "1.5"),
        (["task.first_price=0"], "0"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(AgileError, match=re.escape(message)):
        load_config(None, overrides)
