"""Playing the test questions of a task: a trained agent, whole or without an ability, and a prompted one."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import get_console
from rich.progress import Progress

from agile.ablations import NoMemory, RandomAdvice, ablated, removed_actions
from agile.build import Setup
from agile.errors import AgileError
from agile.executor import Executor
from agile.own_answers import OwnAnswer, own_answers
from agile.prompted import cost_of, prompted_policy, spent
from agile.protocols import Memory, Policy
from agile.rollout import collect, run_loop
from agile.run_folder import writing
from agile.session_log import JsonLines, append_sessions
from agile.tokens import ActionCodec
from agile.types import Item, Session, Stream, Trajectory, Usage


@dataclass(frozen=True, slots=True)
class Played:
    """The test streams as one agent played them.

    Attributes:
        codec: Reads the tokens of its sessions.
        seconds: Of playing, without what loads the model.
        own_answers: What it would have said where it asked, by session id; empty if that was not asked for.
        detail: What else is to be said of it.
        expert_cost: Money that its expert took in this run, a model behind an endpoint; 0 of any other expert.
    """

    trajectories: list[Trajectory]
    codec: ActionCodec
    seconds: float
    own_answers: dict[str, OwnAnswer]
    detail: dict[str, Any]
    expert_cost: float = 0.0

    @property
    def sessions(self) -> list[Session]:
        return [session for trajectory in self.trajectories for session in trajectory.sessions]

    @property
    def usage(self) -> Usage:
        return sum((session.usage for session in self.sessions), Usage())


def play_agent(
    setup: Setup,
    folder: Path,
    log: Path,
    *,
    price: float | None = None,
    ablation: str | None = None,
    advice_rate: float = 0.0,
    probe: bool = False,
) -> Played:
    """Play the test streams greedily with the model in `folder`; its sessions go to `log`.

    Args:
        price: Of advice, if it is not the config's.
        ablation: What is taken from it, see `agile.ablations`.
        advice_rate: How often `random_advice` asks.
        probe: Whether it is also made to answer where it asked, see `agile.own_answers`.
    """
    tokenizer = setup.tokenizer(folder)
    lost = () if ablation is None else (ablation,)
    whole = setup.codec(tokenizer)
    executor = setup.executor(tokenizer, agent=ablated(setup.agent, lost, setup.task.tools.keys(), setup.config.seed))
    if price is not None:
        executor.desk.price = price
    if ablation == "random_advice" and not whole.special_tokens:
        raise AgileError(
            "random_advice keeps the agent from asking by itself, by the token of [SeekAdvice]; with "
            "prompt.special_tokens=false there is none. Leave it out of evaluate.ablations."
        )

    def memory(stream: Stream) -> Memory:
        return NoMemory() if ablation == "memory" else setup.memory(stream)

    policy = setup.greedy(tokenizer, folder)
    with closing(policy):
        removed = removed_actions(lost, setup.task.tools.keys())
        policy.forbidden = sorted(whole.action_ids[name] for name in removed if name in whole.action_ids)
        began = time.monotonic()

        def by_chance(item: Item) -> Policy:
            return RandomAdvice(policy, executor.codec, advice_rate)

        trajectories = play_streams(
            setup,
            executor,
            policy,
            folder.name,
            log,
            memory=memory,
            policy_for=by_chance if ablation == "random_advice" else None,
        )
        seconds = time.monotonic() - began
        answers = own_answers(policy, executor, trajectories) if probe else {}
    return Played(trajectories, executor.codec, seconds, answers, {}, cost_of(executor.desk.advisor))


def play_prompted(setup: Setup, out: Path) -> Played:
    """Play the test streams with the model of `evaluate.prompted`."""
    config = setup.config.evaluate.prompted
    tokenizer = setup.carrier()
    executor = setup.executor(tokenizer, codec=ActionCodec(tokenizer, setup.agent.spec))
    executor.limits = replace(executor.limits, max_stage_s=None)  # the endpoint has a patience of its own
    policy = prompted_policy(config, executor.codec, setup.config.task.advice_price, out)
    endpoint = policy.endpoint
    began = time.monotonic()
    try:
        trajectories = play_streams(
            setup,
            executor,
            policy,
            "prompted",
            out / "test-prompted.jsonl",
            memory=setup.memory,
            max_failed=setup.config.rollout.max_failed,
            close=endpoint.close,
            remark=lambda: spent(endpoint),
        )
    finally:
        get_console().print(f"The endpoint: {spent(endpoint)}; {endpoint.num_cached} answers were there already.")
    detail = {
        "model": config.model,
        "actions": "as tools" if policy.native else "as text",
        "requests sent": endpoint.num_requests,
        "answers kept from before": endpoint.num_cached,
        "paid in this run": endpoint.spent.cost,
    }
    seconds = time.monotonic() - began
    return Played(trajectories, executor.codec, seconds, {}, detail, cost_of(executor.desk.advisor))


def play_streams(
    setup: Setup,
    executor: Executor,
    policy: Policy,
    name: str,
    log_path: Path,
    *,
    memory: Callable[[Stream], Memory],
    policy_for: Callable[[Item], Policy] | None = None,
    max_failed: float = 1.0,
    close: Callable[[], Awaitable[None]] | None = None,
    remark: Callable[[], str] = str,
) -> list[Trajectory]:
    """Play the test streams and keep the sessions, in a log that is there whole or not at all.

    Args:
        name: Of the agent, in the log.
        policy_for: Gives each session a policy of its own in place of `policy`.
        max_failed: Share of failed sessions above which it stops: there the endpoint is to blame, not the agent.
        close: Awaited at the end, however it comes.
        remark: What the progress bar says beside the name.
    """
    streams = setup.task.streams("test")
    shown = log_path.stem.replace("-", " ")
    with Progress(transient=True, disable=not get_console().is_terminal) as progress:
        bar = progress.add_task(shown, total=sum(len(s.items) for s in streams))

        async def run() -> list[Trajectory]:
            try:
                return await collect(
                    executor,
                    policy,
                    streams,
                    memory,
                    seed=setup.config.seed,
                    policy_for=None if policy_for is None else lambda item, memory: policy_for(item),
                    max_failed=max_failed,
                    max_concurrent=setup.config.rollout.concurrency,
                    on_session=lambda session: progress.update(
                        bar, advance=1, description=" ".join([shown, remark()]).rstrip()
                    ),
                )
            finally:
                if close is not None:
                    await close()

        trajectories = run_loop(run())
    draft = log_path.with_name(f".{log_path.name}")
    with writing(log_path):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        log = JsonLines(draft)
        append_sessions(log, [s for t in trajectories for s in t.sessions], agent=name)
        log.close()
        os.replace(draft, log_path)
    return trajectories
