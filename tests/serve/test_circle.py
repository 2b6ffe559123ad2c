"""What `benchmarks/circle.py` plays: a user asks, an expert answers at the desk and reviews."""

from __future__ import annotations

from pathlib import Path

from agile.serve import accounts
from agile.serve.database import Database
from agile.tasks.minishop import write_minishop
from agile.types import Action
from benchmarks.circle import PASSWORD, SHOPS, Known, play, questions_of
from tests.serve.desk import Counted, an_app, asks_once, running


def test_the_expert_knows_the_shop(tmp_path: Path) -> None:
    write_minishop(tmp_path / "shop", SHOPS["changed"], 1000)
    known = questions_of(tmp_path / "shop")
    assert len(known) == 600 and known[0].is_right(f" {known[0].answer.upper()}")
    returnable = [question.answer for question in known if question.question == "is it returnable ?"]
    assert returnable.count("no") > 2 * returnable.count("yes"), "it is not the shop that it was"


def test_asked_answered_and_reviewed(tmp_path: Path) -> None:
    def decide(context: str) -> Action:
        return Action("PredictAnswer", "yes") if "is it light ?" in context else asks_once(context)

    path = tmp_path / "desk.sqlite"
    database = Database(f"sqlite:///{path}")
    accounts.add_user(database, "shop", "user", PASSWORD)
    accounts.add_user(database, "ann", "expert", PASSWORD)
    warm = Known("p1", "is it warm ?", ("yes",), "wool is warm")
    light = Known("p1", "is it light ?", ("no",), "it is of steel")
    with running(an_app(tmp_path, database, Counted(decide))) as server:
        figures = play(server.url, path, [warm, light, warm], [warm, light], price=0.3)
    assert figures == {
        "questions": 3,
        "advice_rate": 1 / 3,
        "reviewed": 2,
        "reviewed_accuracy": 0.5,
        "failed": 0,
        "accuracy": 2 / 3,
        "score": 2 / 3 - 0.3 / 3,
    }
