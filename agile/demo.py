"""`agile demo`: train and compare, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agile.bench import bench
from agile.config import RunConfig
from agile.report import render_table
from agile.training import train


def run_demo(config: RunConfig, out: Path, console: Console, *, resume: bool) -> None:
    """Train on MiniShop, test on unseen worlds, print the table and write the report."""
    task = config.task
    console.print(
        f"A tiny language model learns on {task.num_train_worlds} small shops: {config.sft.num_steps} steps of "
        f"imitation, {config.ppo.num_iterations} rounds of PPO.\n"
        f"Then it answers {task.num_questions} questions in each of {task.num_test_worlds} shops it has never seen; an "
        f"expert's advice costs {task.advice_price:g} of a right answer.\n"
        "Without changes this takes under 12 minutes on 2 CPU cores. "
        f"Everything goes to {out}; stopped, --resume goes on."
    )
    train(config, out, resume=resume)
    report = bench(config, out, (out,))
    console.print()
    render_table(report, console)
    console.print(f"\n{headline(report)}\nReport: {out / 'report.html'}\nTalk to it: agile chat {out}", soft_wrap=True)


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: how often the agent asks at the start and at the end of a stream, before and after PPO."""
    names = [name for name in ("ppo", "sft") if name in report["agents"]]
    if not names:
        return "No agent was scored."
    agents = [report["agents"][name] for name in names]
    first, last = _asks(agents[0])
    text = f"In a new shop the agent asks about {first:.0%} of the first questions and {last:.0%} of the last"
    if len(agents) == 1:
        return f"{text}; it scores {agents[0]['score']:.3f}."
    first, last = _asks(agents[1])
    return (
        f"{text} (before PPO: {first:.0%} and {last:.0%}), and scores {agents[0]['score']:.3f} "
        f"(before: {agents[1]['score']:.3f})."
    )


def _asks(agent: Mapping[str, Any]) -> tuple[float, float]:
    """Advice rates in the first and the last quarter of the streams."""
    first, last = (
        [p for p in agent["by_position"] if p["to"] <= 0.25],
        [p for p in agent["by_position"] if p["from"] >= 0.75],
    )
    return _advice_rate(first or agent["by_position"]), _advice_rate(last or agent["by_position"])


def _advice_rate(parts: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(p["advice_rate"] * p["n"] for p in parts) / sum(p["n"] for p in parts))
