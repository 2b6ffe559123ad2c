"""The report of a run: what is written is what was measured, and the page is whole, safe and the same every time."""

import errno
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agile.errors import AgileError
from agile.plots import apart, draw_all, looks_of
from agile.report import render_html, render_table, save_plots, write_report
from tests.made_up import AGENTS, PRICE, made_up_agent, made_up_report, summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with everything written."""
    out = tmp_path_factory.mktemp("run") / "new"
    write_report(made_up_report(), out)
    save_plots(made_up_report(), out)
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the words alone: drawing is what takes the time."""
    monkeypatch.setattr("agile.report.draw_all", lambda *_: {})
    monkeypatch.setattr("agile.report.draw_measured", lambda *_: {})
    monkeypatch.setattr("agile.report.draw_experts", lambda *_: {})


def bare_report(**more: Any) -> dict[str, Any]:
    """The least that a report can hold: no plots but the frontier, so it is quick to draw."""
    agents = {"router": summary(1.0, 0.7, 100), "oracle": summary(1.0, 0.2, 100)}
    return {"task": "minishop", "advice_price": PRICE, "agents": agents, "seconds": 1.5, **more}


def test_intervals_that_nobody_knows(no_plots: None) -> None:
    """Of a single question."""
    report, endless = made_up_report(), [-math.inf, math.inf]
    for agent in report["agents"].values():
        agent["score_ci"] = endless
    for row in (*report["comparisons"], *report["ablations"]["rows"].values()):
        row["ci"] = endless
    page = render_html(report)
    render_table(report, console := Console(record=True, width=140))
    for text in (page, console.export_text()):
        assert "inf" not in text.replace("information", "")
    assert "is not clearly better" not in page and "It clearly misses" not in page and "What it would miss" not in page


class Elements(HTMLParser):
    """Start tags with their attributes, ids, and the tags left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def printed(report: dict[str, Any], width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    render_table(report, console)
    return console.export_text(styles=True)


# --------------------------------------------------------------------------------------------------------------------
# What is written


def test_json_holds_the_report_and_nothing_is_left_behind(folder: Path) -> None:
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(made_up_report()))
    assert sorted(f.name for f in folder.iterdir()) == ["report.html", "report.json", "report.png"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    report = bare_report(training=[{"iteration": 0, "score": math.nan}, {"iteration": 1, "score": np.float32(0.5)}])
    report["agents"]["sft"] = {"accuracy": math.nan, "advice_rate": None, "score": math.inf, "n": np.int64(0)}
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["agents"]["sft"] == {
        "accuracy": None,
        "advice_rate": None,
        "score": None,
        "n": 0,
    }
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r">\s*(nan|inf|None)\b", page)
    assert "SFT" in printed(report)


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AgileError, match=r"report\.json: No space left on device; .*out=DIR"):
        write_report(bare_report(), tmp_path)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("report.json", "old")]


def test_a_file_in_place_of_the_folder_is_an_error_for_users(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(AgileError, match="Cannot write"):
        write_report(bare_report(), tmp_path / "run")


def test_figures_survive_a_fault_in_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.report.draw_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(bare_report(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["task"] == "minishop"


# --------------------------------------------------------------------------------------------------------------------
# The page


def test_page_is_well_formed_and_its_ids_are_unique(page: str) -> None:
    elements = Elements(page)
    assert elements.open == []
    ids = [attrs["id"] for _, attrs in elements.starts if "id" in attrs]
    assert len(set(ids)) == len(ids)
    refers = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert refers and set(refers) <= set(ids)


def test_page_loads_nothing(page: str) -> None:
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"\w+://[^\s\"'<>)]*", page)) <= allowed
    for tag, attrs in Elements(page).starts:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert all(
            (value or "").startswith("#") for name, value in attrs.items() if name in ("src", "href", "xlink:href")
        )
        assert not any(name.startswith("on") for name in attrs)
    assert "@import" not in page


def test_page_shows_every_agent_every_plot_and_the_headline(page: str) -> None:
    for label in ("PPO", "SFT", "oracle", "recall", "router", "always ask", "never ask"):
        assert page.count(label) >= 4
    assert (
        "After PPO the agent scores 0.859; it asks on 52\xa0% of questions at the start of a stream and 24\xa0%" in page
    )
    assert page.count("<svg") == 19
    assert "0.848\N{EN DASH}0.869" in page
    variables = set(re.findall(r"(--[\w-]+):", page))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= variables


def test_summary_says_what_matters(page: str) -> None:
    for sentence in (
        "Of 2,400 questions that it had not seen in training, PPO got 95\xa0% right and put 32\xa0% to a person.",
        "Trained 3 times from other seeds it scores 0.807 on average, with a spread of 0.003 between them.",
        "What it would miss most: it scores 0.120 less without advice.",
        "The paper found the opposite without reflection.",
    ):
        assert sentence in page
    assert re.search(r"<details class=\"reading\"><summary>Question 3 .*Made to answer it is right.</summary>", page)


ALWAYS, IF_RIGHT = (
    "Advised sessions count as correct",
    "An advised session counts as correct only if the expert was right",
)


@pytest.mark.slow
def test_the_price_of_the_task_stands_among_the_others_and_many_groups_are_folded_away() -> None:
    report = made_up_report()
    sweep = report["prices"].pop(f"{report['advice_price']:g}")
    report["groups"] = {f"shop {i}": {f"{report['advice_price']:g}": sweep} for i in range(12)}
    page = render_html(report)
    assert re.search("Score at price</th>(<th>0.[1-5]</th>)*<th>0.3</th>", page) and report["advice_price"] == 0.3
    assert "12 groups, one by one" in page and Elements(page).open == []
    report["groups"].pop("shop 0")
    assert "one by one" not in render_html(report)


@pytest.mark.parametrize(("counts", "said"), [("always", ALWAYS), ("if_right", IF_RIGHT), (None, "")])
def test_page_says_when_an_advised_session_is_right(
    counts: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agile.report.draw_all", lambda *_: {"accuracy": "<svg></svg>"})
    monkeypatch.setattr("agile.report.draw_measured", lambda *_: {})
    page = render_html(bare_report() | ({} if counts is None else {"advice_counts": counts}))
    for sentence in (ALWAYS, IF_RIGHT):  # the remark on the tile, the caption of the plot, the definition
        assert page.count(sentence) == (3 if sentence == said else 0)
    assert ("baselines ask one who always is" in page) == (counts == "if_right")


def test_agents_look_the_same_in_every_plot() -> None:
    few, many = looks_of(["mine", "ppo"]), looks_of(["ppo", "other", "sft"])
    assert few["ppo"] == many["ppo"]
    looks = looks_of([*AGENTS, "mine", "other", "asks gold", "gpt", "asks gpt", "sixth"])
    assert len({look.color for look in looks.values()}) == len({look.marker for look in looks.values()}) == len(looks)
    assert [n for n, look in looks.items() if look.learned] == ["ppo", "sft"]


def test_same_report_same_bytes(tmp_path: Path) -> None:
    agents = {name: made_up_agent(*AGENTS[name], salt=0) for name in ("ppo", "router")}
    for run in ("a", "b"):
        write_report(bare_report() | {"agents": agents}, tmp_path / run)
        save_plots(bare_report() | {"agents": agents}, tmp_path / run)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


HOSTILE = '<script>alert("x")</script> & $x_{1 </svg> {{ 7 * 7 }} [bold]'


def test_whatever_sessions_and_names_say_is_shown_as_text(tmp_path: Path) -> None:
    agent = summary(0.5, 0.1, 10) | {"by_type": {HOSTILE: summary(0.5, 0.1, 10)}}
    report = bare_report(
        notes=[HOSTILE], details={HOSTILE: {HOSTILE: HOSTILE}}, groups={HOSTILE: {f"{PRICE:g}": {HOSTILE: agent}}}
    )
    report |= {"task": HOSTILE, "examples": [[("llm", HOSTILE), ("tool", "\ud800")]], "seconds": {HOSTILE: 1}}
    report["agents"][HOSTILE] = agent
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; $x_{1 &lt;/svg&gt; {{ 7 * 7 }} [bold]" in page
    assert Elements(page).open == []
    assert HOSTILE in printed(report | {"task": "t"}).replace("\n", " ")


@pytest.mark.parametrize(
    "missing", [*sorted(made_up_report().keys() - {"task", "advice_price", "agents"}), "by_position", "all"]
)
@pytest.mark.usefixtures("no_plots")
def test_what_is_missing_is_left_out(missing: str) -> None:
    report = made_up_report()
    report.pop(missing, None)
    if missing == "by_position":
        for agent in report["agents"].values():
            del agent["by_position"]
        assert "it asks on 32\xa0% of questions." in render_html(report)
    if missing == "all":
        report = {key: report[key] for key in ("task", "advice_price", "agents")}
    page = render_html(report)
    assert Elements(page).open == []
    assert ("word for word" in page) == ("examples" in report)
    assert ("Other prices" in page) == ("prices" in report)
    assert ("not measured here and not ranked" in page) == ("published" in report)
    assert ("Differences in score" in page) == ("comparisons" in report)
    for heading, key in (
        ("What each ability is worth", "ablations"),
        ("Several seeds", "seeds"),
        ("reference lines and published", "envelope"),
        ("Does it know what it knows", "calibration"),
        ("What memory did", "memory_use"),
        ("experts: who was asked", "experts"),
        ("experts: what each is worth", "experts"),
    ):
        assert (heading in page) == (key in report)
    assert "Training" not in page and "What the agents do" not in page  # no plots, no headings for them


@pytest.mark.parametrize(
    ("agents", "headline"),
    [
        ({}, "No agent was scored."),
        ({"ppo": {"score": None}}, "No agent was scored."),
        ({"sft": summary(0.9, 0.5, 10), "oracle": summary(1, 0, 10)}, "After imitation the agent scores 0.750"),
        ({"router": summary(1, 0.5, 10), "oracle": summary(1, 0, 10)}, "The best of the agents, router, scores 0.850"),
    ],
)
@pytest.mark.usefixtures("no_plots")
def test_headline_speaks_of_the_agent_that_was_trained(agents: dict[str, Any], headline: str) -> None:
    assert headline in render_html(bare_report() | {"agents": agents})


@pytest.mark.usefixtures("no_plots")
def test_neighbouring_spans_of_one_writer_are_joined() -> None:
    spans = [("task", "is it "), ("task", "red ?"), ("llm", " \n"), ("llm", "[SeekAdvice]")]
    page = render_html(bare_report(examples=[spans]))
    assert re.findall(r"<code>(.*?)</code>", page) == ["is it red ?", "[SeekAdvice]"]


# --------------------------------------------------------------------------------------------------------------------
# Plots and the terminal


def test_plots_follow_from_the_data() -> None:
    report = bare_report(training=[{"iteration": k, "kl": k / 10} for k in range(3)])
    assert list(draw_all(report, looks_of(report["agents"]), {})) == ["frontier", "kl"]


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_standapart_in_the_order_of_their_lines(values: list[float]) -> None:
    gap = 0.08
    placed = apart(values, gap, 0.02, 0.97)
    assert all(0.02 - 1e-9 <= place <= 0.97 + 1e-9 for place in placed)
    ranked = [place for _, _, place in sorted(zip(values, range(len(values)), placed, strict=True))]
    assert all(high - low >= gap - 1e-9 for low, high in pairwise(ranked))


def test_labels_with_room_stay_where_they_are() -> None:
    assert apart([0.9, 0.1, 0.5], 0.08, 0, 1) == [0.9, 0.1, 0.5]


def test_table_ranks_by_score_and_dims_what_does_not_learn() -> None:
    lines = printed(made_up_report()).splitlines()
    rows = [line for line in lines if re.search("\\d\N{EN DASH}0", line)]
    order = ["oracle", "PPO", "SFT", "recall", "router", "always ask", "never ask"]
    assert [next(label for label in order if label in row) for row in rows] == order
    for row, label in zip(rows, order, strict=True):
        assert ("\x1b[1m" in row, "\x1b[2m" in row) == ((True, False) if label in ("PPO", "SFT") else (False, True))
    assert "PPO against SFT: +0.042 (+0.032 to +0.052)" in "\n".join(lines)
    assert "2,400 questions" in lines[0]


def test_a_narrow_terminal_shows_less_and_cuts_nothing() -> None:
    wide, narrow = (printed(made_up_report(), width) for width in (130, 80))
    assert "seconds" in wide and "seconds" not in narrow
    for text in ("0.848\N{EN DASH}0.869", "\N{MINUS SIGN}0.070 to \N{MINUS SIGN}0.030", "as in the paper"):
        assert text in wide and text in narrow
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
