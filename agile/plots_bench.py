"""The plots of what `agile bench` measures of the learned agent: ablations, calibration, what memory did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from agile.plots import CARD, GRID, INK, MUTED, Look, Report, apart, dot_of, draw_svg

ABLATION_WORDS = {
    "memory": "without memory",
    "reflection": "without reflection",
    "advice": "without advice",
    "tools": "without tools",
    "rl": "without RL",
    "random_advice": "asks at random",
    "poisoned_memory": "memory 10 % false",
}
LESS_WORDS = {
    "random_advice": "where it asks at random",
    "poisoned_memory": "with 10 % of its memory false",
}  # in a sentence
USES = (("retrieved_right", "shown, right"), ("retrieved_wrong", "shown, wrong"), ("retrieved_asked", "shown, asked"),
        ("not_retrieved", "not shown"))  # fmt: skip
USE_COLORS = ("#009e73", "#d55e00", "#cc79a7", GRID)


def draw_measured(
    report: Report, looks: Mapping[str, Look], agent: str | None, references: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """SVG by name: ablations, reliability, risk_coverage, memory_stream, memory_types; what there is data for.

    Args:
        agent: Whose memory is drawn.
        references: How much each reference line scores above the agent of the ablations, as their rows.
    """
    plots: dict[str, str] = {}
    ablations = report.get("ablations") or {}
    rows = {n: r for n, r in (ablations.get("rows") or {}).items() if r.get("difference") is not None}
    if rows:
        size = (5.6, 1.0 + 0.3 * (len(rows) + len(references)))
        draw = partial(_ablations, rows={**rows, **references}, agent=ablations["agent"], looks=looks)
        plots["ablations"] = draw_svg("ablations", "difference in score of each ablation", draw, looks, size)
    told = {name: c for name, c in (report.get("calibration") or {}).items() if c.get("bins")}
    if told:
        draw = partial(_reliability, told=told, looks=looks)
        plots["reliability"] = draw_svg("reliability", "how often it is right against how sure it is", draw, looks)
        draw = partial(_risk_coverage, told=told, looks=looks)
        plots["risk_coverage"] = draw_svg("risk_coverage", "risk against coverage", draw, looks)
    if agent is not None and (use := (report.get("memory_use") or {}).get(agent)):
        best = use.get("exact") or use.get("by_similarity") or {}
        if parts := best.get("by_position"):
            labels = [f"{part['from']:.0%}" for part in parts]
            draw = partial(_uses, parts=parts, labels=labels, axis="part of the stream that lies behind")
            plots["memory_stream"] = draw_svg("memory_stream", "what memory did over the stream", draw, looks)
        if kinds := best.get("by_type"):
            draw = partial(_uses, parts=list(kinds.values()), labels=list(kinds), axis="")
            plots["memory_types"] = draw_svg("memory_types", "what memory did by type of question", draw, looks)
    return plots


def draw_experts(gains: Sequence[Mapping[str, Any]], looks: Mapping[str, Look]) -> dict[str, str]:
    """SVG by name: experts, what one agent scores with each of them at every price; nothing where that is not known.

    Args:
        gains: Of the agent with each expert, as `agile.expert_worth.Gain`.
        looks: With one for `asks <expert>` of each.
    """
    known = [row for row in gains if row.get("gain") is not None]
    if not known:
        return {}
    title = "score with each expert against the price of an answer"
    return {"experts": draw_svg("experts", title, partial(_experts, gains=known, looks=looks), looks, (5.6, 3.1))}


def _experts(ax: Axes, gains: Sequence[Mapping[str, Any]], looks: Mapping[str, Look]) -> None:
    """A line for each expert, a dot at its price, and the agent by itself, which asks nobody."""
    alone = gains[0]["score"] - gains[0]["gain"]
    worth = [row.get("worth_below") or 0.0 for row in gains]
    right = min(1.0, max(0.5, *(1.15 * row["price"] for row in gains), *(1.15 * price for price in worth)))
    scores = [row["accuracy"] - price * row["advice_rate"] for row in gains for price in (0.0, right)]
    pad = 0.06 * (max(*scores, alone) - min(*scores, alone) or 1)
    low, high = min(*scores, alone) - pad, max(*scores, alone) + pad
    ax.set(xlim=(0, right), ylim=(low, high), xlabel="price of an answer", ylabel="score")
    ends = [alone, *scores[1::2]]
    heights = apart([(end - low) / (high - low) for end in ends], 0.09, 0.02, 0.98)
    ax.plot([0, right], [alone, alone], color=INK, lw=1.1, ls=(0, (4, 3)), zorder=2)
    names = [("by itself", INK)]
    for row in gains:
        look = looks[f"asks {row['expert']}"]
        ax.plot([0, right], [row["accuracy"], row["accuracy"] - right * row["advice_rate"]], color=look.color, lw=1.4)
        ax.plot(row["price"], row["score"], zorder=3, **dot_of(look, 7))
        names.append((look.label.removeprefix("asks "), look.color))
    for (name, color), end, height in zip(names, ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 1}
        ax.annotate(name, (right, end), (1.05, height), textcoords="axes fraction", va="center", arrowprops=line,
                    annotation_clip=False)  # fmt: skip


def _ablations(ax: Axes, rows: Mapping[str, Mapping[str, Any]], agent: str, looks: Mapping[str, Look]) -> None:
    """A forest: each difference with its interval, as a hollow diamond what the paper reports, and reference lines."""
    references = {name: looks[name] for name in rows if name not in ABLATION_WORDS}
    names = sorted(rows, key=lambda name: rows[name]["difference"])
    ax.axvline(0, color=MUTED, lw=0.8, zorder=1)
    for y, name in enumerate(names):
        row, look = rows[name], references.get(name, looks[agent])
        if ci := [end for end in row.get("ci") or () if end is not None]:
            ax.plot(ci, [y] * len(ci), color=look.color, lw=2.4, alpha=0.5, solid_capstyle="butt", zorder=2)
        label = "reference line" if name in references else "measured"
        marker = look.marker if name in references else "o"
        style: dict[str, Any] = {"marker": marker, "ls": "", "color": look.color, "ms": 7, "mec": CARD, "mew": 0.6}
        ax.plot(row["difference"], y, **style, zorder=3, label=label)
        if paper := row.get("paper"):
            ax.plot(paper["difference"], y, "D", mfc="none", mec=INK, ms=6, mew=1.1, zorder=4, label="in the paper")
    words = {name: look.label for name, look in references.items()} | ABLATION_WORDS
    ax.set_yticks(range(len(names)), [words[name] for name in names], color=INK)
    ax.set(xlabel=f"score, less that of the whole {looks[agent].label}", ylim=(-0.6, len(names) - 0.4))
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(handles.values(), handles.keys(), frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
              borderaxespad=0, handletextpad=0.2, columnspacing=1.2, labelcolor=INK)  # fmt: skip


def _reliability(ax: Axes, told: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look]) -> None:
    """A dot for each bin, as large as it is full; on the diagonal the policy is right as often as it expects."""
    ax.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for name, found in told.items():
        look, bins = looks[name], found["bins"]
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        ax.plot(x, y, color=look.color, lw=0.6, alpha=0.5, zorder=2)
        sizes = [14 + 220 * b["n"] / found["n"] for b in bins]
        ax.scatter(x, y, s=sizes, color=look.color, edgecolors=CARD, linewidths=0.5, zorder=3,
                   label=f"{look.label}, ECE {found['ece']:.3f}")  # fmt: skip
        if name == list(told)[-1]:
            for b, px, py in zip(bins, x, y, strict=True):
                ax.annotate(f"{b['n']:,}", (px, py), (0, 10), textcoords="offset points", ha="center", fontsize=7,
                            color=MUTED)  # fmt: skip
    ax.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.12), xlabel="probability of its answer", ylabel="share that is right")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, 0))
    handles, labels = ax.get_legend_handles_labels()
    legend = ax.legend(handles, labels, frameon=False, loc="upper left", labelcolor=INK, fontsize=8)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([24])


def _risk_coverage(ax: Axes, told: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look]) -> None:
    """The share of wrong answers among the surest part of the questions."""
    for name, found in told.items():
        look = looks[name]
        for key, style in (("", "-"), ("_readiness", (0, (4, 2)))):
            curve = found.get(f"risk_coverage{key}") or []
            order = "readiness" if key else "confidence"
            if curve:
                label = f"{look.label}, by {order}: {found[f'aurc{key}']:.3f}"
                ax.plot(*zip(*curve, strict=True), color=look.color, lw=1.6 if not key else 1.1, ls=style, label=label)
    ax.set(xlim=(0, 1.02), xlabel="share of questions that it answers, the surest first", ylabel="share that is wrong")
    ax.set_ylim(bottom=-0.005)
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(frameon=False, loc="upper left", title="area under the curve", title_fontsize=8, alignment="left",
              labelcolor=INK, fontsize=8)  # fmt: skip


def _uses(ax: Axes, parts: Sequence[Mapping[str, Any]], labels: Sequence[str], axis: str) -> None:
    """Stacked shares of sessions by what memory did for them."""
    bottom = [0.0] * len(parts)
    for (key, label), color in zip(USES, USE_COLORS, strict=True):
        heights = [part[key] / part["n"] if part["n"] else 0.0 for part in parts]
        ax.bar(range(len(parts)), heights, bottom=bottom, width=0.78, color=color, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    ax.set_xticks(range(len(parts)), labels)
    ax.set(ylim=(0, 1), xlabel=axis, ylabel="share of sessions")
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.grid(False, axis="x")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=0.9,
              handletextpad=0.4, columnspacing=1.0, labelcolor=INK, fontsize=8)  # fmt: skip
