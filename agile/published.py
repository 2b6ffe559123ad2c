"""What the paper (arXiv 2405.14751v2) reports, and the line that an agent has to clear to be called better.

Published figures stand beside measured ones and are never ranked among them: they were measured by others, some on more
questions than are at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SOURCE = "arXiv 2405.14751v2"
REFERENCES = ("always_ask", "never_ask", "router", "recall", "calibrated_recall")
GROUPS = ("camera_cases", "leggings", "all_pans", "rollerball_pens", "motherboards", "rifle_scopes")

SHORT, LONG, CHOICE, EXACT, JUDGED = "short answer", "long answer, judged", "choice", "exact match", "judged"
NUM_QUESTIONS = {"medmcqa": 4183, "hotpotqa": 7405}  # of the dev sets that the paper reports
HEADLINE = {"productqa": SHORT, "medmcqa": CHOICE, "hotpotqa": EXACT}

# (table, agent, measure, price, advice rate, accuracy, score). Who never asks has no price: its score is its accuracy.
_Figures = tuple[str, str, str, float | None, float, float, float | None]
_MAIN, _ABLATION, _PRICES = "ProductQA, main results", "ProductQA, ablation", "ProductQA, advice prices"
_TABLES: dict[str, tuple[_Figures, ...]] = {
    "productqa": (
        (_MAIN, "gpt4-prompt", SHORT, None, 0.0, 0.464, 0.464),
        (_MAIN, "gpt4-prompt", LONG, None, 0.0, 0.571, 0.571),
        (_MAIN, "agile-gpt4-prompt", SHORT, 0.3, 0.208, 0.780, 0.718),
        (_MAIN, "agile-gpt4-prompt", LONG, 0.3, 0.208, 0.809, 0.747),
        (_MAIN, "agile-vic7b-ppo", SHORT, 0.3, 0.179, 0.818, 0.764),
        (_MAIN, "agile-vic7b-ppo", LONG, 0.3, 0.179, 0.800, 0.746),
        (_MAIN, "agile-vic13b-ppo", SHORT, 0.3, 0.233, 0.854, 0.784),
        (_MAIN, "agile-vic13b-ppo", LONG, 0.3, 0.233, 0.854, 0.784),
        ("Table 11", "agile-vic13b-ppo, random initial memory", SHORT, 0.3, 0.306, 0.890, 0.798),
        (_ABLATION, "without reflection", SHORT, 0.3, 0.270, 0.852, 0.771),
        (_ABLATION, "without memory", SHORT, 0.3, 0.407, 0.876, 0.754),
        (_ABLATION, "without advice", SHORT, None, 0.0, 0.747, 0.747),
        (_ABLATION, "advice not adaptive", SHORT, 0.3, 0.233, 0.812, 0.742),
        (_ABLATION, "without tool", SHORT, 0.3, 0.492, 0.864, 0.717),
        (_ABLATION, "without RL", SHORT, 0.3, 0.256, 0.843, 0.766),
        (_PRICES, "agile-vic13b-ppo", SHORT, 0.5, 0.098, 0.805, 0.756),
        (_PRICES, "agile-vic13b-ppo", SHORT, 0.4, 0.168, 0.825, 0.758),
        (_PRICES, "agile-vic13b-ppo", SHORT, 0.2, 0.291, 0.871, 0.813),
        (_PRICES, "agile-vic13b-ppo", SHORT, 0.1, 0.423, 0.918, 0.876),
    ),
    "medmcqa": (
        ("MedMCQA, dev", "Meerkat-7b", CHOICE, None, 0.0, 0.534, 0.534),
        ("MedMCQA, dev", "gpt4", CHOICE, None, 0.0, 0.695, 0.695),
        ("MedMCQA, dev", "gpt4-MedPrompt", CHOICE, None, 0.0, 0.791, 0.791),
        ("MedMCQA, dev", "agile-gpt4-prompt", CHOICE, 0.4, 0.421, 0.884, 0.721),  # by its own figures .716
        ("MedMCQA, dev", "agile-mek7b-sft", CHOICE, 0.4, 0.322, 0.837, 0.708),
        ("MedMCQA, dev", "agile-mek7b-ppo", CHOICE, 0.4, 0.316, 0.852, 0.726),
    ),
    "hotpotqa": (
        ("HotPotQA, dev", "ReAct-gpt4", EXACT, None, 0.0, 0.482, 0.482),
        ("HotPotQA, dev", "agile-gpt4-prompt", EXACT, 0.3, 0.194, 0.664, 0.567),  # by its own figures .606
        ("HotPotQA, dev", "agile-gpt4-prompt", JUDGED, 0.3, 0.194, 0.842, None),
        ("HotPotQA, dev", "agile-vic13b-sft", EXACT, 0.3, 0.171, 0.668, 0.617),
        ("HotPotQA, dev", "agile-vic13b-sft", JUDGED, 0.3, 0.171, 0.857, None),
        ("HotPotQA, dev", "agile-vic13b-ppo", EXACT, 0.3, 0.156, 0.675, 0.628),
        ("HotPotQA, dev", "agile-vic13b-ppo", JUDGED, 0.3, 0.156, 0.858, None),
    ),
}
_GROUP_TABLE = "ProductQA, by group"
_GROUP_SCORES = {  # short answers at .3, in the order of GROUPS
    "agile-gpt4-prompt": (0.722, 0.706, 0.718, 0.698, 0.747, 0.711),
    "agile-vic7b-ppo": (0.758, 0.777, 0.788, 0.727, 0.786, 0.752),
    "agile-vic13b-ppo": (0.781, 0.801, 0.800, 0.752, 0.806, 0.763),
}


def published_rows(task: str, groups: Sequence[str], whole: bool = True) -> list[dict[str, Any]]:
    """The paper's rows about a task, as the report holds them under `published`.

    For ProductQA the paper's figures are means over its six test groups. Where some of these are at hand, the rows by
    group are added, and a mean of them over the groups at hand (`mean_of_groups`), the only figures that are about the
    same questions.

    Args:
        groups: Of the test questions at hand; read for ProductQA alone.
        whole: Whether all questions of these groups are at hand.

    Returns:
        For each row `agent`, `source`, `table`, `measure`, `price` (None: it never asks, so any), `advice_rate`,
        `accuracy`, `score` (None where the paper gives none), `groups` that it refers to, and `same_questions`,
        whether these are the ones at hand. None at all where a group is not the paper's: generated worlds, other data.
    """
    if task not in _TABLES or (task == "productqa" and not (groups and set(groups) <= set(GROUPS))):
        return []
    of = list(GROUPS) if task == "productqa" else []
    keys = ("table", "agent", "measure", "price", "advice_rate", "accuracy", "score")
    same = whole and (task != "productqa" or set(groups) == set(GROUPS))
    rows = [{"source": SOURCE, **dict(zip(keys, row, strict=True)), "groups": of} for row in _TABLES[task]]
    result = [{**row, "same_questions": same} for row in rows]
    if task == "productqa":
        for agent, scores in _GROUP_SCORES.items():
            found = dict(zip(GROUPS, scores, strict=True))
            for group in groups:
                result.append(_by_group(agent, found[group], [group], whole and len(groups) == 1))
            if 1 < len(groups) < len(GROUPS):
                mean = sum(found[group] for group in groups) / len(groups)
                result.append({**_by_group(agent, mean, list(groups), whole), "mean_of_groups": True})
    return result


def _by_group(agent: str, score: float, groups: list[str], same: bool) -> dict[str, Any]:
    figures = {"price": 0.3, "advice_rate": None, "accuracy": None, "score": score}
    place = {"source": SOURCE, "table": _GROUP_TABLE, "agent": agent, "measure": SHORT}
    return {**place, **figures, "groups": groups, "same_questions": same}


def envelope(
    task: str, measured: Mapping[str, Mapping[str, Mapping[str, Any]]], published: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The best of reference lines and published figures at each price: what a better agent has to clear.

    A published agent counts at the price that it was trained for. Of its figures at that price one about the questions
    at hand, where there is one, stands in for those about more questions.

    Args:
        measured: Summaries by price (`f"{price:g}"`) and name; of these the baselines in `REFERENCES` count.

    Returns:
        For each price `score`, `by` (a name), `published` (whether the paper's), and `same_questions`. Prices without
        any figure are left out.
    """
    rows = [r for r in published if r["measure"] == HEADLINE.get(task) and r["score"] is not None]
    rows = [r for r in rows if len(r["groups"]) != 1 or r["same_questions"]]
    exact = {(r["agent"], r["price"]) for r in rows if _at_hand(r)}
    lines: dict[str, dict[str, Any]] = {}
    for price, summaries in measured.items():
        found = [
            {"score": summaries[name]["score"], "by": name, "published": False, "same_questions": True}
            for name in REFERENCES
            if name in summaries
        ]
        for r in rows:
            stands = _at_hand(r) or (r["agent"], r["price"]) not in exact
            if stands and (r["price"] is None or f"{r['price']:g}" == price):
                entry = {"score": r["score"], "by": r["agent"], "published": True}
                found.append({**entry, "same_questions": r["same_questions"]})
        if found:
            lines[price] = max(found, key=lambda entry: entry["score"])
    return lines


def stands_beside(published: Iterable[Mapping[str, Any]], task: str, price: float) -> list[dict[str, Any]]:
    """The published rows that can stand beside agents at a price: agents of the main tables, by the headline measure.

    Left out are ablations and rows at other prices (who never asks has none).

    Returns:
        The rows, each with `score_here`: over the groups at hand where it is about more, None where that is not known.
    """
    rows = [r for r in published if r["measure"] == HEADLINE.get(task, r["measure"]) and r["price"] in (None, price)]
    here = {r["agent"]: r["score"] for r in rows if r["table"] == _GROUP_TABLE and _at_hand(r)}
    beside = [r for r in rows if r["table"] not in (_ABLATION, _GROUP_TABLE)]
    return [{**r, "score_here": None if r["same_questions"] else here.get(r["agent"])} for r in beside]


def _at_hand(row: Mapping[str, Any]) -> bool:
    return bool(row["same_questions"] or row.get("mean_of_groups"))


def published_scores(
    published: Sequence[Mapping[str, Any]], task: str, prices: Iterable[float], group: str | None = None
) -> dict[str, dict[str, float]]:
    """Published scores by agent and price (`f"{price:g}"`), of one group or of all at hand together."""
    found: dict[str, dict[str, float]] = {}
    for price in prices:
        rows = stands_beside(published, task, price)
        if group is not None:
            rows = [{**r, "score_here": None} for r in published if r["groups"] == [group] and r["price"] == price]
        for row in rows:
            score = row["score"] if row["score_here"] is None else row["score_here"]
            if score is not None:
                found.setdefault(row["agent"], {})[f"{price:g}"] = score
    return found


def clears(summary: Mapping[str, Any], line: Mapping[str, Any] | None) -> bool:
    """Whether an agent is better than the envelope: the lower end of its 95 % interval is above it."""
    return line is not None and summary["score_ci"][0] > line["score"]


_ABLATED = {
    "memory": "without memory",
    "reflection": "without reflection",
    "advice": "without advice",
    "random_advice": "advice not adaptive",
    "tools": "without tool",
    "rl": "without RL",
}


def published_ablation(name: str) -> dict[str, Any] | None:
    """The paper's figures of an ablation (`evaluate.ablations`): of its 13B agent on ProductQA at a price of 0.3.

    Returns:
        `advice_rate`, `accuracy`, `score`, `difference` and `advice_difference` to the whole agent, and `source`; None
        if the paper has no such ablation.

    >>> round(published_ablation("memory")["difference"], 3)
    -0.03
    """
    rows = _TABLES["productqa"]
    found = next((row for row in rows if row[0] == _ABLATION and row[1] == _ABLATED.get(name)), None)
    whole = next(row for row in rows if row[:4] == (_MAIN, "agile-vic13b-ppo", SHORT, 0.3))
    if found is None or found[6] is None or whole[6] is None:
        return None
    return {
        "advice_rate": found[4],
        "accuracy": found[5],
        "score": found[6],
        "difference": found[6] - whole[6],
        "advice_difference": found[4] - whole[4],
        "source": f"{SOURCE}, {_ABLATION}",
    }


def set_beside(
    report: dict[str, Any], groups: Sequence[str], whole: bool, num_runs: int = 1, *, published: bool = True
) -> None:
    """Add `published`, `envelope`, `references_missing` and each agent's `clears_envelope` to a report.

    Agents are what is neither a reference line nor the oracle. Of none is told that it clears an envelope from which
    reference lines are missing.

    Args:
        groups: Of the test questions.
        whole: Whether none of their questions were left out; read where their number is not known (ProductQA).
        num_runs: How often each question was played.
        published: Whether the paper's figures are about such questions; else there are none.
    """
    now, expected = f"{report['advice_price']:g}", NUM_QUESTIONS.get(report["task"])
    if expected is not None:
        whole = all(agent["n"] == expected * num_runs for agent in report["agents"].values())
    summaries = {**(report.get("prices") or {}), now: report["agents"]}
    report["published"] = published_rows(report["task"], groups, whole) if published else []
    report["envelope"] = envelope(report["task"], summaries, report["published"])
    report["references_missing"] = [name for name in REFERENCES if name not in report["agents"]]
    if report["references_missing"]:
        return
    for price, agents in ((now, report["agents"]), *(report.get("prices") or {}).items()):
        for name in agents.keys() - {*REFERENCES, "oracle"}:
            agents[name]["clears_envelope"] = clears(agents[name], report["envelope"].get(price))
