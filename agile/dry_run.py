"""`agile bench --dry-run`: what a benchmark would take, measured on a few sessions that a script plays."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from agile.build import Setup
from agile.config import RunConfig
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory, Policy
from agile.rollout import collect
from agile.types import Action, Completion, Item, Stream

SAMPLE = 24  # sessions that are played


@dataclass(frozen=True, slots=True)
class Plan:
    """What an agent would take.

    Attributes:
        sessions: Of all test questions, at all prices at which it plays anew.
        calls: Completions.
        expert_calls: Questions that the script asked about, scaled up: a guess for an agent that is not known yet.
        money: At the config's prices; None where the model is one's own.
        most: The same with every completion as long as the config allows.
    """

    agent: str
    sessions: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    expert_calls: int
    money: float | None = None
    most: float | None = None


@dataclass(slots=True)
class _Counted:
    """A policy that counts the tokens of its completions."""

    policy: Policy
    calls: list[tuple[int, int]] = field(default_factory=list)

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        completion = await self.policy.complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)
        self.calls.append((len(prompt_ids), len(completion.token_ids)))
        return completion


def plan_bench(config: RunConfig) -> tuple[list[Plan], str]:
    """What each agent of the config would take, and by whose tokens that is counted.

    The first questions of up to four test streams are played by the script that imitation learns from, with the memory
    that it gathers. Longer memories make longer prompts only until they are full, which takes a few questions.
    """
    with TemporaryDirectory() as folder:
        quick = config.memory.model_copy(update={"encoder": "hashing", "cache": None})
        setup = Setup(config.model_copy(update={"memory": quick}), Path(folder))
        streams = setup.task.streams("test")
        tokenizer = setup.tokenizer() if config.model.path else setup.carrier()
        counted: list[_Counted] = []
        executor = setup.executor(tokenizer)
        teacher, rng = setup.agent.teacher(executor.codec, 0.0), np.random.default_rng(config.seed)

        def script(item: Item, memory: Memory) -> Policy:
            counted.append(_Counted(teacher.policy(item, memory, config.task.advice_price, rng)))
            return counted[-1]

        nobody = ScriptedPolicy(executor.codec, lambda context: Action(""))
        chosen = [Stream(s.id, s.items[: SAMPLE // min(4, len(streams))]) for s in streams[:4]]
        played = asyncio.run(
            collect(executor, nobody, chosen, setup.memory, seed=config.seed, policy_for=script, max_failed=1.0)
        )
    calls = [call for one in counted for call in one.calls]
    advised = sum(session.advised for trajectory in played for session in trajectory.sessions)
    each = _Sample(len(counted), len(calls), sum(p for p, _ in calls), sum(c for _, c in calls), advised)
    questions = sum(len(stream.items) for stream in streams)
    whose = f"the tokenizer of {config.model.path}" if config.model.path else "a tokenizer made of the task's texts"
    return [_plan(config, name, questions, each) for name in _agents(config)], whose


@dataclass(frozen=True, slots=True)
class _Sample:
    sessions: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    expert_calls: int


def _agents(config: RunConfig) -> list[str]:
    """The agents that `agile bench` plays, those that are still to be trained included."""
    return [name for name in config.evaluate.agents if name == "prompted" or name in config.stages]


def _plan(config: RunConfig, agent: str, questions: int, sample: _Sample) -> Plan:
    evaluate, price = config.evaluate, config.task.advice_price
    anew = agent != "prompted" and config.agent.show_price
    sessions = questions * (1 + (len({*evaluate.prices} - {price}) if anew else 0))

    def scaled(number: int) -> int:
        return round(sessions * number / sample.sessions)

    plan = Plan(
        agent,
        sessions,
        scaled(sample.calls),
        scaled(sample.prompt_tokens),
        scaled(sample.completion_tokens),
        scaled(sample.expert_calls),
    )
    if agent != "prompted":
        return plan
    prices, longest = evaluate.prompted.prices, plan.calls * evaluate.prompted.max_tokens
    read = plan.prompt_tokens * prices.input
    return replace(
        plan,
        money=(read + plan.completion_tokens * prices.output) / 1e6,
        most=(read + longest * prices.output) / 1e6,
    )


def print_plan(config: RunConfig, console: Console) -> None:
    """Print what `agile bench` would take with this config; nothing is run, and no endpoint asked."""
    plans, whose = plan_bench(config)
    table = Table(title=f"Plan: {config.task.name}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("agent", no_wrap=True)
    for column in ("sessions", "calls", "tokens read", "tokens written", "expert calls", "money"):
        table.add_column(column, justify="right")
    for plan in plans:
        figures = (plan.sessions, plan.calls, plan.prompt_tokens, plan.completion_tokens, plan.expert_calls)
        money = "" if plan.money is None else f"{plan.money:,.2f} to {plan.most:,.2f}"
        table.add_row(plan.agent, *(f"{figure:,}" for figure in figures), money)
    console.print(table)
    console.print(
        f"Counted by {whose}, on {SAMPLE} questions that the teacher of imitation played; an agent's own lengths and "
        "expert calls differ. Money: with the teacher's short answers, and with every answer as long as "
        "evaluate.prompted.max_tokens; nothing taken off for what the endpoint caches. Baselines call no model.",
        style="dim",
        soft_wrap=True,
    )
    if set(_agents(config)) - {"prompted"} and not config.evaluate.checkpoint:
        console.print("Trained agents are played once evaluate.checkpoint names their run.", style="dim")
