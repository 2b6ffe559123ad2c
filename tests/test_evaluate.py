import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.stats import norm

from agile.evaluate import (
    Outcome,
    _deviations,
    _interval,
    _p,
    _units,
    _weights,
    by_stream,
    outcomes,
    paired_difference,
    summarise,
)
from agile.published import clears
from agile.types import Advice, AdviceStatus, Reward, Session, SessionStatus, Trajectory


def outcome(
    stream: str, position: int, correct: bool, advised: bool = False, length: int = 4, kind: str = "k"
) -> Outcome:
    return Outcome(f"{stream}/{position}", stream, position, length, kind, correct, advised)


def table(scores: np.ndarray, name: str = "s") -> list[Outcome]:
    """Outcomes of streams that nobody advised, from right or wrong, shape (streams, questions)."""
    return [
        outcome(f"{name}{s}", i, bool(right), length=scores.shape[1])
        for s, row in enumerate(scores)
        for i, right in enumerate(row)
    ]


def session(index: int, reward: Reward | None, advised: bool = False, failed: bool = False) -> Session:
    advice = Advice("a", status=AdviceStatus.ANSWERED if advised else AdviceStatus.TIMEOUT)
    status = SessionStatus.TRUNCATED if failed else SessionStatus.COMPLETED
    return Session(f"s/{index}", "s", index, f"i{index}", "k", 0, (), (), (), (), advice, "a", status, "", reward)


def test_outcomes_follow_reward_advice_and_failure() -> None:
    right, wrong = Reward({"correct": 1.0, "credit": -5.0}), Reward({"correct": 0.0, "credit": 5.0})
    sessions = (
        session(0, right),
        session(1, wrong),
        session(2, wrong, advised=True),
        session(3, wrong, advised=True, failed=True),
        session(4, wrong, failed=True),
    )
    results = outcomes([Trajectory("s", sessions)])
    assert [o.correct for o in results] == [True, False, False, False, False]  # the reward decides
    assert [o.advised for o in results] == [False, False, True, True, False]
    assert [o.failed for o in results] == [False, False, False, True, True]
    assert [(o.item_id, o.position, o.length) for o in results] == [(f"i{i}", i, 5) for i in range(5)]
    assert summarise(results, 0.3)["failed"] == 2
    graded = [session(i, Reward({"grade": grade})) for i, grade in enumerate((0.99, 1.0, 1.5, -1.0))]
    results = outcomes([Trajectory("s", tuple(graded))])
    assert [o.correct for o in results] == [False, True, True, False]
    assert summarise(results, 0.3)["score"] == pytest.approx((0.99 + 1 + 1.5 - 1) / 4)  # grades count
    with pytest.raises(ValueError, match=r"Session s/0 has no reward"):
        outcomes([Trajectory("s", (session(0, None),))])


def test_summary_in_closed_form() -> None:
    results = [
        outcome("a", 0, True, advised=True, kind="fact"),
        outcome("a", 1, True, advised=True, kind="fact"),
        outcome("a", 2, False, kind="fact"),
        outcome("a", 3, True, kind="search"),
    ]
    whole = summarise(results, 0.3, bins=2)
    assert (whole["accuracy"], whole["advice_rate"], whole["n"], whole["failed"]) == (0.75, 0.5, 4, 0)
    assert whole["score"] == pytest.approx(0.6)
    assert whole["by_type"]["search"] == {"accuracy": 1.0, "advice_rate": 0.0, "score": 1.0, "n": 1}
    assert whole["by_type"]["fact"]["score"] == pytest.approx(2 / 3 - 0.3 * 2 / 3)
    first, last = whole["by_position"]
    assert (first["from"], first["to"], first["advice_rate"], first["n"]) == (0.0, 0.5, 1.0, 2)
    assert (last["from"], last["to"], last["advice_rate"], last["accuracy"]) == (0.5, 1.0, 0.0, 0.5)
    assert json.loads(json.dumps(whole)) == whole


def test_macro_weighs_streams_alike() -> None:
    long = [outcome("long", i, False, advised=i < 6, length=12) for i in range(12)]
    short = [outcome("short", i, True, length=2) for i in range(2)]
    assert summarise(long + short, 0.3)["accuracy"] == pytest.approx(2 / 14)
    macro = summarise(long + short, 0.3, macro=True)
    groups = [summarise(group, 0.3) for group in by_stream(long + short).values()]
    for key in ("accuracy", "advice_rate", "score"):
        assert macro[key] == pytest.approx(np.mean([group[key] for group in groups]))
    assert macro["by_type"]["k"]["accuracy"] == pytest.approx(0.5)
    assert macro["score_ci"][0] <= macro["score"] <= macro["score_ci"][1]


@given(
    rows=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=40),
    price=st.floats(0, 1),
)
def test_score_is_the_mean_reward_and_parts_add_up(rows: list[tuple[bool, bool, int]], price: float) -> None:
    results = [outcome("s", i, r, a, len(rows), str(kind)) for i, (r, a, kind) in enumerate(rows)]
    whole = summarise(results, price, num_resamples=50)
    assert whole["score"] == pytest.approx(np.mean([r - price * a for r, a, _ in rows]))
    quarters = summarise(results, price, bins=4, num_resamples=50)["by_position"]
    for parts in (whole["by_position"], quarters, list(whole["by_type"].values())):
        assert sum(part["n"] for part in parts) == len(rows)
        assert sum(part["n"] * part["score"] for part in parts) / len(rows) == pytest.approx(whole["score"])
    for quarter in quarters:  # is made of eighths
        eighths = [e for e in whole["by_position"] if quarter["from"] <= e["from"] < quarter["to"]]
        assert sum(e["n"] * e["advice_rate"] for e in eighths) == pytest.approx(quarter["n"] * quarter["advice_rate"])


def test_interval_resamples_whole_streams() -> None:
    """Within streams all is equal: 16 streams are worth 16 questions, however long they are."""
    rights = np.repeat(np.arange(16)[:, None] % 2, 50, axis=1)
    low, high = summarise(table(rights), 0.3)["score_ci"]
    assert (low, high) == pytest.approx((0.25, 0.75), abs=0.07)  # 1.96 * .5 / sqrt(16)
    singles = summarise(table(rights.reshape(-1, 1)), 0.3)["score_ci"]
    assert high - low > 5 * (singles[1] - singles[0])


def test_interval_depends_on_the_seed_alone() -> None:
    results = table(np.random.default_rng(0).random((12, 10)) < 0.5)
    first, same, other = (summarise(results, 0.3, seed=seed, num_resamples=50)["score_ci"] for seed in (0, 0, 1))
    assert first == same != other


def dependent(
    rng: np.random.Generator, trials: int, lengths: Sequence[int], spread: float, carry: float
) -> NDArray[np.float64]:
    """Latent skill, (trials, questions of all streams): neighbours correlate by `carry`, streams differ by `spread`.

    A question is right if its skill is below a quantile of the normal distribution, so about .6 of all are.
    """
    streams = []
    for length in lengths:
        noise = rng.standard_normal((trials, length)) * np.sqrt(1 - carry**2)
        noise[:, 0] /= np.sqrt(1 - carry**2)
        offset = spread * rng.standard_normal((trials, 1))
        streams.append((offset + lfilter([1], [1, -carry], noise)) / np.sqrt(1 + spread**2))
    return np.concatenate(streams, axis=1)


MANY_SHORT, FEW_LONG, ONE = [10, 14, 18, 30] * 4, [150, 200, 250, 350], [300]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "spread", "macro"),
    [
        (MANY_SHORT, 0.7, False),
        (MANY_SHORT, 0.7, True),
        (FEW_LONG, 0.0, False),
        (FEW_LONG, 0.0, True),
        (ONE, 0.0, True),
    ],
    ids=["many short", "many short, macro", "few long", "few long, macro", "one"],
)
def test_intervals_cover_and_tests_reject_as_often_as_they_say(lengths: list[int], spread: float, macro: bool) -> None:
    """About 95 % of intervals hold the truth; of equally good agents that find the same questions hard, 5 % differ.

    Neighbours in a stream correlate by .6. With 2000 trials each figure has a standard error of .005. Few long streams
    cover .93 to .94 and differ in .06, for a block of dependent questions depends on its neighbours too. What is
    simulated are the arrays inside the two functions, which are asked themselves in the first trial.
    """
    rng, trials, num = np.random.default_rng(7), 2000, 400
    hardness, *own = (dependent(rng, trials, lengths, spread, 0.6) for _ in range(3))
    first, second = (((hardness + skill) / np.sqrt(2) < norm.ppf(0.6)).astype(float) for skill in own)
    asked = [outcome(f"s{s}", i, True, length=n) for s, n in enumerate(lengths) for i in range(n)]
    units, weights = _units(asked), _weights(asked, macro)
    covered = rejected = 0
    for trial, (a, b) in enumerate(zip(first, second, strict=True)):
        means = [float(np.average(values, weights=weights)) for values in (a, a - b)]
        low, high = _interval(means[0], _deviations(units, a, weights, trial, num))
        p = _p(means[1], _deviations(units, a - b, weights, trial, num))
        covered += low <= 0.6 <= high
        rejected += p < 0.05
        if trial == 0:
            left, right = ([replace(o, correct=bool(v)) for o, v in zip(asked, x, strict=True)] for x in (a, b))
            assert summarise(left, 0.3, macro=macro, num_resamples=num)["score_ci"] == [low, high]
            assert paired_difference(left, right, 0.3, macro=macro, num_resamples=num)["p"] == p
    assert 0.93 <= covered / trials <= 0.97, f"covered {covered} of {trials}"
    assert 0.035 <= rejected / trials <= 0.065, f"rejected {rejected} of {trials}"


def test_intervals_of_a_short_stream_cover_too() -> None:
    """20 questions, one stream, .7 of them right: of two blocks alone, one interval in six had no width."""
    rng, ends = np.random.default_rng(5), []
    for _ in range(300):
        ends.append(summarise(table(rng.random((1, 20)) < 0.7), 0.3, num_resamples=300)["score_ci"])
    low, high = np.array(ends).T
    assert np.mean((low <= 0.7) & (high >= 0.7)) > 0.9
    assert np.mean(high - low < 1e-9) < 0.02 and np.mean(high - low) < 0.6  # 1.96 standard errors each way are .4


def test_runs_on_the_same_questions_say_no_more_of_other_questions_than_one() -> None:
    """Four streams played by three runs that do the same: still four streams, not twelve."""
    one = table(np.random.default_rng(3).random((4, 100)) < 0.5)
    three = [replace(o, stream_id=f"run{r}/{o.stream_id}", questions=o.stream_id) for r in range(3) for o in one]
    for macro in (False, True):
        assert summarise(three, 0.3, macro=macro)["score_ci"] == pytest.approx(
            summarise(one, 0.3, macro=macro)["score_ci"]
        )
    unlike = [replace(o, questions=None) for o in three]
    assert summarise(unlike, 0.3)["score_ci"] != pytest.approx(summarise(one, 0.3)["score_ci"])


def test_few_streams_widen_the_interval_by_student_s_t() -> None:
    """10 streams that differ: half the width is t(9) standard errors, where a plain bootstrap gives 1.96 * sqrt(.9)."""
    scores = np.repeat(np.arange(10)[:, None] % 2, 40, axis=1)
    low, high = summarise(table(scores), 0.3, num_resamples=20_000)["score_ci"]
    assert (high - low) / 2 == pytest.approx(2.262 * np.std(scores[:, 0], ddof=1) / np.sqrt(10), rel=0.06)


def test_few_long_streams_differ_without_widening_the_interval() -> None:
    """Fewer than 10 streams are the population: that they differ is no uncertainty about their own mean."""
    for length in (100, 103):  # in blocks of one size or two
        apart = np.repeat(np.arange(4)[:, None] % 2, length, axis=1)
        assert summarise(table(apart), 0.3)["score_ci"] == pytest.approx([0.5, 0.5])
    alone = summarise(table(apart[:, :1]), 0.3)["score_ci"]  # one question each: nothing else to draw from
    assert alone[0] < 0.2 and alone[1] > 0.8


def test_one_question_says_nothing_of_others() -> None:
    right, wrong = ([outcome("s", 0, value, length=1)] for value in (True, False))
    assert summarise(right, 0.3)["score_ci"] == [-np.inf, np.inf]
    assert paired_difference(right, wrong, 0.3) == {"difference": 1.0, "ci": [-np.inf, np.inf], "p": 1.0}
    assert not clears(summarise(right, 0.3), {"score": 0.7})


def test_paired_difference_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    rights = rng.random((12, 10)) < 0.5
    a, b = table(rights), table(np.zeros_like(rights))
    same = paired_difference(a, a[::-1], 0.3)
    assert same == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0}
    better = paired_difference(a, b, 0.3)
    assert better["difference"] == pytest.approx(rights.mean())
    assert 0 < better["ci"][0] < better["difference"] < better["ci"][1]
    assert better["p"] == pytest.approx(1 / 2001)
    worse = paired_difference(b, a, 0.3)
    assert worse["difference"] == -better["difference"]
    assert worse["ci"] == pytest.approx([-q for q in better["ci"][::-1]])


def test_pairing_removes_what_both_sides_share() -> None:
    """`b` is `a` with advice on every question of odd position: the difference is the same in every stream."""
    rights = np.repeat(np.arange(12)[:, None] % 2, 10, axis=1)
    a = table(rights)
    b = [outcome(o.stream_id, o.position, o.correct, o.position % 2 == 1, o.length) for o in a]
    paired = paired_difference(a, b, 0.3)
    assert (paired["difference"], *paired["ci"]) == pytest.approx((0.15, 0.15, 0.15))
    assert np.subtract(*summarise(a, 0.3)["score_ci"][::-1]) > 0.3


def test_paired_test_finds_what_is_there() -> None:
    rng = np.random.default_rng(1)
    skill = rng.uniform(0.3, 0.9, (20, 1))
    a, b = (table(rng.random((20, 10)) < skill + gain) for gain in (0, 0.25))
    assert paired_difference(b, a, 0.3)["p"] < 0.01


def test_paired_difference_refuses_other_questions() -> None:
    a = [outcome("s", i, True) for i in range(4)]
    with pytest.raises(ValueError, match=r"2 questions were answered by one side only, for example \('s', 's/3'\)"):
        paired_difference(a, [*a[:3], outcome("s", 9, True)], 0.3)
    with pytest.raises(ValueError, match="expected each once"):
        paired_difference([a[0], a[0]], [a[0], a[0]], 0.3)
    with pytest.raises(ValueError, match="expected each once"):
        paired_difference([], [], 0.3)
    with pytest.raises(ValueError, match="No outcomes"):
        summarise([], 0.3)
