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

from agile.advice.model import SYSTEM
from agile.build import Setup
from agile.config import GOLD, ExpertConfig, PromptedConfig, RunConfig
from agile.errors import AgileError
from agile.evaluate import best_of
from agile.judge import PROMPT
from agile.measure import trained_agents, trained_config
from agile.policies.scripted import ScriptedPolicy
from agile.prompts import instructions
from agile.protocols import Memory, Policy
from agile.rollout import collect
from agile.types import Action, Completion, Item, Stream

SAMPLE = 24  # sessions that are played
ADVICE_TOKENS = 50  # that a model writes which is asked for advice: one or two sentences and the answer
MOST_ROWS = 20  # bad rows that are listed
ABLATIONS, ASKS = ", ablations", "asks "  # after the name of an agent, before that of an expert


@dataclass(frozen=True, slots=True)
class Plan:
    """What an agent would take: one row of the table.

    Attributes:
        agent: Its name; that of an agent whose ablations are played, or of an expert who plays or is asked; or a model
            that judges answers or advises agents, of which calls are the most that there can be.
        sessions: Of all runs, on all test questions, at all prices at which it plays anew; 0 of a model that is asked.
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


def plan_bench(config: RunConfig) -> tuple[list[Plan], str, list[str]]:
    """What each agent of the config would take, by whose tokens that is counted, and which bad rows were left out.

    The first questions of up to four test streams are played by the script that imitation learns from, with the memory
    that it gathers. Longer memories make longer prompts only until they are full, which takes a few questions.
    """
    with TemporaryDirectory() as folder:
        quick = config.memory.model_copy(update={"encoder": "hashing", "cache": None})
        someone = config.experts.get(config.expert, ExpertConfig()).kind in ("model", "desk")  # nobody is asked here
        expert = GOLD if someone else config.expert
        setup = Setup(config.model_copy(update={"memory": quick, "expert": expert}), Path(folder))
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
    items = [item for stream in chosen for item in stream.items]

    def tokens(texts: Sequence[str]) -> int:
        return sum(len(ids) for ids in tokenizer(list(texts))["input_ids"])

    each = _Sample(
        told=tokens([instructions(setup.agent.spec, config.task.advice_price)]),
        sessions=len(counted),
        calls=len(calls),
        prompt_tokens=sum(p for p, _ in calls),
        completion_tokens=sum(c for _, c in calls),
        expert_calls=advised,
        advice_tokens=tokens([f"{SYSTEM}\n{setup.agent.question(item, 0.0, 1.0)}" for item in items]),
        judge_tokens=tokens([PROMPT.format(question=i.question, gold=i.answer, answer=i.answer) for i in items]),
    )
    sessions = num_sessions(config, sum(len(stream.items) for stream in streams))
    plans = [_plan(config, label, number, each) for label, number in sessions.items()]
    return [*plans, *_models(config, plans, each)], whose, setup.skipped


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
    advice_tokens: int  # that a model would read which is asked for advice on every question
    judge_tokens: int  # or that judges every answer


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


def _asked(label: str, sessions: int, calls: int, read: float, written: int, endpoint: PromptedConfig) -> Plan:
    """A model behind an endpoint that is asked `calls` times, `read` and `written` tokens each."""
    prices = endpoint.prices
    paid, longest = calls * read * prices.input, calls * endpoint.max_tokens * prices.output
    figures = {"money": (paid + calls * written * prices.output) / 1e6, "most": (paid + longest) / 1e6}
    advised = calls if label.startswith(ASKS) else 0
    return Plan(label, sessions, calls, round(calls * read), calls * written, advised, **figures)


def _models(config: RunConfig, plans: Sequence[Plan], sample: _Sample) -> list[Plan]:
    """Rows for the models that agents ask for advice, and that judge their answers."""
    rows = []
    adviser, judge = config.experts.get(config.expert, ExpertConfig()), config.task.judge
    calls = sum(plan.expert_calls for plan in plans if not plan.agent.startswith(ASKS))
    if adviser.endpoint is not None and calls:
        label = f"expert {config.expert}"
        rows.append(_asked(label, 0, calls, sample.advice_tokens / sample.sessions, ADVICE_TOKENS, adviser.endpoint))
    times = 1 + sum(price != config.task.advice_price for price in config.evaluate.prices) * config.agent.show_price
    played = [plan for plan in plans if _plays(config, plan.agent)]  # judged at the config's price alone
    judged = sum(plan.sessions // (1 if plan.agent == "prompted" else times) for plan in played)
    if judge is not None and judged:
        rows.append(_asked("judge", 0, judged, sample.judge_tokens / sample.sessions, 1, judge))
    return rows


def _plays(config: RunConfig, label: str) -> bool:
    return label in config.evaluate.agents


def _plan(config: RunConfig, label: str, sessions: int, sample: _Sample) -> Plan:
    if not _plays(config, label) and not label.endswith(ABLATIONS):  # a script that plays an expert
        expert = config.experts.get(label.removeprefix(ASKS), ExpertConfig())
        if label.startswith(ASKS) and expert.endpoint is not None:
            read = sample.advice_tokens / sample.sessions
            return _asked(label, sessions, sessions, read, ADVICE_TOKENS, expert.endpoint)
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
    plans, whose, skipped = plan_bench(config)
    table = Table(title=f"Plan: {config.task.name}", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("agent", no_wrap=True)
    for column in ("sessions", "calls", "tokens\nread", "tokens\nwritten", "expert\ncalls", "money"):
        table.add_column(column, justify="right", no_wrap=True)
    for plan in plans:
        figures = (plan.sessions, plan.calls, plan.prompt_tokens, plan.completion_tokens, plan.expert_calls)
        money = "" if plan.money is None or plan.most is None else f"{_money(plan.money)} to {_money(plan.most)}"
        money = "no prices set" if plan.most == 0 else money
        table.add_row(plan.agent, *map(in_short, figures), money)
    console.print(table)
    console.print(
        f"Counted by {whose}, on {SAMPLE} questions that the teacher of imitation played; an agent's own lengths and "
        "expert calls differ. Money: with short answers, and with every answer as long as max_tokens of its endpoint; "
        "nothing taken off for what the endpoint caches. A judge is asked about wrong answers alone, an expert about "
        "each question once: their rows are the most that there can be. Baselines, and scripts that show what experts "
        "are worth, call no model of their own.",
        style="dim",
        soft_wrap=True,
    )
    if skipped:
        console.print(f"Bad rows that are left out: {len(skipped):,}")
        for row in [*skipped[:MOST_ROWS], *(["..."] if len(skipped) > MOST_ROWS else [])]:
            console.print(f"  {row}", markup=False, soft_wrap=True)
    if trained_agents(config, config) and not config.evaluate.checkpoint:
        console.print("Trained agents are played once evaluate.checkpoint names their run.", style="dim")


def _money(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def in_short(number: int) -> str:
    """A number in a few places.

    >>> [in_short(n) for n in (9_999, 17_676, 999_949, 17_676_300, 2_345_000_000)]
    ['9,999', '17.7k', '999.9k', '17.7M', '2,345.0M']
    """
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e3:,.1f}k" if number < 999_950 else f"{number / 1e6:,.1f}M"
