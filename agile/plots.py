"""The plots of a report: SVG that follows the page's colours, light and dark, and one PNG for a README."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from agile.evaluate import TRAINED
from agile.published import stands_beside

Report = Mapping[str, Any]
Points = list[tuple[float, float]]

# What the plots draw, and the variables of the page that take the place of it in SVG.
INK, MUTED, GRID, CARD = "#1f2328", "#5c6570", "#d5dbe1", "#fffffe"
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", CARD: "--card"}
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # real text, in the font of the page
    "svg.hashsalt": "agile",  # ids by content: the same report gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}
MOST_GROUPS = 22  # of more a plot has no rows; MedMCQA has 21 subjects
ENVELOPE: Any = {"color": INK, "lw": 1.1, "ls": (0, (1, 1.5)), "zorder": 2}  # what a better agent has to clear


# --------------------------------------------------------------------------------------------------------------------
# How an agent looks


@dataclass(frozen=True, slots=True)
class Look:
    """How an agent looks wherever it appears.

    Attributes:
        color: On light paper.
        dark: On dark paper.
        marker: As in matplotlib.
        glyph: The marker as a character.
        learned: Whether a run trained it; all others are drawn thinner.
    """

    label: str
    color: str
    dark: str
    marker: str | tuple[int, int, int]
    glyph: str
    learned: bool


# Okabe and Ito's colours, which any colour vision tells apart, lighter for dark paper; markers tell them again.
KNOWN = {
    "ppo": ("#0072b2", "#58a9ec", "o", "●"),
    "sft": ("#d55e00", "#f5935a", "s", "■"),
    "dpo": ("#785ef0", "#a696f7", "X", "✖"),
    "recall": ("#009e73", "#35c99b", "D", "◆"),
    "calibrated_recall": ("#3c7a3c", "#8cc98c", "d", "♦"),
    "router": ("#c48a00", "#e6b84b", "^", "▲"),
    "always_ask": ("#cc79a7", "#e6a1c6", "v", "▼"),
    "never_ask": ("#56b4e9", "#b3e3fb", "P", "✚"),
    "oracle": ("#59636e", "#b6bec8", "*", "★"),
}
OTHERS: tuple[tuple[str, str, str | tuple[int, int, int], str], ...] = (
    ("#8c6d31", "#c9a969", "p", "⬟"),
    ("#a3224f", "#e27396", "h", "⬢"),
    ("#4b5fa5", "#9aa9e0", "<", "◀"),
    ("#2f7f86", "#6cc5cc", ">", "▶"),
    ("#8a4fa3", "#c795dc", (4, 1, 0), "✦"),
    ("#7a3b12", "#d69a72", (6, 1, 0), "✶"),
)


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """The look of each agent: its own if it is known, else one by order of appearance."""
    looks: dict[str, Look] = {}
    num_others = 0
    for name in dict.fromkeys(names):
        look = KNOWN.get(name) or OTHERS[num_others % len(OTHERS)]
        num_others += name not in KNOWN
        label = name.upper() if name in TRAINED else name.replace("_", " ")
        looks[name] = Look(_short(label), *look, learned=name in TRAINED)
    return looks


def _short(label: str) -> str:
    return label if len(label) <= 22 else label[:21] + "…"


# --------------------------------------------------------------------------------------------------------------------
# What can be drawn


def draw_all(report: Report, looks: Mapping[str, Look], prices: Report) -> dict[str, str]:
    """SVG by name, for everything that the report has data for.

    Names: advice, accuracy, advice_along, accuracy_along, frontier, types, groups, prices, loss, training, kl,
    entropy, explained_variance.
    """
    agents = report["agents"]
    rows = report.get("training") or []
    plots: dict[str, str] = {}

    def add(name: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.5, 3.1)) -> None:
        plots[name] = draw_svg(name, title, draw, looks, size)

    for name, key in (("advice", "advice_rate"), ("accuracy", "accuracy")):
        if any(len(points) > 1 for points in _along_stream(agents, key).values()):
            add(name, f"{name} along the stream", partial(_position, agents=agents, looks=looks, key=key))
    for name, key in (("advice_along", "advice_rate"), ("accuracy_along", "accuracy")):
        long = {n: a for n, a in agents.items() if len(_points(a.get("along_stream") or [], "to", key)) > 1}
        if long:
            add(name, f"{key} every 200 questions", partial(_along, agents=long, looks=looks, key=key))
    kinds = {
        kind: {name: (agent.get("by_type") or {}).get(kind, {}) for name, agent in agents.items()}
        for kind in dict.fromkeys(kind for agent in agents.values() for kind in agent.get("by_type") or {})
    }
    tall = (4.5, _tall(kinds))  # the two stand side by side
    if any(_points([agent], "advice_rate", "accuracy") for agent in agents.values()):
        size = (4.5, min(5.0, tall[1]))
        add("frontier", "accuracy against advice rate", partial(_frontier, report=report, looks=looks), size)
    if kinds:
        add("types", "score by question type", partial(_rows, rows=kinds, looks=looks), tall)
    own = f"{report['advice_price']:g}"
    groups = {name: by_price[own] for name, by_price in (report.get("groups") or {}).items() if own in by_price}
    if 1 < len(groups) <= MOST_GROUPS:
        add("groups", "score by group", partial(_rows, rows=groups, looks=looks), (4.5, _tall(groups)))
    if len(prices) > 1:
        lines = report.get("envelope") or {}
        add("prices", "score against the price of advice", partial(_prices, prices=prices, looks=looks, lines=lines))
    if len(loss := _points(rows, "step", "loss")) > 1:
        add("loss", "loss of imitation", partial(_loss, points=loss))
    panels = (("training", ("score", "accuracy", "advice_rate")), ("kl", ("kl",)), ("entropy", ("entropy",)))
    for name, keys in (*panels, ("explained_variance", ("explained_variance",))):
        curves = {key: points for key in keys if len(points := _points(rows, "iteration", key)) > 1}
        if curves:
            size = (4.5, 3.1) if name == "training" else (3.2, 2.2)
            add(name, f"{', '.join(keys)} over PPO iterations", partial(_iterations, curves=curves), size)
    return plots


def draw_picture(report: Report) -> bytes:
    """A PNG of two panels: advice along the stream, and accuracy against advice."""
    looks = looks_of(report["agents"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 4.1), layout=ConstrainedLayoutEngine(wspace=0.06))
        left, right = figure.subplots(1, 2)
        left.set_title("How often each agent asks", loc="left", fontweight="bold", pad=18)
        _position(left, report["agents"], looks, "advice_rate")
        right.set_title("What asking buys", loc="left", fontweight="bold", pad=18)
        _frontier(right, report, looks)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw_svg(
    name: str,
    title: str,
    draw: Callable[[Axes], None],
    looks: Mapping[str, Look],
    size: tuple[float, float] = (4.5, 3.1),
) -> str:
    """One plot as an <svg> element that scales with the page and takes its colours from the page's variables."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    opening = rf'<svg viewBox="\1" role="img" aria-label="{title}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)
    for reference in ('id="', 'href="#', "url(#"):  # ids are unique in a plot only, and a page holds many
        svg = svg.replace(reference, f"{reference}{name}-")
    variables = VARIABLES | {look.color: f"--agent-{i}" for i, look in reversed(list(enumerate(looks.values())))}

    def variable(match: re.Match[str]) -> str:
        color = match[2].lower()
        return f"{match[1]}: var({variables[color]})" if color in variables else match[0]

    return re.sub(r"\b(fill|stroke): (#[0-9a-fA-F]{6})", variable, svg)


# --------------------------------------------------------------------------------------------------------------------
# Axes


def _points(rows: Iterable[Mapping[str, Any]], x: str, y: str) -> Points:
    return [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]


def _along_stream(agents: Report, key: str) -> dict[str, Points]:
    """The curve of each agent, at the middle of every part of the stream."""
    return {
        name: [((p["from"] + p["to"]) / 2, p[key]) for p in agent.get("by_position") or [] if p.get(key) is not None]
        for name, agent in agents.items()
    }


def apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The values, moved to stand at least `gap` apart in the same order, within [low, high] where that has room."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    up, down = [values[i] for i in order], [values[i] for i in order]
    for k in range(1, len(order)):
        up[k] = max(up[k], up[k - 1] + gap)
    for k in range(len(order) - 2, -1, -1):
        down[k] = min(down[k], down[k + 1] - gap)
    placed = [0.0] * len(values)
    for k, i in enumerate(order):
        placed[i] = max(low + gap * k, min(high - gap * (len(order) - 1 - k), (up[k] + down[k]) / 2))
    return placed


def dot_of(look: Look, size: float) -> dict[str, Any]:
    """How to plot an agent's marker, so that all kinds of marker look equally large; `size` in points."""
    sizes: dict[Any, float] = {"*": 1.7, "P": 1.3, "^": 1.2, "v": 1.2, "D": 0.9}
    size *= sizes.get(look.marker, 1) * (1.2 if look.learned else 1)
    return {"marker": look.marker, "color": look.color, "ms": size, "mec": CARD, "mew": 0.4}


def _curves(ax: Axes, curves: Mapping[str, Points], looks: Mapping[str, Look]) -> None:
    """One line per agent, with its name at the right end; call it when the limits of y are set."""
    curves = {name: points for name, points in curves.items() if points}
    bottom, top = ax.get_ylim()
    heights = apart([(points[-1][1] - bottom) / (top - bottom) for points in curves.values()], 0.08, 0.02, 0.97)
    for (name, points), height in zip(curves.items(), heights, strict=True):
        look = looks[name]
        width, order = (2.2, 3) if look.learned else (1.1, 2)
        ax.plot(*zip(*points, strict=True), ls="-", lw=width, zorder=order, **dot_of(look, 4.5))
        ax.annotate(
            look.label,
            points[-1],
            (1.07, height),
            textcoords="axes fraction",
            va="center",
            fontweight="bold" if look.learned else "normal",
            arrowprops={"arrowstyle": "-", "color": look.color, "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
            annotation_clip=False,
        )


def _position(ax: Axes, agents: Report, looks: Mapping[str, Look], key: str) -> None:
    curves = _along_stream(agents, key)
    low = min((y for points in curves.values() for _, y in points), default=0)
    ax.set(xlim=(0, 1), ylim=(-0.03, 1.03) if key == "advice_rate" else (max(0, low - 0.05), 1.01))
    ax.set_xlabel("part of the stream that lies behind")
    ax.set_ylabel(key.replace("_", " "))
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    _curves(ax, curves, looks)


def _along(ax: Axes, agents: Report, looks: Mapping[str, Look], key: str) -> None:
    curves = {name: _points(agent["along_stream"], "to", key) for name, agent in agents.items()}
    low = min(y for points in curves.values() for _, y in points)
    ax.set(ylim=(-0.03, 1.03) if key == "advice_rate" else (max(0, low - 0.05), 1.01))
    ax.set(xlabel="questions of the stream that lie behind", ylabel=key.replace("_", " "))
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    _curves(ax, curves, looks)


def _frontier(ax: Axes, report: Report, looks: Mapping[str, Look]) -> None:
    """Each agent a dot, with lines of equal score: accuracy = score + price * advice rate."""
    price = report["advice_price"]
    dots = {n: p[0] for n, agent in report["agents"].items() if (p := _points([agent], "advice_rate", "accuracy"))}
    low = min(y for _, y in dots.values())
    left, right, bottom, top = -0.04, 1.06, max(-0.02, low - 0.07), 1.02
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="advice rate", ylabel="accuracy")
    ax.grid(False)
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    for score in MaxNLocator(9, steps=[1, 2, 5, 10]).tick_values(bottom - price * right, top - price * left):
        ends = [(x, score + price * x) for x in (left, right)]
        ax.plot(*zip(*ends, strict=True), color=GRID, lw=0.8, ls=(0, (4, 3)), zorder=1)
        style: dict[str, Any] = {"color": MUTED, "fontsize": 7.5, "clip_on": False}
        if bottom < ends[1][1] <= top:
            ax.text(right + 0.01, ends[1][1], f"{score:.2f}", va="center", **style)
        elif price and left < (x := (top - score) / price) < right - 0.05:
            ax.text(x, top + 0.01 * (top - bottom), f"{score:.2f}", ha="center", va="bottom", **style)
    ax.text(1.0, 1.075, f"lines of equal score at price {price:g}", transform=ax.transAxes, ha="right", va="bottom",
            color=MUTED, fontsize=7.5)  # fmt: skip
    if line := (report.get("envelope") or {}).get(f"{price:g}"):
        ax.plot((left, right), [line["score"] + price * x for x in (left, right)], **ENVELOPE)
    for name, (x, y) in dots.items():
        look, agent = looks[name], report["agents"][name]
        ci = agent.get("score_ci") or (None, None)
        if None not in ci:
            ends = [ci[0] + price * x, ci[1] + price * x]
            ax.plot([x, x], ends, marker="_", ms=6, color=look.color, lw=1.2, zorder=3)
        ax.plot(x, y, zorder=4, **dot_of(look, 6.5))
    labels: list[Label] = [
        (looks[name].label, place, {"fontweight": "bold" if looks[name].learned else "normal"})
        for name, place in dots.items()
    ]
    beside = stands_beside(report.get("published") or [], report["task"], price)
    named = [(dot, row["agent"]) for row in beside for dot in _points([row], "advice_rate", "accuracy")]
    named = [(dot, name) for dot, name in named if dot[1] > bottom]
    for dot, name in named:
        ax.plot(*dot, "D", mfc="none", mec=MUTED, ms=4.5, mew=0.8, zorder=2)
        labels.append((_short(name), dot, {"color": MUTED, "fontsize": 7.5, "style": "italic"}))
    if named:
        ax.text(0.99, 0.02, "◇ published, not measured", transform=ax.transAxes, ha="right", va="bottom", color=MUTED,
                fontsize=7.5, style="italic")  # fmt: skip
    _label_dots(ax, labels)


Label = tuple[str, tuple[float, float], dict[str, Any]]  # text, place of the dot, style


def _label_dots(ax: Axes, labels: Sequence[Label]) -> None:
    """Write each name at the free side of its dot, where it covers least of the dots and of the names before it."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    width, height = (72 / ax.figure.dpi * pixels for pixels in ax.bbox.size)  # in points, before layout: about right
    x_scale, y_scale = width / (right - left), height / (top - bottom)
    centres = [((x - left) * x_scale, (y - bottom) * y_scale) for _, (x, y), _ in labels]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    for k in sorted(range(len(labels)), key=lambda k: ("fontsize" in labels[k][2], -centres[k][0])):  # the small last
        (text, dot, style), (x, y) = labels[k], centres[k]
        w, h = 0.58 * style.get("fontsize", 9) * len(text), 10.0
        sides = [(6, 0, "left"), (-6, 0, "right"), (0, 11, "center"), (0, -11, "center")]
        sides += [(-5, 13, "left"), (-5, -13, "left"), (5, 13, "right"), (5, -13, "right")]
        sides += [(0, 20, "center"), (0, -20, "center")]
        boxes = []
        for dx, dy, ha in sides:
            start = x + dx - {"left": 0, "center": w / 2, "right": w}[ha]
            boxes.append((start, y + dy - h / 2, start + w, y + dy + h / 2))

        costs = []
        for a, b, c, d in boxes:
            covered = sum(max(0, min(c, r) - max(a, p)) * max(0, min(d, s) - max(b, q)) for p, q, r, s in taken)
            costs.append(covered + 20 * (max(0, -a) + max(0, c - width) + max(0, -b) + max(0, d - height)))
        best = costs.index(min(costs))
        taken.append(boxes[best])
        dx, dy, ha = sides[best]
        ax.annotate(text, dot, (dx, dy), textcoords="offset points", ha=ha, va="center", zorder=5, **style)


def _tall(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """Height in inches for `_rows`."""
    return min(12.0, max(3.1, 0.8 + 0.1 * sum(len(agents) + 1 for agents in rows.values())))


def _rows(ax: Axes, rows: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look]) -> None:
    """A row for each type or group of questions; in it the agents one under another, so that no dot hides another."""
    for row, agents in enumerate(rows.values()):
        step = 0.8 / max(1, len(agents))
        if row % 2 == 0:
            ax.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.25, lw=0, zorder=0)
        for k, (name, figures) in enumerate(agents.items()):
            if (score := figures.get("score")) is not None:
                ax.plot(score, row + (k - (len(agents) - 1) / 2) * step, **dot_of(looks[name], 5.5))
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="score")
    ax.set_yticks(range(len(rows)), [_short(name) for name in rows], color=INK)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(6))


def _prices(ax: Axes, prices: Report, looks: Mapping[str, Look], lines: Report) -> None:
    """A curve for each agent, and the envelope as a dotted line."""
    names = list(dict.fromkeys(name for agents in prices.values() for name in agents))
    curves = {
        name: [(float(price), agents[name]["score"]) for price, agents in prices.items()
               if agents.get(name, {}).get("score") is not None]
        for name in names
    }  # fmt: skip
    envelope = [(float(price), lines[price]["score"]) for price in prices if price in lines]
    scores = [y for points in (*curves.values(), envelope) for _, y in points] or [0, 1]
    pad = 0.05 * (max(scores) - min(scores) or 1)
    ax.set(xlabel="price of advice", ylabel="score", ylim=(min(scores) - pad, max(scores) + pad))
    ax.set_xticks([float(price) for price in prices], list(prices))
    if envelope:
        ax.plot(*zip(*envelope, strict=True), **ENVELOPE)
    _curves(ax, curves, looks)


def _loss(ax: Axes, points: Points) -> None:
    ax.plot(*zip(*points, strict=True), color=looks_of(["sft"])["sft"].color, lw=1.6)
    ax.set(xlabel="optimizer step", ylabel="loss")
    if min(y for _, y in points) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _iterations(ax: Axes, curves: Mapping[str, Points]) -> None:
    """Curves over PPO's iterations: the first in PPO's colour, the others as its shadows."""
    low, high = (pick(y for points in curves.values() for _, y in points) for pick in (min, max))
    heights = apart([points[-1][1] for points in curves.values()], 0.08 * (high - low), low, high)
    for k, ((key, points), height) in enumerate(zip(curves.items(), heights, strict=True)):
        color, width = (looks_of(["ppo"])["ppo"].color, 2.2) if k == 0 else (MUTED, 1.1)
        ax.plot(*zip(*points, strict=True), color=color, lw=width, ls=("-", "-", (0, (4, 2)))[k])
        if len(curves) > 1:
            ax.annotate(key.replace("_", " "), (points[-1][0], height), (6, 0), textcoords="offset points", va="center",
                        fontweight="bold" if k == 0 else "normal", annotation_clip=False)  # fmt: skip
    ax.margins(x=0.01)
    ax.set(xlabel="iteration")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
