"""Which figures the guard of PPO lets pass, and what it does about the others."""

from __future__ import annotations

import math
import re

import pytest

from agile.config import GuardConfig, load_config
from agile.errors import AgileError
from agile.stages.guard import Course, Finished, trouble


@pytest.mark.parametrize(
    ("limit", "figures", "reason"),
    [
        ({}, {"kl": 99.0, "entropy": 0.0, "validation/score": -1.0}, None),
        ({"max_kl": 0.5}, {"kl": 0.5}, None),
        ({"max_kl": 0.5}, {"kl": 0.51}, "kl is 0.51, above guard.max_kl=0.5"),
        ({"max_kl": 0.5}, {"kl": math.nan}, "kl is nan, above guard.max_kl=0.5"),
        ({"min_entropy": 0.1}, {"entropy": 0.1}, None),
        ({"min_entropy": 0.1}, {"entropy": 0.09}, "entropy is 0.09, below guard.min_entropy=0.1"),
        ({"max_entropy": 0.1}, {"entropy": 0.1}, None),
        ({"max_entropy": 0.1}, {"entropy": 0.11}, "entropy is 0.11, above guard.max_entropy=0.1"),
        ({"max_entropy": 0.1}, {"entropy": math.nan}, "entropy is nan, above guard.max_entropy=0.1"),
        ({"min_entropy": 0.1, "max_entropy": 2.0}, {"entropy": 1.0}, None),
        ({"min_score": 0.0}, {"validation/score": 0.0}, None),
        ({"min_score": 0.0}, {}, None),
        ({"min_score": -0.5}, {"validation/score": -0.51}, "score is -0.510, below guard.min_score=-0.5"),
        ({"min_score": 0.0}, {"validation/score": math.nan}, "score is nan, below guard.min_score=0"),
        ({"max_score_drop": 0.25}, {"validation/score": 0.5}, None),
        ({"max_score_drop": 0.25}, {}, None),
        ({"max_score_drop": 0.25}, {"validation/score": 0.45}, "score is 0.450, more than .* below its best, 0.750"),
    ],
)
def test_a_limit_is_passed_or_not(limit: dict[str, float], figures: dict[str, float], reason: str | None) -> None:
    found = trouble(GuardConfig.model_validate(limit), figures, best_score=0.75)
    assert found is None if reason is None else re.search(reason, found or "")


def test_the_first_validation_has_nothing_to_fall_from() -> None:
    assert trouble(GuardConfig(max_score_drop=0.1), {"validation/score": -1.0}, None) is None


def test_the_earlier_of_equal_scores_is_the_best() -> None:
    course = Course()
    assert [course.validated(i, score) for i, score in ((1, 0.5), (2, 0.5), (3, 0.6), (4, 0.55))] == [1, 0, 1, 0]
    assert (course.best_step, course.best_score) == (3, 0.6)


def test_it_stops_at_once_or_after_rollbacks(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AgileError, match=r"Iteration 7 was stopped by the guard: kl is 2. .*--resume"):
        Course().respond(GuardConfig(), 7, "kl is 2")
    course = Course(good_step=5)
    guard = GuardConfig(action="rollback", max_rollbacks=1)
    course.respond(guard, 7, "kl is 2")
    assert "Iteration 7: kl is 2. Rolled back to the weights of iteration 5 (rollback 1 of at most 1)" in caplog.text
    with pytest.raises(AgileError, match=r"Iteration 9 .* after guard.max_rollbacks=1 rollbacks: kl is 2"):
        course.respond(guard, 9, "kl is 2")


def test_it_ends_training_where_there_is_a_best_agent(caplog: pytest.LogCaptureFixture) -> None:
    guard = GuardConfig(action="finish")
    with pytest.raises(AgileError, match="Iteration 7"):
        Course().respond(guard, 7, "kl is 2")
    with pytest.raises(Finished):
        Course(best_step=0, best_score=0.5).respond(guard, 1, "kl is 2")
    assert "PPO ends at iteration 1: kl is 2. Kept is iteration 0." in caplog.text


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["guard.action=finish", "validation.every=1"], r"select_best is false; set validation.select_best=true"),
        (["validation.start=true"], r"start is true, but every is 0"),
        (["guard.max_kl=0.1", "ppo.kl_coef=0"], r"guard.max_kl .* ppo.kl_coef is 0"),
        (["guard.max_score_drop=0.1"], r"max_score_drop .* set validation.every=1"),
        (["guard.min_score=0.1"], r"guard.min_score is set, .* set validation.every=1"),
        (["guard.min_entropy=0.2", "guard.max_entropy=0.2"], r"min_entropy 0.2 is not below max_entropy 0.2"),
        (["stages=[sft]", "guard.max_entropy=0.1"], r"guard.max_entropy watch over PPO, but stages has no ppo"),
        (["stages=[sft]", "guard.min_score=0.1"], r"guard.min_score watch over PPO, but stages has no ppo"),
        (["guard.action=rollback", "rollout.lag=1"], r"set rollout.lag=0 or guard.action=stop"),
        (["validation.select_best=true"], r"set validation.every=1"),
    ],
)
def test_a_guard_that_would_see_nothing_is_refused(overrides: list[str], remedy: str) -> None:
    with pytest.raises(AgileError, match=remedy):
        load_config(None, overrides)
