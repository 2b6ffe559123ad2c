"""`agile bench`: agents and baselines on the same test questions, with intervals, into one report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from agile.build import Setup
from agile.config import RunConfig
from agile.errors import AgileError
from agile.evaluate import Outcome, by_stream, outcomes, paired_difference, summarise
from agile.executor import Executor
from agile.policies import HFPolicy
from agile.report import save_plots, write_report
from agile.rollout import collect
from agile.run_folder import writing
from agile.session_log import JsonLines, append_sessions, read_lines
from agile.types import Session, Trajectory

NUM_EXAMPLES = 6


def bench(config: RunConfig, out: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Score the config's baselines, and its agents where `checkpoint` (a run folder) has them; writes the report.

    Returns:
        The report, see `agile.report`.

    Raises:
        AgileError: Data, checkpoint or folder is not as expected.
    """
    started = time.monotonic()
    setup = Setup.of(config, checkpoint if checkpoint is not None and config.task.data is None else out)
    streams, price = setup.task.streams("test"), config.task.advice_price
    macro = config.task.name == "productqa"  # the paper reports ProductQA as the mean over its groups
    setup.embed(streams)
    seconds = {"embedding": time.monotonic() - started}

    results: dict[str, list[Outcome]] = {}
    examples: list[dict[str, Any]] = []
    for name in config.evaluate.agents if checkpoint is not None else ():
        began = time.monotonic()
        trajectories, executor = play_agent(setup, checkpoint / name, name, out)
        results[name] = outcomes(trajectories)
        examples = _examples(trajectories, executor)
        seconds[name] = time.monotonic() - began

    began = time.monotonic()
    details: dict[str, Any] = {}
    for name, run in setup.baselines().items():
        results[name] = run.outcomes
        if run.detail:
            details[name] = {k: v for k, v in run.detail.items() if k != "sweep"}
    seconds["baselines"] = time.monotonic() - began

    report: dict[str, Any] = {
        "task": config.task.name,
        "advice_price": price,
        "agents": {name: summarise(o, price, macro=macro, seed=config.seed) for name, o in results.items()},
        "comparisons": _comparisons(results, price, macro, config.seed),
        "details": details,
        "examples": examples,
        "notes": list(config.evaluate.notes),
    }
    if config.evaluate.prices:
        report |= _prices(setup, macro, seconds)
    if checkpoint is not None and (checkpoint / "metrics.jsonl").exists():
        report["training"] = _training(checkpoint / "metrics.jsonl")
    report["seconds"] = {**seconds, "total": time.monotonic() - started}
    write_report(report, out)
    save_plots(report, out)
    return report


def play_agent(setup: Setup, folder: Path, name: str, out: Path) -> tuple[list[Trajectory], Executor]:
    """Play the test streams greedily with the model in `folder`; sessions go to `<out>/test-<name>.jsonl`."""
    if not (folder / "config.json").exists():
        raise AgileError(
            f"There is no trained agent {name!r} in {folder.parent}. Train one with `agile train CONFIG "
            f"out={folder.parent}`, name the run with evaluate.checkpoint=DIR, or leave it out: evaluate.agents=[]."
        )
    tokenizer = setup.tokenizer(folder)
    executor = setup.executor(tokenizer)
    policy = HFPolicy(
        setup.language_model(tokenizer, folder),
        tokenizer.pad_token_id,
        temperature=0.0,
        max_batch_size=setup.config.rollout.max_batch_size,
    )
    streams = setup.task.streams("test")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"test-{name}.jsonl").unlink(missing_ok=True)
        log = JsonLines(out / f"test-{name}.jsonl")
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"test {name}", total=sum(len(s.items) for s in streams))
        trajectories = asyncio.run(
            collect(
                executor,
                policy,
                streams,
                setup.memory,
                seed=setup.config.seed,
                max_failed=1.0,
                on_session=lambda session: progress.advance(bar),
            )
        )
    with writing(out):
        append_sessions(log, [s for t in trajectories for s in t.sessions], agent=name)
        log.close()
    return trajectories, executor


def _comparisons(results: dict[str, list[Outcome]], price: float, macro: bool, seed: int) -> list[dict[str, Any]]:
    """The learned agent against imitation and every baseline."""
    best = "ppo" if "ppo" in results else "sft"
    return [
        {"a": best, "b": other, **paired_difference(results[best], results[other], price, macro=macro, seed=seed)}
        for other in results
        if best in results and other != best
    ]


def _prices(setup: Setup, macro: bool, seconds: dict[str, float]) -> dict[str, Any]:
    """The baselines at other prices: in all, and for each group."""
    began = time.monotonic()
    prices: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for price in setup.config.evaluate.prices:
        runs = setup.baselines(price)
        prices[f"{price:g}"] = {n: summarise(r.outcomes, price, macro=macro) for n, r in runs.items()}
        for name, run in runs.items():
            for group, part in by_stream(run.outcomes).items():
                groups.setdefault(group, {}).setdefault(f"{price:g}", {})[name] = summarise(part, price)
    seconds["prices"] = time.monotonic() - began
    return {"prices": prices, "groups": groups}


def _training(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl as the report names them; of imitation every tenth."""
    rows = []
    for row in read_lines(path):
        if row["stage"] == "ppo":
            rows.append({"iteration": row["step"], **row})
        elif row["step"] % 10 == 0:
            rows.append({"step": row["step"], "loss": row["loss"]})
    return rows


def _examples(trajectories: Sequence[Trajectory], executor: Executor) -> list[dict[str, Any]]:
    """Sessions worth reading: the first of each kind, advised and not."""
    found: dict[tuple[str, bool], Session] = {}
    for session in (s for t in trajectories for s in t.sessions):
        found.setdefault((session.kind, session.advised), session)
    return [
        {
            "title": f"{s.id}: {s.kind}, reward {s.reward.total if s.reward else 0:.1f}",
            "spans": [(span.source, executor.codec.decode(span.token_ids)) for g in s.segments for span in g.spans],
        }
        for s in list(found.values())[:NUM_EXAMPLES]
    ]
