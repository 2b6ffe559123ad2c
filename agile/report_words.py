"""How a report speaks: figures as text, the sentences at its top, the columns of its tables. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agile.evaluate import best_of
from agile.plots import Look
from agile.plots_bench import ABLATION_WORDS, LESS_WORDS

ADVICE_COUNTS = {  # by the report's `advice_counts`
    "always": "Advised sessions count as correct",
    "if_right": "An advised session counts as correct only if the expert was right",
}
SUBJECTS = {
    "dpo": "After DPO the agent",
    "ppo": "After PPO the agent",
    "sft": "After imitation the agent",
    "prompted": "The prompted agent",
}
DASH = "\N{EN DASH}"  # for what is not known, and between the ends of an interval


def show_score(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def show_signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def show_percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def show_count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def show_money(value: float | None) -> str:
    return DASH if not value else f"{value:,.2f}" if value >= 1 else f"{value:.4f}"


def show_p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else show_score(value)


def show_worth(price: float | None) -> str:
    """The price below which asking pays."""
    return "no price" if price is not None and price <= 0 else show_score(price)


def show_interval(
    ci: Sequence[float | None] | None, show: Callable[[float | None], str] = show_score, to: str = DASH
) -> str:
    return "" if not ci or None in ci else f"{show(ci[0])}{to}{show(ci[1])}"


def show_detail(value: Any) -> str:
    """A detail as words; lists of mappings are left to `detail_tables`."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {show_detail(v)}" for key, v in value.items() if not is_table(v))
    if isinstance(value, list):
        return ", ".join(map(show_detail, value))
    return DASH if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def detail_tables(details: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by title: every list of mappings that a detail holds, such as all thresholds that were tried."""
    return {
        f"{name}: {key}".replace("_", " "): rows
        for name, detail in details.items()
        if isinstance(detail, dict)
        for key, rows in detail.items()
        if is_table(rows)
    }


def expert_tables(experts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows by title: who was asked, and what each is worth to each agent."""
    titles = {"experts": "experts: who was asked", "gains": "experts: what each is worth"}
    return {title: experts[key] for key, title in titles.items() if experts.get(key)}


def gains_shown(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each expert is worth to one agent: the one that the report is about, else the best that none advised."""
    rows = (report.get("experts") or {}).get("gains") or []
    told = {row["agent"] for row in rows}
    hero = hero_of(report["agents"])
    ranked = [hero] if hero in told else [name for name in with_scores(report["agents"]) if name in told]
    return [row for row in rows if ranked and row["agent"] == ranked[0]]


def with_scores(agents: Mapping[str, Any]) -> list[str]:
    """Names of the agents that have a score, best first."""
    return sorted((n for n in agents if agents[n].get("score") is not None), key=lambda n: (-agents[n]["score"], n))


def ranking(agents: Mapping[str, Any]) -> list[str]:
    """All names, best score first, those without a score last."""
    scored = with_scores(agents)
    return scored + [name for name in agents if name not in scored]


def spend_columns(agents: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns for what agents took, those that at least one of them has."""
    usages = [agent["usage"] for agent in agents.values() if agent.get("usage")]
    calls = any(agent.get("expert_calls") is not None for agent in agents.values())
    tokens = any(u["prompt_tokens"] or u["completion_tokens"] for u in usages)
    money = any(u["cost"] for u in usages)
    seconds = any(agent.get("seconds") is not None for agent in agents.values())
    columns = ("expert calls",) * calls + ("tokens each",) * tokens + ("cost each", "cost in all") * money
    paid = [agent["other_cost"] for agent in agents.values() if agent.get("other_cost")]
    columns += tuple(f"{who} cost" for who in ("expert", "judge") if any(costs[who] for costs in paid))
    return columns + ("seconds",) * seconds


def spent(agent: Mapping[str, Any], column: str) -> str:
    """One cell of those columns: answers of experts, tokens read and written in a session, money, time of playing."""
    usage, n = agent.get("usage"), agent.get("n")
    if column == "expert calls":
        return show_count(agent.get("expert_calls"))
    if column == "seconds":
        seconds = agent.get("seconds")
        return f"{seconds:.1f}" if seconds is not None and seconds < 10 else show_count(seconds)
    if column in ("expert cost", "judge cost"):
        return show_money((agent.get("other_cost") or {}).get(column.removesuffix(" cost")))
    if not usage or not n:
        return DASH
    if column == "tokens each":
        return show_count((usage["prompt_tokens"] + usage["completion_tokens"]) / n)
    return show_money(usage["cost"] / n if column == "cost each" else usage["cost"])


def ends_of(agent: Mapping[str, Any]) -> tuple[float, float] | None:
    """The advice rate in the first and in the last part of a stream."""
    rates = [part.get("advice_rate") for part in agent.get("by_position") or []]
    return None if len(rates) < 2 or rates[0] is None or rates[-1] is None else (rates[0], rates[-1])


def hero_of(agents: Mapping[str, Any]) -> str | None:
    """The agent that the report is about: see `best_of`, else the best that a user could deploy."""
    names = with_scores(agents)
    usable = [name for name in names if name != "oracle"] or names
    return best_of(names) or (usable[0] if usable else None)


def headline_of(agents: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    name = hero_of(agents)
    if name is None:
        return "No agent was scored."
    subject = SUBJECTS.get(name, f"The best of the agents, {looks[name].label},")
    if ends := ends_of(agents[name]):
        first, last = (show_percent(end, 0) for end in ends)
        asks = f"{first} of questions" + (f" at the start of a stream and {last} at the end" if first != last else "")
    else:
        asks = f"{show_percent(agents[name].get('advice_rate'), 0)} of questions"
    return f"{subject} scores {show_score(agents[name]['score'])}; it asks on {asks}."


def tiles_of(agents: Mapping[str, Any], looks: Mapping[str, Look], accuracy: str = "") -> list[tuple[str, str, str]]:
    """The few figures at the top: label, value, remark.

    Args:
        accuracy: The remark on accuracy.
    """
    if (name := hero_of(agents)) is None:
        return []
    hero, tiles = agents[name], []
    interval = show_interval(hero.get("score_ci"))
    tiles.append(("Score", show_score(hero["score"]), f"95 % interval {interval}" if interval else ""))
    tiles.append(("Accuracy", show_percent(hero.get("accuracy")), accuracy))
    tiles.append(("Asks", show_percent(hero.get("advice_rate")), "of all questions"))
    if name != "sft" and (sft := agents.get("sft", {}).get("score")) is not None:
        tiles.append(("Against SFT", show_signed(hero["score"] - sft), f"SFT scores {show_score(sft)}"))
    baselines = [n for n in with_scores(agents) if not looks[n].learned and n not in ("oracle", name)]
    if name in SUBJECTS and baselines:
        best = agents[baselines[0]]["score"]
        remark = f"{looks[baselines[0]].label} scores {show_score(best)}"
        tiles.append(("Against the best baseline", show_signed(hero["score"] - best), remark))
    low, high = (agents.get(n, {}).get("score") for n in ("router", "oracle"))
    if name in SUBJECTS and low is not None and high is not None and high > low:
        remark = f"from router, {show_score(low)}, to oracle, {show_score(high)}"
        tiles.append(("Of the way to the oracle", show_percent((hero["score"] - low) / (high - low), 0), remark))
    return tiles


def summary_of(report: Mapping[str, Any], looks: Mapping[str, Look]) -> list[str]:
    """What a reader who reads nothing else should know, in a few sentences."""
    agents = report["agents"]
    name = hero_of(agents)
    if name is None or agents[name].get("n") is None:
        return []
    agent, label = agents[name], looks[name].label
    price = report["advice_price"]
    unseen = " that it had not seen in training" if looks[name].learned else ""
    sentences = [
        f"Of {show_count(agent['n'])} questions{unseen}, {label} got "
        f"{show_percent(agent.get('accuracy'), 0)} right and put {show_percent(agent.get('advice_rate'), 0)} to a "
        f"person. A question to a person costs {price:g} of a right answer; what is left is its score, "
        f"{show_score(agent['score'])}."
    ]
    compared = [row for row in report.get("comparisons") or [] if row["a"] == name]
    pairs = {row["b"]: row for row in compared if show_interval(row.get("ci"))}
    rivals = [n for n in with_scores(agents) if n in pairs and not looks[n].learned and n != "oracle"]
    worth = [row for row in (report.get("experts") or {}).get("gains") or [] if row["agent"] == name]
    if rivals:
        row = pairs[rivals[0]]
        rival = "The best agent that learns nothing" if name in SUBJECTS else "Next to it"
        sentences.append(f"{rival} is {looks[rivals[0]].label}; {label} {_beats(row)}.")
    if seeds := (report.get("seeds") or {}).get(name):
        sentences.append(
            f"Trained {len(seeds['runs'])} times from other seeds it scores {show_score(seeds['mean']['score'])} on "
            f"average, with a spread of {show_score(seeds['spread']['score'])} between them."
        )
    rows = (report.get("ablations") or {}).get("rows") or {}
    known = {n: r for n, r in rows.items() if r.get("difference") is not None and show_interval(r.get("ci"))}
    lost = sorted((r["difference"], n) for n, r in known.items() if r["ci"][1] < 0)
    if lost:
        sentences.append(f"What it would miss most: it scores {-lost[0][0]:.3f} less {_without(lost[0][1])}.")
    elif known:
        sentences.append("It clearly misses nothing of what was taken away from it.")
    if against := [_without(n) for n, row in rows.items() if row.get("verdict") == "against the paper"]:
        sentences.append(f"The paper found the opposite {', '.join(against)}.")
    if told := (report.get("calibration") or {}).get(name):
        gap = told["confidence"] - told["accuracy"]
        sure = "about as sure as it should be" if abs(gap) < 0.03 else "too sure" if gap > 0 else "not sure enough"
        sentences.append(
            f"It is {sure} of its own answers: it gives them {show_percent(told['confidence'], 0)} on average, and "
            f"{show_percent(told['accuracy'], 0)} would be right."
        )
    if pays := [f"{r['expert']} below {r['worth_below']:.3f}" for r in worth if (r.get("worth_below") or 0) > 0]:
        sentences.append(f"The price below which asking pays for {label}: {', '.join(pays)}.")
    if vain := [r["expert"] for r in worth if r.get("worth_below") is not None and r["worth_below"] <= 0]:
        sentences.append(f"Asking {' or '.join(vain)} pays for {label} at no price.")
    return sentences


def envelope_of(report: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    """What a better agent has to clear at the report's price, and who does."""
    line = (report.get("envelope") or {}).get(f"{report['advice_price']:g}")
    if not line:
        return ""
    by = f"{line['by']}, published" if line.get("published") else str(line["by"]).replace("_", " ")
    best = f"The best of reference lines and published figures at this price is {show_score(line['score'])} ({by})"
    if missing := [name.replace("_", " ") for name in report.get("references_missing") or []]:
        lines = f"line {missing[0]} was" if len(missing) == 1 else f"lines {', '.join(missing)} were"
        return f"{best}. As the reference {lines} not run, no agent is called better."
    over = [looks[name].label for name, agent in report["agents"].items() if agent.get("clears_envelope")]
    who = f"{', '.join(over)} {'clears' if len(over) == 1 else 'clear'} it" if over else "No agent clears it"
    return f"{best}; an agent is better if the lower end of its interval is above that. {who}."


def questions_of(row: Mapping[str, Any]) -> str:
    """Which questions a published row is about."""
    if row["same_questions"]:
        return "these questions"
    return f"{len(row['groups'])} groups" if row["groups"] else "other questions"


def means_of(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """The other way to weigh several groups, `macro` or `micro`, and a sentence on both.

    None where the two ways give every agent the same score, to three digits.
    """
    means = [m for agent in report["agents"].values() if (m := agent.get("means"))]
    if not any(abs(m["macro"]["score"] - m["micro"]["score"]) >= 0.0005 for m in means):
        return None
    if report.get("macro"):
        return "micro", "Every group counts alike (macro); micro: every question does."
    return "macro", "Every question counts alike (micro); macro: every group does."


def _without(ablation: str) -> str:
    return LESS_WORDS.get(ablation) or ABLATION_WORDS[ablation]


def _beats(row: Mapping[str, Any]) -> str:
    low, high = row["ci"]
    by = f"{abs(row['difference']):.3f} ({show_interval(row['ci'], show_signed, ' to ')})"
    if low <= 0 <= high:
        return f"is not clearly better or worse, by {by}"
    return f"scores {'more' if low > 0 else 'less'}, by {by}"
