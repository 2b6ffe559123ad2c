"""Playing the scripted agents that show what experts are worth: through the executor, logged as any other agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from agile.build import Setup
from agile.config import ExpertConfig
from agile.errors import AgileError
from agile.evaluate import Outcome, outcomes
from agile.executor import Executor
from agile.expert_worth import Asked, Key, experts_table, gains
from agile.experts import Timed, who_always_asks, who_never_asks
from agile.play import play_streams
from agile.prompted import cost_of, spent
from agile.protocols import Policy
from agile.tasks.scoring import UNREADABLE_ADVICE, unreadable
from agile.tokens import ActionCodec
from agile.types import Item, Trajectory


@dataclass(slots=True)
class Experts:
    """What was played for `evaluate.experts`.

    Attributes:
        results: Outcomes by agent: `<expert>` where it has recorded answers and plays alone, `asks <expert>`.
        asked: What each expert answered.
        details: What else is to be said of each agent.
        seconds: How long each was played.
        costs: Money that those experts took in this run that are models.
    """

    results: dict[str, list[Outcome]] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def report(
        self, agents: dict[str, list[Outcome]], own: dict[str, dict[Key, bool]], *, macro: bool
    ) -> dict[str, Any]:
        """The key `experts` of report.json: `experts`, one row each, and `gains`, what each is worth to each agent.

        Args:
            agents: Agents that were played beside these.
            own: Whether their own answers are right where they asked, as far as that was found out.
        """
        alone = {name: played for name, played in self.results.items() if not any(o.advised for o in played)}
        return {
            "experts": experts_table(self.asked),
            "gains": gains({**agents, **alone}, self.asked, own=own, macro=macro),
        }


def play_experts(setup: Setup, out: Path) -> Experts:
    """Ask every expert of `evaluate.experts` about every test question; sessions go to `<out>/test-<agent>.jsonl`.

    The agent that asks remembers what it was told and reads its memory as any other. What an agent is charged is
    `task.advice_price`; an expert's own price counts in what it is worth.
    """
    found = Experts()
    config = setup.config
    if not config.evaluate.experts:
        return found
    tokenizer = setup.carrier()
    codec = ActionCodec(tokenizer, setup.agent.spec)
    streams = setup.task.streams("test")
    setup.embed(streams)
    items = {(stream.id, item.id): item for stream in streams for item in stream.items}
    for name in config.evaluate.experts:
        expert = config.experts.get(name, ExpertConfig())
        if expert.kind == "recorded":
            answers = setup.recorded(expert)
            if not any(item.id in answers for item in items.values()):
                raise AgileError(
                    f"experts.{name}: none of its {len(answers):,} recorded answers is to a test question, such as "
                    f"{next(iter(items.values())).id!r}; found {min(answers, default='none')!r}. Give the file of "
                    "answers to these questions."
                )
            executor = setup.executor(tokenizer, codec=codec)
            _add(found, name, *_play(setup, executor, partial(who_never_asks, codec, answers), name, out))
        advisor = Timed(setup.advisor(name))
        executor = setup.executor(tokenizer, advisor, codec)
        executor.limits = replace(executor.limits, max_stage_s=None)  # an endpoint has a patience of its own
        played, seconds = _play(setup, executor, partial(who_always_asks, codec), f"asks {name}", out, advisor)
        _add(found, f"asks {name}", played, seconds)
        if (endpoint := getattr(advisor.advisor, "endpoint", None)) is not None:
            found.details[f"asks {name}"] = {**found.details.get(f"asks {name}", {}), "expert asked": spent(endpoint)}
        found.costs[f"asks {name}"] = cost_of(advisor.advisor)
        latency_s = expert.latency_s
        if latency_s is None and expert.kind == "model":
            latency_s = advisor.seconds / max(1, advisor.num_asked)
        price = config.task.advice_price if expert.price is None else expert.price
        found.asked[name] = _asked(setup, played, items, price, latency_s)
    return found


def _add(found: Experts, name: str, played: list[Trajectory], seconds: float) -> None:
    found.results[name] = outcomes(played)
    found.seconds[name] = seconds
    if counts := unreadable(session for t in played for session in t.sessions):
        found.details[name] = counts


def _asked(
    setup: Setup, played: list[Trajectory], items: dict[Key, Item], price: float, latency_s: float | None
) -> Asked:
    answered: set[Key] = set()
    right: set[Key] = set()
    sessions = [session for t in played for session in t.sessions]
    for session in sessions:
        if session.advice is None or not session.advised:
            continue
        answered.add(session.key)
        if setup.task.is_correct(items[session.key], session.advice.answer, False):
            right.add(session.key)
    num_unreadable = unreadable(sessions).get(UNREADABLE_ADVICE, 0)
    return Asked(len(sessions), frozenset(answered), frozenset(right), num_unreadable, price, latency_s)


def _play(
    setup: Setup,
    executor: Executor,
    policy_for: Callable[[Item], Policy],
    name: str,
    out: Path,
    advisor: Timed | None = None,
) -> tuple[list[Trajectory], float]:
    """Play the test streams and keep the sessions; also how many seconds it took."""
    began = time.monotonic()
    trajectories = play_streams(
        setup,
        executor,
        policy_for(setup.task.streams("test")[0].items[0]),
        name,
        out / f"test-{name.replace(' ', '-')}.jsonl",
        memory=setup.memory,
        policy_for=policy_for,
        close=None if advisor is None else advisor.close,
    )
    return trajectories, time.monotonic() - began
