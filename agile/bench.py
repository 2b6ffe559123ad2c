"""`agile bench`: agents and baselines on the same test questions, with intervals, into one report."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any

from agile.build import Setup
from agile.calibration import calibration
from agile.config import RunConfig, differences
from agile.errors import AgileError
from agile.evaluate import Outcome, best_of, paired_difference, rates, summarise
from agile.measure import Measured, joined, measure, trained_agents, trained_config
from agile.memory_use import SIMILAR, memory_use
from agile.prompted import check_key
from agile.published import published_ablation, set_beside
from agile.report import save_plots, write_report
from agile.run_folder import claim
from agile.session_log import read_lines
from agile.types import Usage, to_json

BIN = 200  # questions of a stream in one part of `along_stream`


def bench(config: RunConfig, out: Path, checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """Score the config's baselines, and its agents where run folders (`checkpoints`) have them; writes the report.

    Of several runs each is measured by itself, with its own seed, into `<out>/<its name>`; `out` has the pooled report.

    Returns:
        The report, see `agile.report`.

    Raises:
        AgileError: Data, checkpoint or folder is not as expected, all of it known before anything is played.
    """
    started = time.monotonic()
    if "prompted" in config.evaluate.agents:
        check_key(config.evaluate.prompted)
    if config.task.judge is not None:
        check_key(config.task.judge, "task.judge")
    if config.evaluate.ablations and not checkpoints:
        raise AgileError(
            f"evaluate.ablations=[{','.join(config.evaluate.ablations)}] take something from a trained agent, and "
            "there is none; name its run, evaluate.checkpoint=RUN, or leave them out: evaluate.ablations=[]."
        )
    if len(checkpoints) < 2:
        run = checkpoints[0] if checkpoints else None
        report = _report(config, _measure(config, out, run), started)
        if run is not None and (run / "metrics.jsonl").exists():
            report["training"] = _training(run / "metrics.jsonl")
        return _written(report, out)

    configs = _configs_of(config, checkpoints)
    for run, own in configs.items():
        _trained(own, run)
    parts: dict[str, Measured] = {}
    with _claim(out, config):
        for run, own in configs.items():
            began = time.monotonic()
            parts[run.name] = _measure(own, out / run.name, run)
            _written(_report(own, parts[run.name], began), out / run.name)
    same = config.task.data is not None  # each seed has MiniShop worlds of its own
    report = _report(config, joined(parts, same_questions=same), started, num_runs=len(parts))
    report["seeds"] = _seeds(config, parts, [own.seed for own in configs.values()])
    return _written(report, out)


def _written(report: dict[str, Any], out: Path) -> dict[str, Any]:
    write_report(report, out)
    save_plots(report, out)
    return report


def _measure(config: RunConfig, out: Path, run: Path | None) -> Measured:
    folders = {} if run is None else _trained(config, run)
    others = run is None or run.resolve() != out.resolve()
    with _claim(out, config) if others else nullcontext():
        return measure(Setup(config, run if run is not None and config.task.data is None else out), out, folders)


def _configs_of(config: RunConfig, runs: Sequence[Path]) -> dict[Path, RunConfig]:
    """The config for each run: with the seed of its training, which also makes MiniShop's worlds.

    Raises:
        AgileError: Two runs have one name or one seed.
    """
    found: dict[Path, RunConfig] = {}
    for run in runs:
        evaluate = config.evaluate.model_copy(update={"checkpoint": (run,)})
        found[run] = config.model_copy(update={"seed": trained_config(run).seed, "evaluate": evaluate})
    for what, values in (("name", [run.name for run in found]), ("seed", [own.seed for own in found.values()])):
        if len(set(values)) < len(runs):
            raise AgileError(
                f"evaluate.checkpoint names {len(runs)} runs of the {what}s {', '.join(map(str, values))}; expected "
                f"another {what} for each. Train them with seed=0, seed=1, ... into folders of their own."
            )
    return found


def _trained(config: RunConfig, run: Path) -> dict[str, Path]:
    """Names and folders of the agents to score, those that the run trained.

    Raises:
        AgileError: The run lacks one, or MiniShop's worlds would not be the run's: some of them it trained on.
    """
    trained = trained_config(run)
    names = trained_agents(config, trained)
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
    return {name: run / name for name in names}


def _claim(out: Path, config: RunConfig) -> IO[str]:
    """A lock on the folder, which is this bench's until it is closed."""
    if (out / "checkpoints").exists():
        raise AgileError(f"{out} is a run of `agile train`; its report stays. Choose another out=DIR.")
    return claim(out, config)


# --------------------------------------------------------------------------------------------------------------------
# From what was measured to a report


def _report(config: RunConfig, found: Measured, started: float, num_runs: int = 1) -> dict[str, Any]:
    price, macro, seed = config.task.advice_price, found.macro, config.seed
    cut = config.task.stream_length is not None or config.task.name == "hotpotqa"  # streams are parts of something
    report: dict[str, Any] = {
        "task": config.task.name,
        "advice_price": price,
        "advice_counts": config.task.advice_counts,
        "macro": macro,
        "agents": {name: _summary(o, price, macro, seed, cut) for name, o in found.results.items()},
        "comparisons": _comparisons(found.results, price, macro, seed),
        "details": found.details,
        "examples": found.examples,
        "notes": [*config.evaluate.notes, *found.notes],
    }
    for name, agent in report["agents"].items():
        agent["expert_calls"] = sum(o.advised for o in found.results[name])
        if found.usages.get(name, Usage()) != Usage():
            agent["usage"] = to_json(found.usages[name])
        if name in found.seconds_of:
            agent["seconds"] = found.seconds_of[name]
        if name in found.costs:
            agent["other_cost"] = found.costs[name]
        if along := _along_stream(found.results[name], price, macro):
            agent["along_stream"] = along
    if found.experts:
        report["experts"] = found.experts
    if found.skipped_rows:
        report["skipped_rows"] = found.skipped_rows
    if found.own:
        report["calibration"] = {name: calibration(told) for name, told in found.own.items() if told}
    if found.uses:
        report["memory_use"] = {
            name: {"similar": SIMILAR, "by_similarity": memory_use(near), "exact": memory_use(exact) if exact else None}
            for name, (near, exact) in found.uses.items()
        }
    if found.ablations:
        report["ablations"] = _ablations(found, price, macro, seed)
    if found.prices:
        report["prices"] = {
            f"{c:g}": {name: _summary(o, c, macro, seed, cut) for name, o in played.items()}
            for c, (played, _) in found.prices.items()
        }
    report["groups"] = _groups(found, price, seed, cut)
    whole = config.task.max_items is None and not found.skipped_rows
    set_beside(report, found.groups, whole, num_runs, published=found.published)
    report["seconds"] = {**found.seconds, "total": time.monotonic() - started}
    return report


def _summary(results: Sequence[Outcome], price: float, macro: bool, seed: int, cut: bool) -> dict[str, Any]:
    """An agent's figures, and where there are several groups, these with every group (macro) or question alike."""
    summary = summarise(results, price, macro=macro, seed=seed)
    if len(groups := _by_group(results, cut)) > 1:
        keys = ("accuracy", "advice_rate", "score")
        each = [rates(part, price) for part in groups.values()]
        summary["means"] = {
            "macro": {key: mean(float(one[key]) for one in each) for key in keys},
            "micro": {key: rates(results, price)[key] for key in keys},
        }
    return summary


def _by_group(results: Sequence[Outcome], cut: bool) -> dict[str, list[Outcome]]:
    """Outcomes by group of questions: by stream, those of one group together where it was `cut` into several."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in results:
        name = outcome.questions or outcome.stream_id
        groups.setdefault(re.sub(r"-\d+$", "", name) if cut else name, []).append(outcome)
    return groups


def _groups(found: Measured, own: float, seed: int, cut: bool) -> dict[str, Any]:
    """Figures of each group at every price, the config's own among them; nothing where there is one group alone."""
    groups: dict[str, Any] = {}
    played = {price: results for price, (results, _) in found.prices.items()} | {own: found.results}
    for price in sorted(played):
        for name, results in played[price].items():
            for group, part in _by_group(results, cut).items():
                summary = summarise(part, price, seed=seed)
                kept = {k: v for k, v in summary.items() if not k.startswith("by_")}
                if price == own and (along := _along_stream(part, price)):
                    kept["along_stream"] = along
                groups.setdefault(group, {}).setdefault(f"{price:g}", {})[name] = kept
    return groups if len(groups) > 1 else {}


def _comparisons(results: dict[str, list[Outcome]], price: float, macro: bool, seed: int) -> list[dict[str, Any]]:
    """Every pair of agents; first the one that the report is about, else the best one, against every other."""
    usable = [name for name in results if name != "oracle"]
    best = best_of(results) or max(usable, key=lambda name: rates(results[name], price, macro)["score"], default=None)
    return [
        {"a": a, "b": b, **paired_difference(results[a], results[b], price, macro=macro, seed=seed)}
        for a, b in combinations(sorted(results, key=lambda name: name != best), 2)
    ]


def _ablations(found: Measured, price: float, macro: bool, seed: int) -> dict[str, Any]:
    """Each ablation beside the whole agent, on the same questions, and beside what the paper reports."""
    best = best_of(found.results)
    assert best is not None
    whole = found.results[best]
    rows: dict[str, Any] = {}
    for name, results in found.ablations.items():
        summary = summarise(results, price, macro=macro, seed=seed)
        pair = paired_difference(results, whole, price, macro=macro, seed=seed)
        rows[name] = {
            **{k: summary[k] for k in ("accuracy", "advice_rate", "score", "score_ci", "n", "failed", "by_type")},
            **pair,
            "paper": published_ablation(name),
        }
        rows[name]["verdict"] = _verdict(pair, rows[name]["paper"])
        if found.prices:
            rows[name]["prices"] = {
                f"{c:g}": {
                    **rates(ablations[name], c, macro),
                    "difference": float(rates(ablations[name], c, macro)["score"])
                    - float(rates(played[best], c, macro)["score"]),
                }
                for c, (played, ablations) in found.prices.items()
            }
    return {"agent": best, "rows": rows}


def _verdict(pair: Mapping[str, Any], paper: Mapping[str, Any] | None) -> str:
    """How the direction of a difference in score compares with the paper's."""
    if paper is None:
        return "not in the paper"
    low, high = pair["ci"]
    if low <= 0 <= high:
        return "not clear"
    return "as in the paper" if (pair["difference"] > 0) == (paper["difference"] > 0) else "against the paper"


def _along_stream(results: Sequence[Outcome], price: float, macro: bool = False) -> list[dict[str, Any]]:
    """Figures of every 200 questions of the streams; nothing where no stream has more than that.

    Args:
        macro: Weigh alike every stream that is that long.
    """
    parts: dict[int, list[Outcome]] = {}
    for outcome in results:
        parts.setdefault(outcome.position // BIN, []).append(outcome)
    if len(parts) < 2:
        return []
    return [{"from": BIN * k, "to": BIN * (k + 1), **rates(parts[k], price, macro)} for k in sorted(parts)]


def _seeds(config: RunConfig, parts: Mapping[str, Measured], seeds: Sequence[int]) -> dict[str, Any]:
    """Each run's figures of every agent and ablation, their mean and spread (standard deviation)."""
    first = next(iter(parts.values()))
    price, macro = config.task.advice_price, first.macro
    best = best_of(first.results)
    found: dict[str, Any] = {}
    for name in [*first.results, *(f"{best} {ablation}" for ablation in first.ablations)]:
        rows: list[dict[str, Any]] = []
        for (run, part), seed in zip(parts.items(), seeds, strict=True):
            results = part.results.get(name) or part.ablations[name.partition(" ")[2]]
            rows.append({"run": run, "seed": seed, **rates(results, price, macro)})
        figures = {key: [row[key] for row in rows] for key in ("accuracy", "advice_rate", "score")}
        found[name] = {
            "runs": rows,
            "mean": {key: mean(values) for key, values in figures.items()},
            "spread": {key: stdev(values) for key, values in figures.items()},
        }
    return found


def _training(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl as the report names them; of imitation every tenth."""
    rows = []
    for row in read_lines(path):
        if row["stage"] == "ppo":
            rows.append({"iteration": row["step"], **row})
        elif row["step"] % 10 == 0:
            rows.append({"step": row["step"], "loss": row["loss"]})
    return rows
