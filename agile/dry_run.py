"""`agile bench --dry-run`: what a benchmark would take, measured on a few sessions that a script plays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from agile.build import Setup
from agile.config import ExpertConfig, RunConfig
from agile.errors import AgileError
from agile.evaluate import best_of
from agile.measure import trained_agents, trained_config
from agile.policies.scripted import ScriptedPolicy
from agile.prompts import instructions
from agile.protocols import Memory, Policy
from agile.rollout import collect
from agile.types import Action, Completion, Item, Stream

SAMPLE = 24  # sessions that are played
ABLATIONS, ASKS = ", ablations", "asks "  # after the name of an agent, before that of an expert


@dataclass(frozen=True, slots=True)
class Plan:
    """What an agent would take: one row of the table.

    Attributes:
        agent: Its name; that of an agent whose ablations are played, or of an expert who plays or is asked.
        sessions: Of all runs, on all test questions, at all prices at which it plays anew.
        calls: Completions in these sessions.
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
        tokenizer, whose = _tokenizer(setup)
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
    told = len(tokenizer(instructions(setup.agent.spec, config.task.advice_price))["input_ids"])
    each = _Sample(told, len(counted), len(calls), sum(p for p, _ in calls), sum(c for _, c in calls), advised)
    questions = sum(len(stream.items) for stream in streams)
    return [_plan(config, label, sessions, each) for label, sessions in num_sessions(config, questions).items()], whose


def _tokenizer(setup: Setup) -> tuple[PreTrainedTokenizerFast, str]:
    """What counts tokens, and its name: the model's where it is on this machine."""
    path, own = setup.config.model.path, "a tokenizer made of the task's texts"
    if not path:
        return setup.carrier(), own
    try:
        return setup.tokenizer(), f"the tokenizer of {path}"
    except AgileError:
        return setup.carrier(), f"{own}, for that of {path} is not on this machine"


@dataclass(frozen=True, slots=True)
class _Sample:
    told: int  # tokens of the rules, which a prompted model reads with every call
    sessions: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    expert_calls: int


def num_sessions(config: RunConfig, questions: int) -> dict[str, int]:
    """How many sessions `agile bench` plays of every agent, of what ablations leave of one, and of experts.

    Without `evaluate.checkpoint`, those of the one run that is still to be trained.

    Args:
        questions: Number of test questions.

    Raises:
        AgileError: `evaluate.checkpoint` names a folder that is no run.
    """
    evaluate, found = config.evaluate, Counter[str]()
    times = 1 + sum(price != config.task.advice_price for price in evaluate.prices) * config.agent.show_price
    for trained in [trained_config(run) for run in evaluate.checkpoint] or [config]:
        names = trained_agents(config, trained)
        for name in dict.fromkeys(evaluate.agents):
            found[name] += questions * (times * (name in names) + (name == "prompted"))
        if best := best_of(names):
            found[best + ABLATIONS] += questions * times * sum(ablation != "rl" for ablation in evaluate.ablations)
        for expert in evaluate.experts:
            found[expert] += questions * (config.experts.get(expert, ExpertConfig()).kind == "recorded")
            found[ASKS + expert] += questions
    return {label: number for label, number in found.items() if number}


def _plan(config: RunConfig, label: str, sessions: int, sample: _Sample) -> Plan:
    if label not in config.evaluate.agents and not label.endswith(ABLATIONS):  # a script that plays an expert
        return Plan(label, sessions, 0, 0, 0, sessions * label.startswith(ASKS))

    def scaled(number: int) -> int:
        return round(sessions * number / sample.sessions)

    plan = Plan(
        label,
        sessions,
        scaled(sample.calls),
        scaled(sample.prompt_tokens),
        scaled(sample.completion_tokens),
        scaled(sample.expert_calls),
    )
    if label != "prompted":
        return plan
    prompted = config.evaluate.prompted
    prices, longest = prompted.prices, plan.calls * prompted.max_tokens
    prompt_tokens = plan.prompt_tokens + plan.calls * sample.told
    read = prompt_tokens * prices.input
    return replace(
        plan,
        prompt_tokens=prompt_tokens,
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
        "evaluate.prompted.max_tokens; nothing taken off for what the endpoint caches. Baselines and scripts that show "
        "what experts are worth call no model; what experts cost that are models themselves is not counted.",
        style="dim",
        soft_wrap=True,
    )
    if trained_agents(config, config) and not config.evaluate.checkpoint:
        console.print("Trained agents are played once evaluate.checkpoint names their run.", style="dim")
