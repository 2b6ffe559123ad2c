"""Parts of the report: groups and their means, published rows, pairs, experts, what was not run. Nothing is drawn."""

import re
from typing import Any

import pytest

from agile.plots import draw_all, looks_of
from agile.plots_bench import draw_experts
from agile.report import render_html
from agile.report_words import gains_shown, means_of, spend_columns, spent
from tests.made_up import made_up_report, summary
from tests.test_report import Elements, bare_report, printed


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("agile.report.draw_all", lambda *_: {"types": "<svg></svg>"})
    for draw in ("draw_measured", "draw_experts"):
        monkeypatch.setattr(f"agile.report.{draw}", lambda *_: {})
    return made_up_report()


def row_of(page: str, start: str) -> str:
    """The cells of a table's row, by how it starts."""
    rows = (" ".join(re.sub("<[^>]*>", " ", row.partition("</tr>")[0]).split()) for row in page.split("<tr"))
    return next(row for row in (r.partition("> ")[2] for r in rows) if row.startswith(start))


def test_groups_are_shown_with_both_means_and_what_is_published_of_them(report: dict[str, Any]) -> None:
    del report["prices"]
    report["groups"] = {g: {"0.3": v["0.3"]} for g, v in report["groups"].items()}
    page = render_html(report)
    assert "Other prices" not in page and Elements(page).open == []
    assert "agile-vic13b-ppo, published</th>" in page
    assert row_of(page, "camera_cases 2,400").endswith("0.781")  # oracle first, the paper's last
    assert row_of(page, "leggings 2,400").endswith("\N{EN DASH}")
    macro, micro = (row_of(page, f"Every {what} alike").split()[-7:] for what in ("group", "question"))
    assert [float(b) - float(a) for a, b in zip(macro, micro, strict=True)] == pytest.approx([0.01] * 7)
    assert "Every group counts alike (macro); micro: every question does." in page
    assert "Score, micro" in page and "micro" in printed(report, 130)


def test_the_other_mean_is_left_out_where_it_is_the_same() -> None:
    report = made_up_report()
    assert means_of(report) == ("micro", "Every group counts alike (macro); micro: every question does.")
    assert means_of(report | {"macro": False}) == (
        "macro",
        "Every question counts alike (micro); macro: every group does.",
    )
    for agent in report["agents"].values():
        agent["means"]["micro"] = agent["means"]["macro"]
    assert means_of(report) is None and means_of(bare_report()) is None


def test_published_rows_stand_under_the_measured_ones_and_say_so(report: dict[str, Any]) -> None:
    page = render_html(report)
    apart = page.index("Published in arXiv 2405.14751v2, not measured here and not ranked among the above")
    assert page.index("never ask") < apart < page.index('<tr class="published">')
    assert row_of(page, "agile-vic13b-ppo 3 groups").split()[3:] == ["0.784", "85.4", "%", "23.3", "%"]
    assert row_of(page[page.index("Other prices, other groups") :], "agile-vic13b-ppo published").split()[2:] == [
        *("\N{EN DASH}", "\N{EN DASH}", "0.784", "\N{EN DASH}", "\N{EN DASH}")
    ]
    table = printed(report)
    assert table.index("never ask") < table.index("Published in arXiv 2405.14751v2, not measured here")
    assert re.search(r"agile-vic13b-ppo.*0\.784.*23\.3", table)


def test_published_dots_are_of_the_headline_measure_and_bear_a_name() -> None:
    report = bare_report(published=made_up_report()["published"], task="productqa")
    report["published"][1] |= {"measure": "long answer, judged", "agent": "judged-one", "groups": []}
    report["published"][1] |= {"table": "ProductQA, main results", "advice_rate": 0.5, "accuracy": 1.0}
    report["published"].append({**report["published"][1], "measure": "short answer", "agent": "ablated"})
    report["published"][2]["table"] = "ProductQA, ablation"
    report["agents"]["router"]["accuracy"] = 0.8
    svg = draw_all(report, looks_of(report["agents"]), {})["frontier"]
    assert "agile-vic13b-ppo" in svg and "judged-one" not in svg and "ablated" not in svg
    assert "published, not measured" in svg
    plain = draw_all({**report, "published": []}, looks_of(report["agents"]), {})["frontier"]
    assert "published" not in plain


def test_groups_are_drawn_unless_there_are_too_many() -> None:
    one = {"0.3": bare_report()["agents"]}
    for number, drawn in ((1, False), (2, True), (22, True), (23, False)):
        report = bare_report(groups={f"g{k}": one for k in range(number)})
        plots = draw_all(report, looks_of(report["agents"]), {})
        assert ("groups" in plots) == drawn


def test_missing_reference_lines_are_named_and_nobody_is_called_better(report: dict[str, Any]) -> None:
    assert "an agent is better if" in render_html(report)
    report["references_missing"] = ["recall", "calibrated_recall"]
    said = "As the reference lines recall, calibrated recall were not run, no agent is called better."
    page = render_html(report)
    assert said in page and "an agent is better if" not in page
    assert said in printed(report, 400)


def test_every_pair_is_in_the_page_and_the_main_ones_in_the_terminal(report: dict[str, Any]) -> None:
    page, table = render_html(report), printed(report)
    main, _, others = page.partition("The other pairs of agents")
    assert "PPO against SFT" in main and "SFT against recall" not in main and "SFT against recall" in others
    assert "PPO against recall" in table and "SFT against recall" not in table


def test_experts_are_told_of_the_agent_that_the_report_is_about(report: dict[str, Any]) -> None:
    (gain,) = report["experts"]["gains"]
    assert gains_shown(report) == [gain]  # nothing is known of PPO
    report["experts"]["gains"].append({**gain, "agent": "ppo", "gain": -0.25, "worth_below": 0.125})
    assert [row["agent"] for row in gains_shown(report)] == ["ppo"]
    table = printed(report)
    assert "PPO with each expert" in table and re.search("tired-doctor.*\N{MINUS SIGN}0.250.*0.125", table)
    assert "What experts are worth" in render_html(report)
    looks = looks_of(["ppo", "asks tired-doctor"])
    assert list(draw_experts(gains_shown(report), looks)) == ["experts"]
    assert draw_experts([{**gain, "gain": None}], looks) == draw_experts([], looks) == {}


def test_money_of_experts_and_judges_has_columns() -> None:
    agents = {name: summary(0.9, 0.5, 10) for name in ("ppo", "router")}
    agents["ppo"]["other_cost"] = {"expert": 1.5, "judge": 0.0}
    agents["router"]["seconds"] = 0.25
    assert spend_columns(agents) == ("expert cost", "seconds")
    assert [spent(agents["ppo"], column) for column in spend_columns(agents)] == ["1.50", "\N{EN DASH}"]
    assert spent(agents["router"], "expert cost") == "\N{EN DASH}" and spent(agents["router"], "seconds") == "0.2"
