"""`agile bench`: agents and baselines on the same test questions, with intervals, into one report."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import get_console
from rich.progress import Progress

from agile.build import Setup
from agile.config import RunConfig, differences, load_config
from agile.errors import AgileError
from agile.evaluate import Outcome, by_stream, outcomes, paired_difference, summarise
from agile.executor import Executor
from agile.expert_play import play_experts
from agile.prompted import check_key, prompted_policy, spent
from agile.protocols import Policy
from agile.published import set_beside
from agile.report import save_plots, write_report
from agile.rollout import collect, run_loop
from agile.run_folder import claim, writing
from agile.session_log import JsonLines, append_sessions, read_lines
from agile.show import describe
from agile.tasks.scoring import unreadable
from agile.tokens import ActionCodec
from agile.types import Session, Trajectory, Usage, to_json

NUM_EXAMPLES = 6


def bench(config: RunConfig, out: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Score the config's baselines, and its agents where `checkpoint` (a run folder) has them; writes the report.

    Returns:
        The report, see `agile.report`.

    Raises:
        AgileError: Data, checkpoint or folder is not as expected, all of it known before anything is played.
    """
    started = time.monotonic()
    agents = [] if checkpoint is None else _trained(config, checkpoint)
    prompted = "prompted" in config.evaluate.agents
    if prompted:
        check_key(config.evaluate.prompted)
    if config.task.judge is not None:
        check_key(config.task.judge, "task.judge")
    if checkpoint is None or checkpoint.resolve() != out.resolve():
        _claim(out, config)
    setup = Setup(config, checkpoint if checkpoint is not None and config.task.data is None else out)
    streams, price, macro = setup.task.streams("test"), config.task.advice_price, setup.task.macro
    if agents or prompted:
        setup.embed(streams)
    seconds = {"embedding": time.monotonic() - started}

    began = time.monotonic()
    runs = setup.baselines()
    seconds["baselines"] = time.monotonic() - began

    results: dict[str, list[Outcome]] = {}
    examples: list[dict[str, Any]] = []
    usages: dict[str, Usage] = {}
    details = {n: {k: v for k, v in r.detail.items() if k != "sweep"} for n, r in runs.items() if r.detail}
    for name, folder in [*agents, *([("prompted", None)] * prompted)]:
        began = time.monotonic()
        if folder is None:
            trajectories, executor, details[name] = play_prompted(setup, out)
        else:
            trajectories, executor = play_agent(setup, folder, name, out)
        results[name] = outcomes(trajectories)
        if said := {**unreadable(s for t in trajectories for s in t.sessions), **setup.figures(trajectories)}:
            details[name] = {**details.get(name, {}), **said}
        usages[name] = sum((s.usage for t in trajectories for s in t.sessions), Usage())
        examples = _examples(trajectories, executor)
        seconds[name] = time.monotonic() - began
    experts = play_experts(setup, out)
    details |= experts.details
    seconds |= experts.seconds
    worth = experts.report(results, macro=macro) if experts.asked else {}
    if worth:
        details["experts"] = {"who was asked": worth["experts"], "what each is worth": worth["gains"]}
    results |= experts.results | {name: run.outcomes for name, run in runs.items()}
    if setup.task.skipped:
        setup.tell_skipped()
        details["rows left out"] = {"number": len(setup.task.skipped)}

    report: dict[str, Any] = {
        "task": config.task.name,
        "advice_price": price,
        "agents": {name: summarise(o, price, macro=macro, seed=config.seed) for name, o in results.items()},
        "comparisons": _comparisons(results, price, macro, config.seed),
        "details": details,
        "examples": examples,
        "notes": list(config.evaluate.notes),
    }
    if worth:
        report["experts"] = worth
    if setup.task.skipped:
        report["skipped_rows"] = list(setup.task.skipped)
    for name, usage in usages.items():
        if usage != Usage():
            report["agents"][name]["usage"] = to_json(usage)
    if config.evaluate.prices:
        report |= _prices(setup, dict(agents), results, out, macro, seconds)
    set_beside(report, [stream.id for stream in streams], whole=config.task.max_items is None)
    if checkpoint is not None and (checkpoint / "metrics.jsonl").exists():
        report["training"] = _training(checkpoint / "metrics.jsonl")
    report["seconds"] = {**seconds, "total": time.monotonic() - started}
    write_report(report, out)
    save_plots(report, out)
    return report


def _trained(config: RunConfig, run: Path) -> list[tuple[str, Path]]:
    """Names and folders of the agents to score, those that the run trained.

    Raises:
        AgileError: The run lacks one, or MiniShop's worlds would not be the run's: some of them it trained on.
    """
    if not (run / "config.yaml").exists():
        raise AgileError(
            f"{run} is no run (it has no config.yaml). Give evaluate.checkpoint a folder of `agile train`."
        )
    trained = load_config(run / "config.yaml")
    played = [n for n in config.evaluate.agents if n in trained.stages]
    names = [n for n in played if n != "ppo" or trained.ppo.num_iterations]
    for name in names:
        if not (run / name / "config.json").exists():
            raise AgileError(
                f"There is no trained agent {name!r} in {run}. Finish the run (agile train CONFIG out={run} --resume), "
                f"or name the agents that it has, evaluate.agents=[...]."
            )
    if config.task.data is None:
        worlds = ("seed", *(f"task.num_{n}" for n in ("train_worlds", "test_worlds", "questions")))
        changed = [d for d in differences(trained, config) if d.startswith(worlds)]
        if changed:
            raise AgileError(
                f"{run} was trained on worlds of another config: {'; '.join(changed)}. Other test worlds may be among "
                f"those it learned from; take its own: agile bench {run / 'config.yaml'} evaluate.checkpoint={run}"
            )
    return [(name, run / name) for name in names]


def _claim(out: Path, config: RunConfig) -> None:
    if (out / "checkpoints").exists():
        raise AgileError(f"{out} is a run of `agile train`; its report stays. Choose another out=DIR.")
    claim(out, config).close()


def play_agent(
    setup: Setup, folder: Path, name: str, out: Path, price: float | None = None
) -> tuple[list[Trajectory], Executor]:
    """Play the test streams greedily with the model in `folder`; sessions go to `<out>/test-<name>.jsonl`.

    Args:
        price: Of advice, if it is not the config's; sessions then go to `<out>/test-<name>-<price>.jsonl`.
    """
    tokenizer = setup.tokenizer(folder)
    executor = setup.executor(tokenizer)
    log = f"test-{name}.jsonl"
    if price is not None:
        executor.desk.price = price
        log = f"test-{name}-{price:g}.jsonl"
    policy = setup.greedy(tokenizer, folder)
    with closing(policy):
        return _play(setup, executor, policy, name, out / log), executor


def play_prompted(setup: Setup, out: Path) -> tuple[list[Trajectory], Executor, dict[str, Any]]:
    """Play the test streams with the model of `evaluate.prompted`; also what its requests took in this process."""
    config = setup.config.evaluate.prompted
    tokenizer = setup.carrier()
    executor = setup.executor(tokenizer, codec=ActionCodec(tokenizer, setup.agent.spec))
    executor.limits = replace(executor.limits, max_stage_s=None)  # the endpoint has a patience of its own
    policy = prompted_policy(config, executor.codec, setup.config.task.advice_price, out)
    endpoint = policy.endpoint
    try:
        trajectories = _play(
            setup,
            executor,
            policy,
            "prompted",
            out / "test-prompted.jsonl",
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
    return trajectories, executor, detail


def _play(
    setup: Setup,
    executor: Executor,
    policy: Policy,
    name: str,
    log_path: Path,
    *,
    max_failed: float = 1.0,
    close: Callable[[], Awaitable[None]] | None = None,
    remark: Callable[[], str] = str,
) -> list[Trajectory]:
    """Play the test streams and keep the sessions.

    Args:
        max_failed: Share of failed sessions above which it stops: there the endpoint is to blame, not the agent.
        close: Awaited at the end, however it comes.
        remark: What the progress bar says beside the name.
    """
    streams = setup.task.streams("test")
    with Progress(transient=True, disable=not get_console().is_terminal) as progress:
        bar = progress.add_task(f"test {name}", total=sum(len(s.items) for s in streams))

        async def run() -> list[Trajectory]:
            try:
                return await collect(
                    executor,
                    policy,
                    streams,
                    setup.memory,
                    seed=setup.config.seed,
                    max_failed=max_failed,
                    max_concurrent=setup.config.rollout.concurrency,
                    on_session=lambda session: progress.update(
                        bar, advance=1, description=" ".join(["test", name, remark()]).rstrip()
                    ),
                )
            finally:
                if close is not None:
                    await close()

        trajectories = run_loop(run())
    draft = log_path.with_name(f".{log_path.name}")
    with writing(log_path):
        draft.unlink(missing_ok=True)
        log = JsonLines(draft)
        append_sessions(log, [s for t in trajectories for s in t.sessions], agent=name)
        log.close()
        os.replace(draft, log_path)
    return trajectories


def _comparisons(results: dict[str, list[Outcome]], price: float, macro: bool, seed: int) -> list[dict[str, Any]]:
    """The learned agent against imitation and every baseline."""
    best = next((name for name in ("dpo", "ppo", "sft") if name in results), "prompted")
    return [
        {"a": best, "b": other, **paired_difference(results[best], results[other], price, macro=macro, seed=seed)}
        for other in results
        if best in results and other != best
    ]


def _prices(
    setup: Setup,
    folders: Mapping[str, Path],
    played: Mapping[str, list[Outcome]],
    out: Path,
    macro: bool,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Agents and baselines at other prices: in all, and for each group.

    Args:
        folders: Of the trained agents; those that see the price play anew at each.
        played: What the others did at the config's price, which is what they do at every price.
    """
    began = time.monotonic()
    prices: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for price in setup.config.evaluate.prices:
        runs = setup.baselines(price)
        results = {name: run.outcomes for name, run in runs.items()}
        for name in played.keys() - runs.keys():
            anew = setup.agent.show_price and name in folders and price != setup.config.task.advice_price
            results[name] = outcomes(play_agent(setup, folders[name], name, out, price)[0]) if anew else played[name]
        prices[f"{price:g}"] = {name: summarise(o, price, macro=macro) for name, o in results.items()}
        for name, found in results.items():
            for group, part in by_stream(found).items():
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
    chosen = list(found.values())[:NUM_EXAMPLES]
    return [to_json(describe(session, executor.codec)) for session in chosen]
