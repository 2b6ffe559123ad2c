"""What reinforcement fine-tuning came to: `report.json`, `report.html`, and the rewards of the course as `rewards.png`.

`report.json` holds

    train, validation, grader   the files
    rows                        validation rows
    before, after               {reward, unfinished, failed, errors: {name: number}} of the agents sft and ppo, greedy
    difference                  {difference, ci: [lo, hi], p}, paired over rows
    best_iteration              the one whose weights `ppo` has, 0 for the start
    iterations                  done
    course                      [{iteration, train, validation, kl, entropy}], None where it was not measured
    changed                     [{line, messages, before, after: {answer, reward, errors}}], most gained first
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agile.evaluate import GRADE, grading_errors, outcomes, paired_difference
from agile.plots import KNOWN, MUTED, STYLE, draw_svg, looks_of
from agile.report import write_bytes, write_json, write_page
from agile.session_log import read_lines
from agile.show import page_environment
from agile.types import Item, Session, SessionStatus, Stream, Trajectory

Course = list[dict[str, Any]]
MAX_CHANGED = 200  # rows on the page; report.json has all


def read_course(run: Path) -> Course:
    """Rewards and KL of each iteration of a run; of one that was done twice, the last."""
    found: dict[int, dict[str, Any]] = {}
    names = {"train": "score", "validation": "validation/score", "kl": "kl", "entropy": "entropy"}
    for row in read_lines(run / "metrics.jsonl"):
        if row["stage"] == "ppo":
            found[row["step"]] = {"iteration": row["step"], **{key: row.get(name) for key, name in names.items()}}
    return [found[i] for i in sorted(found)]


def draw(course: Course, out: Path) -> None:
    """Write `rewards.png`: rewards on the train and the validation rows, and KL to the start.

    Raises:
        AgileError: The folder cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, 2, width_ratios=(3, 2)), (_rewards, _kl), strict=True):
            panel(axes, course)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    write_bytes(out / "rewards.png", buffer.getvalue())


def _points(course: Course, key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in course if row[key] is not None]
    return [row["iteration"] for row in rows], [row[key] for row in rows]


def _rewards(axes: Axes, course: Course) -> None:
    axes.plot(*_points(course, "train"), color=MUTED, lw=1.1, label="train, sampled")
    axes.plot(*_points(course, "validation"), color=KNOWN["ppo"][0], lw=2.0, label="validation, greedy")
    axes.set(xlabel="iteration", ylabel="mean reward")
    axes.legend(frameon=False, loc="best")


def _kl(axes: Axes, course: Course) -> None:
    axes.plot(*_points(course, "kl"), color=KNOWN["ppo"][0], lw=1.6)
    axes.set(xlabel="iteration", ylabel="KL to the start, nats a token")


# --------------------------------------------------------------------------------------------------------------------


def write_rft_report(
    files: Mapping[str, Any], rows: Sequence[Stream], before: Sequence[Session], after: Sequence[Session], out: Path
) -> dict[str, Any]:
    """Write all three files into the run folder; the sessions are those of the rows, in order.

    Raises:
        AgileError: The folder cannot be written.
    """
    course = read_course(out)
    validated = [(row["validation"], -row["iteration"]) for row in course if row["validation"] is not None]
    report = {
        "train": files["data"],
        "validation": files["validation_data"],
        "grader": files["grader"],
        "rows": len(rows),
        "before": _summary(before),
        "after": _summary(after),
        "difference": paired_difference(outcomes(_trajectories(after)), outcomes(_trajectories(before)), 0.0),
        "best_iteration": -max(validated)[1] if validated else None,
        "iterations": max((row["iteration"] for row in course), default=0),
        "course": course,
        "changed": _changed([stream.items[0] for stream in rows], before, after),
    }
    write_json(out / "report.json", report)
    draw(course, out)
    looks = looks_of(["ppo"])
    plots = {
        name: draw_svg(name, title, partial(panel, course=course), looks)
        for name, title, panel in (("rewards", "mean reward", _rewards), ("kl", "KL to the start", _kl))
    }
    environment = page_environment()
    environment.filters["reward"] = lambda x: "" if x is None else f"{x:.3f}"
    page = environment.get_template("rft.html.j2").render(
        report=report, plots=plots, look=looks["ppo"], shown=report["changed"][:MAX_CHANGED]
    )
    write_page(out / "report.html", page)
    return report


def _trajectories(sessions: Sequence[Session]) -> list[Trajectory]:
    return [Trajectory(session.stream_id, (session,)) for session in sessions]


def reward_of(session: Session) -> float:
    """What the grader gave; 0 where it could not say."""
    return float(session.reward.components.get(GRADE, 0.0)) if session.reward else 0.0


def _summary(sessions: Sequence[Session]) -> dict[str, Any]:
    statuses = Counter(session.status for session in sessions)
    unfinished = statuses[SessionStatus.INVALID_ACTION] + statuses[SessionStatus.TRUNCATED]
    return {
        "reward": float(np.mean([reward_of(s) for s in sessions])),
        "unfinished": unfinished,
        "failed": len(sessions) - unfinished - statuses[SessionStatus.COMPLETED],
        "errors": grading_errors(_trajectories(sessions)),
    }


def _changed(items: Sequence[Item], before: Sequence[Session], after: Sequence[Session]) -> list[dict[str, Any]]:
    """Rows whose answer or reward differs, most gained first."""
    found = [
        {
            "line": item.context["line"],
            "messages": item.context["messages"],
            "before": _answer(first),
            "after": _answer(last),
        }
        for item, first, last in zip(items, before, after, strict=True)
        if (first.answer, reward_of(first)) != (last.answer, reward_of(last))
    ]
    return sorted(found, key=lambda row: row["before"]["reward"] - row["after"]["reward"])


def _answer(session: Session) -> dict[str, Any]:
    components = session.reward.components if session.reward else {}
    errors = [name for name in components if name != GRADE] if not session.error else [session.error]
    return {"answer": session.answer, "reward": reward_of(session), "errors": errors}


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: what training came to."""
    before, after, change = report["before"]["reward"], report["after"]["reward"], report["difference"]
    low, high = change["ci"]
    text = f"Mean reward on {report['rows']} validation rows: {before:.3f} before, {after:.3f} after"
    if math.isclose(before, after, abs_tol=1e-9):
        return f"{text}: no change."
    return f"{text} ({change['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
