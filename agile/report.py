"""The report of a run: `report.json` (the figures), `report.html` (one self-contained page), the table of the terminal.

A report is a plain mapping; `report.json` is that mapping and nothing else. Its keys:

    task, advice_price   str, float
    macro                whether figures weigh every group of questions alike, not every question
    advice_counts        when an advised session is right, as `task.advice_counts`: "always", or "if_right" (only if the
                         expert was); optional
    agents               {name: {accuracy, advice_rate, score, score_ci: [lo, hi], nulls for one question, n, failed,
                         by_type: {kind: {accuracy, advice_rate, score, n}},
                         by_position: [{from, to, accuracy, advice_rate, score, n}], from and to in [0, 1]
                         usage: {prompt_tokens, cached_tokens, completion_tokens, cost} of all its sessions,
                         expert_calls: answers that were paid, seconds: of playing,
                         other_cost: {expert, judge}, money that models took which are its expert or its judge,
                         means: {macro, micro: {accuracy, advice_rate, score}}, where there are several groups,
                         clears_envelope: whether the lower end of score_ci is above the envelope, agents only,
                         along_stream: [{from, to, accuracy, advice_rate, score, n}] of every 200 questions;
                         the last seven optional}}
    seconds              {stage: seconds}, or one number
    comparisons          [{a, b, difference, ci: [lo, hi], p}], paired differences in score, a minus b, of every pair of
                         agents; first those of the agent that the report is about
    training             a list of rows: {step, loss} of imitation, and {iteration, score, accuracy, advice_rate, kl,
                         entropy, explained_variance} of PPO
    ablations            {agent, rows: {name: {accuracy, advice_rate, score, score_ci, n, failed, by_type,
                         difference, ci, p: paired, ablation minus agent; paper: {advice_rate, accuracy, score,
                         difference, advice_difference, source} or None; verdict: "as in the paper", "against the
                         paper", "not clear" (the interval holds 0) or "not in the paper";
                         prices: {price: {accuracy, advice_rate, score, n, difference}}, optional}}}
    seeds                {agent or "<agent> <ablation>": {runs: [{run, seed, accuracy, advice_rate, score, n}],
                         mean, spread: {accuracy, advice_rate, score}}}, spread a standard deviation
    calibration          {agent: see `agile.calibration.calibration`}
    memory_use           {agent: {similar, by_similarity, exact}}, each of the two as `agile.memory_use.memory_use`
                         says, exact None where the task names no settling facts
    prices               {price: {agent: summary}}, the agents scored at other prices; a summary has at least score
    published            [{agent, table, source, measure, price, advice_rate, accuracy, score, groups, same_questions}],
                         what the paper reports, see `agile.published`; never ranked among the measured
    envelope             {price: {score, by, published, same_questions}}, the best reference line or published figure at
                         each price, which a better agent has to clear
    references_missing   [name] of the reference lines that were not run; without them no agent clears_envelope
    experts              {experts: [{expert, accuracy, answered, unreadable, price, latency_s}], gains: [{agent, expert,
                         accuracy, advice_rate, price, score, gain, worth_below}]}, see `agile.expert_worth`
    skipped_rows         [what is wrong with each row of the task's files that was left out]
    groups               {group: {price: {agent: {accuracy, advice_rate, score, score_ci, n, failed, along_stream (at
                         advice_price, optional)}}}}, at advice_price and every other price
    details              {name: text, number or mapping}, such as {recall: {scope, threshold}}
    notes                [text]
    examples             [{heading, title, facts: [(name, text)], windows: [{end, parts: [{source, text, logprob}]}]}],
                         the `View` of `agile.show` under a heading; or {title, spans: [(source, text)]}, or bare lists
                         of spans

`macro`, `advice_counts` and all after `seconds` is optional: what is missing, None or NaN is left out of the page.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agile.errors import AgileError
from agile.plots import draw_all, draw_picture, looks_of
from agile.plots_bench import ABLATION_WORDS, draw_experts, draw_measured
from agile.published import REFERENCES, published_scores, stands_beside
from agile.report_words import (
    ADVICE_COUNTS,
    detail_tables,
    envelope_of,
    expert_tables,
    gains_shown,
    headline_of,
    hero_of,
    means_of,
    questions_of,
    ranking,
    show_count,
    show_detail,
    show_interval,
    show_p,
    show_percent,
    show_score,
    show_signed,
    show_worth,
    spend_columns,
    spent,
    summary_of,
    tiles_of,
)
from agile.show import View, page_environment, view_from_json
from agile.types import to_json

BASELINE_WORDS = {
    "always_ask": "Asks a person every time.",
    "never_ask": "Never asks; gives the most frequent answer.",
    "router": "Searches where search can answer, and asks on all else. Learns nothing.",
    "recall": "As router, but gives the answer of the most similar earlier advised question if that is similar enough.",
    "calibrated_recall": "As router, but answers from what it asked before where a classifier, trained on the train "
    "streams, trusts that.",
    "oracle": "Knows what no agent is told: the world's priors, and what memory holds. A bound, not a rival.",
}

# --------------------------------------------------------------------------------------------------------------------
# Writing


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write `report.json` and `report.html` into the folder `out`, each whole or not at all.

    Raises:
        AgileError: The folder cannot be written.
    """
    write_json(out / "report.json", report)  # first: no fault in drawing can lose the figures
    write_bytes(out / "report.html", render_html(report).encode("utf-8", "replace"))


def save_plots(report: Mapping[str, Any], out: Path) -> None:
    """Write `report.png` into the folder `out`: advice along the stream, and accuracy against advice.

    Raises:
        AgileError: The folder cannot be written.
    """
    write_bytes(out / "report.png", draw_picture(_plain(report)))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all, with null for every number that is not finite.

    Raises:
        AgileError: The folder cannot be written.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8", "replace"))


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        AgileError: It cannot be written.
    """
    write_bytes(path, page.encode("utf-8", "replace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        AgileError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise AgileError(
            f"Cannot write {path}: {error.strerror or error}; free some space, or name another folder with out=DIR."
        ) from error


def _plain(value: Any) -> Any:
    """JSON values, with None for every number that is not finite (JSON has no NaN)."""
    value = to_json(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def render_table(report: Mapping[str, Any], console: Console) -> None:
    """Print the agents by score, best first; those that do not learn are dimmed."""
    report = _plain(report)
    agents, looks = report["agents"], looks_of(report["agents"])
    numbers = {agent.get("n") for agent in agents.values()}
    title = f"{report['task']}, advice at {report['advice_price']:g}"
    if len(numbers) == 1:
        title += f", {show_count(numbers.pop())} questions"
    rows = {}
    other, weighed = means_of(report) or ("", "")
    for name in ranking(agents):
        agent = agents[name]
        rows[name] = {
            "agent": looks[name].label,
            "score": show_score(agent.get("score")),
            "95 % interval": show_interval(agent.get("score_ci")),
            "accuracy": show_percent(agent.get("accuracy")),
            "asks": show_percent(agent.get("advice_rate")),
            **({other: show_score(agent.get("means", {}).get(other, {}).get("score"))} if other else {}),
            **({"sessions": show_count(agent.get("n"))} if numbers else {}),
            "failed": show_count(agent.get("failed")),
            **{column: spent(agent, column) for column in spend_columns(agents)},
        }
    spare = [*reversed(spend_columns(agents)), "sessions", other]
    table = _table(console, title, list(rows.values()), spare)
    for row, name in zip(table.rows, rows, strict=True):
        row.style = "bold" if looks[name].learned else "dim"
    console.print(table)
    _print_published(report, console)
    for said in (weighed, envelope_of(report, looks)):
        if said:
            console.print(Text(said))
    pairs, _ = _pairs(report)
    names = looks_of(n for pair in pairs for n in (pair["a"], pair["b"]))
    for pair in pairs:
        line = f"{names[pair['a']].label} against {names[pair['b']].label}: {show_signed(pair.get('difference'))}"
        interval = show_interval(pair.get("ci"), show_signed, " to ")
        console.print(Text(line + (f" ({interval})" if interval else "")))
    _print_experts(report, console)
    if ablations := report.get("ablations"):
        _print_ablations(ablations, console)
    for name, seeds in (report.get("seeds") or {}).items():
        runs = ", ".join(show_score(run["score"]) for run in seeds["runs"])
        mean, spread = (show_score(seeds[key]["score"]) for key in ("mean", "spread"))
        console.print(Text(f"{name}: {mean}, spread {spread} between seeds ({runs})"))
    for note in report.get("notes") or []:
        console.print(Text(note, style="dim"))


def _print_published(report: Mapping[str, Any], console: Console) -> None:
    """A table of its own, in the paper's order: these are never ranked among the measured."""
    published = stands_beside(report.get("published") or [], report["task"], report["advice_price"])
    here = any(row["score_here"] is not None for row in published)
    rows = [
        {
            "agent": row["agent"],
            "score": show_score(row.get("score")),
            "accuracy": show_percent(row.get("accuracy")),
            "asks": show_percent(row.get("advice_rate")),
            "about": questions_of(row),
            **({"these groups": show_score(row["score_here"])} if here else {}),
        }
        for row in published
    ]
    if rows:
        table = _table(console, f"Published in {published[0]['source']}, not measured here", rows, [])
        for line in table.rows:
            line.style = "dim"
        console.print(table)


def _print_experts(report: Mapping[str, Any], console: Console) -> None:
    gains = {row["expert"]: row for row in gains_shown(report)}
    if not gains:
        return
    agent = next(iter(gains.values()))["agent"]
    experts = [e for e in report["experts"].get("experts") or [] if e["expert"] in gains]
    rows = [
        {
            "expert": expert["expert"],
            "right": show_percent(expert.get("accuracy")),
            "not readable": show_percent(expert.get("unreadable")),
            "price": f"{expert['price']:g}",
            "score with it": show_score(gains[expert["expert"]].get("score")),
            "gain": show_signed(gains[expert["expert"]].get("gain")),
            "pays below": show_worth(gains[expert["expert"]].get("worth_below")),
        }
        for expert in experts
    ]
    console.print(_table(console, f"{looks_of([agent])[agent].label} with each expert", rows, ["not readable"]))


def _print_ablations(ablations: Mapping[str, Any], console: Console) -> None:
    label = looks_of([ablations["agent"]])[ablations["agent"]].label
    rows = [
        {
            "ablation": ABLATION_WORDS.get(name, name),
            "score": show_score(row.get("score")),
            "difference": show_signed(row.get("difference")),
            "95 % interval": show_interval(row.get("ci"), show_signed, " to "),
            "accuracy": show_percent(row.get("accuracy")),
            "asks": show_percent(row.get("advice_rate")),
            "in the paper": show_signed((row.get("paper") or {}).get("difference")),
            "direction": row.get("verdict") or "",
        }
        for name, row in ablations["rows"].items()
    ]
    console.print(_table(console, f"{label}, an ability taken away", rows, ["accuracy", "in the paper", "asks"]))


def _table(console: Console, title: str, rows: Sequence[Mapping[str, str]], spare: Sequence[str]) -> Table:
    """A table of cells by column, without those of the spare columns (first come, first gone) that find no room."""
    for number in range(len(spare) + 1):
        columns = [column for column in (rows[0] if rows else ()) if column not in spare[:number]]
        table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(
                "\n".join(column.rsplit(" ", 1)),
                justify="left" if column in (columns[0], "direction") else "right",
                no_wrap=column == columns[0],
            )
        for row in rows:
            table.add_row(*(Text(row[column]) for column in columns))
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            break
    return table


# --------------------------------------------------------------------------------------------------------------------
# The page


def render_html(report: Mapping[str, Any]) -> str:
    """The page: one HTML document that loads nothing; the same report gives the same text."""
    report = _plain(report)
    agents, sweeps = report["agents"], _sweeps(report)
    compared = [row[side] for row in report.get("comparisons") or [] for side in ("a", "b")]
    whole = [agent] if (agent := (report.get("ablations") or {}).get("agent")) else []
    told = [*(report.get("calibration") or {}), *whole]
    swept = [name for sweep in sweeps.values() for summaries in sweep.values() for name in summaries]
    gains = gains_shown(report)
    looks = looks_of([*agents, *compared, *swept, *told, *(f"asks {row['expert']}" for row in gains)])
    environment = page_environment()
    environment.filters.update(
        score=show_score, signed=show_signed, p_value=show_p, percent=show_percent, count=show_count
    )
    environment.filters.update(
        interval=show_interval, signed_interval=lambda ci: show_interval(ci, show_signed, " to "), detail=show_detail
    )
    seconds = report.get("seconds")
    stages = seconds if isinstance(seconds, dict) else {"in all": seconds}
    advised = ADVICE_COUNTS.get(str(report.get("advice_counts")), "")
    references = _references(report)
    pairs, other_pairs = _pairs(report)
    published = report.get("published") or []
    own = f"{report['advice_price']:g}"
    groups = {group: prices[own] for group, prices in (report.get("groups") or {}).items() if own in prices}

    by_group = {group: published_scores(published, report["task"], [report["advice_price"]], group) for group in groups}

    def scores_published(prices: Sequence[str], group: str | None = None) -> dict[str, dict[str, float]]:
        return published_scores(published, report["task"], map(float, prices), group)

    return environment.get_template("report.html.j2").render(
        report=report,
        agents=agents,
        ranked=ranking(agents),
        spends=spend_columns(agents),
        spent=spent,
        looks=looks,
        index={name: k for k, name in enumerate(looks)},
        headline=headline_of(agents, looks),
        tiles=tiles_of(agents, looks, advised),
        advised=advised,
        plots=draw_all(report, looks, sweeps.get("all", {}))
        | draw_measured(report, looks, hero_of(agents), references)
        | draw_experts(gains, looks),
        kinds=list(dict.fromkeys(kind for agent in agents.values() for kind in agent.get("by_type") or {})),
        axis=_axis(agents),
        sweeps=sweeps,
        groups=groups,
        by_group={group: {name: scores[own] for name, scores in found.items()} for group, found in by_group.items()},
        means=means_of(report),
        pairs=pairs,
        other_pairs=other_pairs,
        asker=gains[0]["agent"] if gains else None,
        beside=stands_beside(published, report["task"], report["advice_price"]),
        scores_published=scores_published,
        questions_of=questions_of,
        tables=detail_tables(report.get("details") or {}) | expert_tables(report.get("experts") or {}),
        examples=_by_heading(report.get("examples") or []),
        summary=summary_of(report, looks),
        envelope=envelope_of(report, looks),
        references=references,
        ablation_words=ABLATION_WORDS,
        baselines=BASELINE_WORDS,
        seconds={stage: value for stage, value in stages.items() if value is not None},
    )


def _pairs(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Comparisons of the agent that the report is about, and the others."""
    pairs = report.get("comparisons") or []
    return [p for p in pairs if p["a"] == pairs[0]["a"]], [p for p in pairs if p["a"] != pairs[0]["a"]]


def _by_heading(examples: Sequence[Any]) -> dict[str, list[View]]:
    """Sessions to read by the heading that they stand under."""
    found: dict[str, list[View]] = {}
    for example in examples:
        heading = example.get("heading", "") if isinstance(example, dict) else ""
        found.setdefault(heading, []).append(view_from_json(example))
    return found


def _references(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How much each reference line scores above the agent whose abilities were taken away, as the ablations' rows."""
    agent, found = (report.get("ablations") or {}).get("agent"), {}
    for row in report.get("comparisons") or []:
        if row["a"] == agent and row["b"] in REFERENCES and row.get("difference") is not None:
            ci = row.get("ci")
            turned = {"difference": -row["difference"], "ci": None if not ci or None in ci else [-ci[1], -ci[0]]}
            found[row["b"]] = {**report["agents"].get(row["b"], {}), **turned, "p": row.get("p")}
    return found


def _axis(agents: Mapping[str, Any]) -> tuple[float, float]:
    """The range of scores that the interval bars of the table span."""
    values = [v for a in agents.values() for v in (a.get("score"), *(a.get("score_ci") or ())) if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _sweeps(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries by group, price and agent; all groups together stand first, under the name "all"."""
    if not report.get("prices"):
        return {}
    own = f"{report['advice_price']:g}"
    sweeps = {"all": {own: report["agents"], **report["prices"]}, **(report.get("groups") or {})}
    return {group: dict(sorted(sweep.items(), key=lambda item: float(item[0]))) for group, sweep in sweeps.items()}
