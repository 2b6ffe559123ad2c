"""What experts are worth, in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agile.evaluate import Outcome
from agile.expert_worth import Asked, experts_table, gains


def results(right: str, advised: str = "----") -> list[Outcome]:
    """One outcome a letter: x is right, or advised."""
    return [
        Outcome(f"q{i}", "s", i, len(right), "k", r == "x", a == "x")
        for i, (r, a) in enumerate(zip(right, advised, strict=True))
    ]


def expert(right: str, price: float = 0.2) -> Asked:
    """x is a right answer, - a wrong one, ? none."""
    keys = {("s", f"q{i}"): letter for i, letter in enumerate(right)}
    return Asked(
        len(right),
        frozenset(k for k, letter in keys.items() if letter != "?"),
        frozenset(k for k, letter in keys.items() if letter == "x"),
        1,
        price,
        None,
    )


def test_experts_by_accuracy() -> None:
    best, worst = experts_table({"poor": expert("x--?"), "good": expert("xxx-", 0.5)})
    assert best == {
        "expert": "good",
        "accuracy": 0.75,
        "answered": 1.0,
        "unreadable": 0.25,
        "price": 0.5,
        "latency_s": None,
    }
    assert (worst["expert"], worst["accuracy"], worst["answered"]) == ("poor", 0.25, 0.75)


def test_who_never_asks_gains_what_the_expert_knows_better() -> None:
    (row,) = gains({"alone": results("x---")}, {"good": expert("xxx-")})
    assert (row["accuracy"], row["advice_rate"]) == (0.75, 1.0)
    assert row["score"] == pytest.approx(0.55)
    assert row["gain"] == pytest.approx(0.3)
    assert row["worth_below"] == pytest.approx(0.5)


def test_without_an_answer_one_gives_ones_own() -> None:
    (row,) = gains({"alone": results("x--x")}, {"half": expert("?xx?")})
    assert (row["accuracy"], row["advice_rate"]) == (1.0, 0.5)
    assert row["worth_below"] == pytest.approx(1.0)  # two answers made two more right


def test_who_asks_sometimes_has_this_expert_there() -> None:
    played = results("xx-x", "-x-x")
    by_name = {row["expert"]: row for row in gains({"ppo": played}, {"gold": expert("xxxx"), "poor": expert("---?")})}
    assert (by_name["gold"]["accuracy"], by_name["gold"]["advice_rate"]) == (0.75, 0.5)
    assert (by_name["poor"]["accuracy"], by_name["poor"]["advice_rate"]) == (0.25, 0.25)
    assert by_name["poor"]["gain"] is None and by_name["poor"]["worth_below"] is None


def test_own_answers_tell_what_asking_sometimes_gains() -> None:
    """Asked about the second and the last question, of which it knows the second itself."""
    own = {"ppo": {("s", "q1"): True, ("s", "q3"): False}}
    experts = {"gold": expert("xxxx"), "poor": expert("---?")}
    by_name = {row["expert"]: row for row in gains({"ppo": results("xx-x", "-x-x")}, experts, own=own)}
    assert by_name["gold"]["gain"] == pytest.approx(0.75 - 0.2 * 0.5 - 0.5)
    assert by_name["gold"]["worth_below"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert by_name["poor"]["worth_below"] == pytest.approx((0.25 - 0.5) / 0.25)


def test_an_expert_who_never_answers_is_worth_nothing_that_is_known() -> None:
    (row,) = gains({"alone": results("x---")}, {"nobody": expert("????")})
    assert (row["gain"], row["worth_below"]) == (0.0, None)


def test_every_stream_may_weigh_alike() -> None:
    """A stream of one question that the expert knows, one of four that it does not."""
    played = [*results("----"), replace(results("-", "-")[0], item_id="p0", stream_id="t")]
    knows = Asked(5, frozenset((o.stream_id, o.item_id) for o in played), frozenset({("t", "p0")}), 0, 0.2, None)
    (micro,), (macro,) = (gains({"alone": played}, {"one": knows}, macro=macro) for macro in (False, True))
    assert (micro["accuracy"], micro["gain"]) == (0.2, pytest.approx(0.0))
    assert (macro["accuracy"], macro["gain"]) == (0.5, pytest.approx(0.3))


def test_best_score_first() -> None:
    rows = gains({"alone": results("x---")}, {"dear": expert("xxxx", 1.0), "cheap": expert("xxx-", 0.1)})
    assert [row["expert"] for row in rows] == ["cheap", "dear"]
