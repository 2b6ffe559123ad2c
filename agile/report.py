"""The report of a run: `report.json` (the figures), `report.html` (one self-contained page), the table of the terminal.

A report is a plain mapping; `report.json` is that mapping and nothing else. Its keys:

    task, advice_price   str, float
    agents               {name: {accuracy, advice_rate, score, score_ci: [lo, hi], n, failed,
                         by_type: {kind: {accuracy, advice_rate, score, n}},
                         by_position: [{from, to, accuracy, advice_rate, score, n}], from and to in [0, 1]
                         usage: {prompt_tokens, cached_tokens, completion_tokens, cost} of all its sessions, optional
                         clears_envelope: whether the lower end of score_ci is above the envelope; agents only}}
    seconds              {stage: seconds}, or one number
    comparisons          [{a, b, difference, ci: [lo, hi], p}], paired differences in score, a minus b
    training             a list of rows: {step, loss} of imitation, and {iteration, score, accuracy, advice_rate, kl,
                         entropy, explained_variance} of PPO
    prices               {price: {agent: summary}}, the agents scored at other prices; a summary has at least score
    published            [{agent, table, source, measure, price, advice_rate, accuracy, score, groups, same_questions}],
                         what the paper reports, see `agile.published`; never ranked among the measured
    envelope             {price: {score, by, published, same_questions}}, the best reference line or published figure at
                         each price, which a better agent has to clear
    groups               {group: {agent: summary}} or {group: {price: {agent: summary}}}
    details              {name: text, number or mapping}, such as {recall: {scope, threshold, sweep: [a row each]}}
    notes                [text]
    examples             [{title, facts: [(name, text)], windows: [{end, parts: [{source, text, logprob}]}]}], the
                         `View` of `agile.show`; or {title, spans: [(source, text)]}, or bare lists of spans

All after `seconds` is optional: what is missing, None or NaN is left out of the page.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agile.errors import AgileError
from agile.plots import Look, draw_all, draw_picture, looks_of
from agile.show import page_environment, view_from_json
from agile.types import to_json

DASH = "\N{EN DASH}"  # for what is not known, and between the ends of an interval
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
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write(out / "report.json", text.encode("utf-8", "replace"))  # first: no fault in drawing can lose the figures
    _write(out / "report.html", render_html(report).encode("utf-8", "replace"))


def save_plots(report: Mapping[str, Any], out: Path) -> None:
    """Write `report.png` into the folder `out`: advice along the stream, and accuracy against advice.

    Raises:
        AgileError: The folder cannot be written.
    """
    _write(out / "report.png", draw_picture(_plain(report)))


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        AgileError: It cannot be written.
    """
    _write(path, page.encode("utf-8", "replace"))


def _write(path: Path, data: bytes) -> None:
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


# --------------------------------------------------------------------------------------------------------------------
# Words and figures


def _score(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _money(value: float | None) -> str:
    return DASH if not value else f"{value:,.2f}" if value >= 1 else f"{value:.4f}"


def _p_value(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _score(value)


def _interval(ci: Sequence[float | None] | None, show: Callable[[float | None], str] = _score, to: str = DASH) -> str:
    return "" if not ci or None in ci else f"{show(ci[0])}{to}{show(ci[1])}"


def _detail(value: Any) -> str:
    """A detail as words; lists of mappings are left to `_detail_tables`."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_detail(v)}" for key, v in value.items() if not _is_table(v))
    if isinstance(value, list):
        return ", ".join(map(_detail, value))
    return DASH if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _detail_tables(details: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by title: every list of mappings that a detail holds, such as all thresholds that were tried."""
    return {
        f"{name}: {key}".replace("_", " "): rows
        for name, detail in details.items()
        if isinstance(detail, dict)
        for key, rows in detail.items()
        if _is_table(rows)
    }


def _scored(agents: Mapping[str, Any]) -> list[str]:
    """Names of the agents that have a score, best first."""
    return sorted((n for n in agents if agents[n].get("score") is not None), key=lambda n: (-agents[n]["score"], n))


def _ranked(agents: Mapping[str, Any]) -> list[str]:
    """All names, best score first, those without a score last."""
    scored = _scored(agents)
    return scored + [name for name in agents if name not in scored]


def _spends(agents: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns for what agents took, those that at least one of them has."""
    usages = [agent["usage"] for agent in agents.values() if agent.get("usage")]
    tokens = any(u["prompt_tokens"] or u["completion_tokens"] for u in usages)
    money = any(u["cost"] for u in usages)
    return ("tokens each",) * tokens + ("cost each", "cost in all") * money


def _spent(agent: Mapping[str, Any], column: str) -> str:
    """One cell of those columns: tokens read and written in a session, money of a session and of all."""
    usage, n = agent.get("usage"), agent.get("n")
    if not usage or not n:
        return DASH
    if column == "tokens each":
        return _count((usage["prompt_tokens"] + usage["completion_tokens"]) / n)
    return _money(usage["cost"] / n if column == "cost each" else usage["cost"])


def _ends(agent: Mapping[str, Any]) -> tuple[float, float] | None:
    """The advice rate in the first and in the last part of a stream."""
    rates = [part.get("advice_rate") for part in agent.get("by_position") or []]
    return None if len(rates) < 2 or rates[0] is None or rates[-1] is None else (rates[0], rates[-1])


def _hero(agents: Mapping[str, Any]) -> str | None:
    """The agent that the report is about: PPO, else SFT, else the best that a user could deploy."""
    names = _scored(agents)
    usable = [name for name in names if name != "oracle"] or names
    return next((name for name in ("dpo", "ppo", "sft") if name in names), usable[0] if usable else None)


def _headline(agents: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    name = _hero(agents)
    if name is None:
        return "No agent was scored."
    subject = {"dpo": "After DPO the agent", "ppo": "After PPO the agent", "sft": "After imitation the agent"}.get(name)
    subject = subject or f"The best of the agents, {looks[name].label},"
    if ends := _ends(agents[name]):
        asks = f"{_percent(ends[0], 0)} of questions at the start of a stream and {_percent(ends[1], 0)} at the end"
    else:
        asks = f"{_percent(agents[name].get('advice_rate'), 0)} of questions"
    return f"{subject} scores {_score(agents[name]['score'])}; it asks on {asks}."


def _tiles(agents: Mapping[str, Any], looks: Mapping[str, Look]) -> list[tuple[str, str, str]]:
    """The few figures at the top: label, value, remark."""
    if (name := _hero(agents)) is None:
        return []
    hero, tiles = agents[name], []
    interval = _interval(hero.get("score_ci"))
    tiles.append(("Score", _score(hero["score"]), f"95 % interval {interval}" if interval else ""))
    tiles.append(("Accuracy", _percent(hero.get("accuracy")), "advised sessions count as correct"))
    tiles.append(("Asks", _percent(hero.get("advice_rate")), "of all questions"))
    if name != "sft" and (sft := agents.get("sft", {}).get("score")) is not None:
        tiles.append(("Against SFT", _signed(hero["score"] - sft), f"SFT scores {_score(sft)}"))
    baselines = [n for n in _scored(agents) if not looks[n].learned and n != "oracle"]
    if looks[name].learned and baselines:
        best = agents[baselines[0]]["score"]
        remark = f"{looks[baselines[0]].label} scores {_score(best)}"
        tiles.append(("Against the best baseline", _signed(hero["score"] - best), remark))
    low, high = (agents.get(n, {}).get("score") for n in ("router", "oracle"))
    if looks[name].learned and low is not None and high is not None and high > low:
        remark = f"from router, {_score(low)}, to oracle, {_score(high)}"
        tiles.append(("Of the way to the oracle", _percent((hero["score"] - low) / (high - low), 0), remark))
    return tiles


def render_table(report: Mapping[str, Any], console: Console) -> None:
    """Print the agents by score, best first; those that do not learn are dimmed."""
    report = _plain(report)
    agents, looks = report["agents"], looks_of(report["agents"])
    spends = _spends(agents)
    title = Text(f"{report['task']}, advice at {report['advice_price']:g}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("agent", no_wrap=True)
    for column in ("score", "95 % interval", "accuracy", "asks", "sessions", "failed", *spends):
        table.add_column(column, justify="right")
    for name in _ranked(agents):
        agent = agents[name]
        cells = (
            looks[name].label,
            _score(agent.get("score")),
            _interval(agent.get("score_ci")),
            _percent(agent.get("accuracy")),
            _percent(agent.get("advice_rate")),
            _count(agent.get("n")),
            _count(agent.get("failed")),
            *(_spent(agent, column) for column in spends),
        )
        table.add_row(*map(Text, cells), style="bold" if looks[name].learned else "dim")
    console.print(table)
    names = looks_of(n for row in report.get("comparisons") or [] for n in (row["a"], row["b"]))
    for row in report.get("comparisons") or []:
        line = f"{names[row['a']].label} against {names[row['b']].label}: {_signed(row.get('difference'))}"
        interval = _interval(row.get("ci"), _signed, " to ")
        console.print(Text(line + (f" ({interval})" if interval else "")))
    for note in report.get("notes") or []:
        console.print(Text(note, style="dim"))


# --------------------------------------------------------------------------------------------------------------------
# The page


def render_html(report: Mapping[str, Any]) -> str:
    """The page: one HTML document that loads nothing; the same report gives the same text."""
    report = _plain(report)
    agents, sweeps = report["agents"], _sweeps(report)
    compared = [row[side] for row in report.get("comparisons") or [] for side in ("a", "b")]
    swept = [name for sweep in sweeps.values() for summaries in sweep.values() for name in summaries]
    looks = looks_of([*agents, *compared, *swept])
    environment = page_environment()
    environment.filters.update(score=_score, signed=_signed, p_value=_p_value, percent=_percent, count=_count)
    environment.filters.update(
        interval=_interval, signed_interval=lambda ci: _interval(ci, _signed, " to "), detail=_detail
    )
    seconds = report.get("seconds")
    stages = seconds if isinstance(seconds, dict) else {"in all": seconds}
    return environment.get_template("report.html.j2").render(
        report=report,
        agents=agents,
        ranked=_ranked(agents),
        spends=_spends(agents),
        spent=_spent,
        looks=looks,
        index={name: k for k, name in enumerate(looks)},
        headline=_headline(agents, looks),
        tiles=_tiles(agents, looks),
        plots=draw_all(report, looks, sweeps.get("all", {})),
        kinds=list(dict.fromkeys(kind for agent in agents.values() for kind in agent.get("by_type") or {})),
        axis=_axis(agents),
        sweeps=sweeps,
        tables=_detail_tables(report.get("details") or {}),
        examples=[view_from_json(example) for example in report.get("examples") or []],
        baselines=BASELINE_WORDS,
        seconds={stage: value for stage, value in stages.items() if value is not None},
    )


def _axis(agents: Mapping[str, Any]) -> tuple[float, float]:
    """The range of scores that the interval bars of the table span."""
    values = [v for a in agents.values() for v in (a.get("score"), *(a.get("score_ci") or ())) if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _sweeps(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summaries by group, price and agent; all groups together stand first, under the name "all"."""
    sweeps = {"all": report["prices"]} if report.get("prices") else {}
    for group, value in (report.get("groups") or {}).items():
        by_price = all(re.fullmatch(r"\d*\.?\d+", key) for key in value)
        sweeps[group] = value if by_price else {f"{report['advice_price']:g}": value}
    return {group: dict(sorted(sweep.items(), key=lambda item: float(item[0]))) for group, sweep in sweeps.items()}
