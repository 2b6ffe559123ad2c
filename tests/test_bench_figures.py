"""From what was measured to a report, in closed form: nothing is played."""

from dataclasses import replace
from statistics import stdev
from typing import Any

import pytest

from agile.bench import _report, _seeds, _verdict
from agile.config import load_config
from agile.evaluate import Outcome
from agile.measure import Measured, joined
from agile.types import Usage


def played(**streams: str) -> list[Outcome]:
    """Outcomes of questions by stream: `r` right, `w` wrong, `a` asked and right, `x` failed."""
    return [
        Outcome(f"{name}/{i}", name, i, len(marks), "k", mark in "ra", mark == "a", mark == "x")
        for name, marks in streams.items()
        for i, mark in enumerate(marks)
    ]


def report_of(measured: Measured, *overrides: str, num_runs: int = 1) -> dict[str, Any]:
    config = load_config(None, ["task.name=productqa", "task.data=x", "task.advice_price=0.25", *overrides])
    return _report(config, measured, 0.0, num_runs)


def test_agents_by_group_price_and_both_means() -> None:
    """Two groups of 2 and 4 questions; every group counts alike."""
    whole, alone = played(one="aw", two="rrrw"), played(one="ww", two="rrww")
    found = Measured(True, ("one", "two"), results={"ppo": whole, "sft": alone}, prices={0.5: ({"ppo": whole}, {})})
    report = report_of(found)
    agent = report["agents"]["ppo"]
    assert (agent["accuracy"], agent["advice_rate"], agent["score"]) == (0.625, 0.25, 0.5625)
    assert agent["means"] == {
        "macro": {"accuracy": 0.625, "advice_rate": 0.25, "score": 0.5625},
        "micro": {
            key: pytest.approx(value / 6) for key, value in (("accuracy", 4), ("advice_rate", 1), ("score", 3.75))
        },
    }
    assert (agent["expert_calls"], agent["failed"]) == (1, 0)
    assert report["prices"]["0.5"]["ppo"]["score"] == 0.5
    groups = {
        g: {p: {n: a["score"] for n, a in x.items()} for p, x in prices.items()}
        for g, prices in report["groups"].items()
    }
    assert groups == {
        "one": {"0.25": {"ppo": 0.375, "sft": 0.0}, "0.5": {"ppo": 0.25}},
        "two": {"0.25": {"ppo": 0.75, "sft": 0.5}, "0.5": {"ppo": 0.75}},
    }
    (pair,) = report["comparisons"]
    assert (pair["a"], pair["b"], pair["difference"]) == ("ppo", "sft", 0.3125)


def test_ablations_are_differences_to_the_whole_agent() -> None:
    whole, without = played(one="rrra" * 10), played(one="rwwx" * 10)
    found = Measured(True, ("one",), results={"ppo": whole}, ablations={"memory": without, "poisoned_memory": whole})
    found.prices = {0.5: ({"ppo": without}, {"memory": whole, "poisoned_memory": whole})}
    rows = report_of(found)["ablations"]["rows"]
    assert rows["memory"]["difference"] == pytest.approx(0.25 - (1 - 0.25 / 4))
    assert rows["memory"]["verdict"] == "as in the paper" and rows["poisoned_memory"]["verdict"] == "not in the paper"
    assert rows["memory"]["failed"] == 10
    assert rows["memory"]["prices"]["0.5"]["difference"] == pytest.approx((1 - 0.5 / 4) - 0.25)


@pytest.mark.parametrize(
    ("difference", "ci", "verdict"),
    [
        (-0.1, [-0.2, -0.01], "as in the paper"),
        (0.1, [0.01, 0.2], "against the paper"),
        (-0.1, [-0.2, 0.0], "not clear"),
        (0.0, [0.0, 0.0], "not clear"),
    ],
)
def test_verdicts(difference: float, ci: list[float], verdict: str) -> None:
    assert _verdict({"difference": difference, "ci": ci}, {"difference": -0.03}) == verdict


def test_questions_that_were_left_out_make_other_questions() -> None:
    found = Measured(True, ("leggings",), results={"router": played(leggings="ra")})
    same = [
        any(row["same_questions"] for row in report_of(found, *more)["published"])
        for more in ([], ["task.max_items=2"])
    ]
    assert same == [True, False]


def test_several_runs_are_one_report() -> None:
    parts = {
        "a": Measured(False, ("s",), results={"ppo": played(s="rw")}, usages={"ppo": Usage(10, 0, 1, 0.5)}),
        "b": Measured(False, ("s",), results={"ppo": played(s="rr")}, usages={"ppo": Usage(30, 0, 2, 0.25)}),
        "c": Measured(False, ("s",), results={"ppo": played(s="ar")}, usages={"ppo": Usage(0, 0, 0, 0.0)}),
    }
    for part in parts.values():
        part.costs, part.seconds_of = {"ppo": {"expert": 1.5, "judge": 0.25}}, {"ppo": 2.0}
    whole = joined(parts, same_questions=True)
    assert [o.stream_id for o in whole.results["ppo"]] == ["a/s", "a/s", "b/s", "b/s", "c/s", "c/s"]
    assert {o.questions for o in whole.results["ppo"]} == {"s"}
    assert {o.questions for o in joined(parts, same_questions=False).results["ppo"]} == {None}
    report = report_of(whole, num_runs=3)
    agent = report["agents"]["ppo"]
    assert (agent["n"], agent["accuracy"], agent["usage"]["cost"], agent["usage"]["prompt_tokens"]) == (
        6,
        5 / 6,
        0.75,
        40,
    )
    assert (agent["other_cost"], agent["seconds"]) == ({"expert": 4.5, "judge": 0.75}, 6.0)
    assert report["notes"] == [
        "Of a alone are the sessions to read, details of agents and what experts are worth; all else is of all runs."
    ]
    config = load_config(None, ["task.advice_price=0.25"])
    seeds = _seeds(config, parts, [0, 1, 2])["ppo"]
    assert [run["score"] for run in seeds["runs"]] == [0.5, 1.0, 0.875]
    assert seeds["mean"]["score"] == pytest.approx(2.375 / 3)
    assert seeds["spread"]["score"] == pytest.approx(stdev([0.5, 1.0, 0.875]))


def test_a_dev_set_is_whole_however_many_runs_played_it() -> None:
    from agile.published import NUM_QUESTIONS

    once = played(dev="r" * NUM_QUESTIONS["medmcqa"])
    twice = [replace(o, stream_id=f"{run}/dev", questions="dev") for run in "ab" for o in once]
    for results, num_runs, same in ((once, 1, True), (twice, 2, True), (twice, 1, False), (once[:-1], 1, False)):
        report = report_of(
            Measured(False, ("dev",), results={"router": results}), "task.name=medmcqa", num_runs=num_runs
        )
        assert {row["same_questions"] for row in report["published"]} == {same}
    others = report_of(Measured(False, ("dev",), published=False, results={"router": once}), "task.name=medmcqa")
    assert others["published"] == [] and others["envelope"]["0.25"]["by"] == "router"
