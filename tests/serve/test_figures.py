"""Figures by day, and what administrators set there: the price of advice, and the budget of a day."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import update

from agile.serve import figures, questions, requests, reviews, terms
from agile.serve.database import Database
from agile.serve.models import Question, Request
from agile.serve.requests import BudgetSpent
from agile.types import Action
from tests.serve.desk import Counted, Running, an_app, asks_once, open_desk, running

ANN = 2


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    yield open_desk(tmp_path)


def post(database: Database, session: str, question: str, budget: float | None = None, price: float = 0.3) -> int:
    return requests.post(
        database,
        scope="served",
        session_id=session,
        session_key=session,
        question=question,
        group="g",
        product="p1",
        detail={},
        price=price,
        reuse=False,
        budget=budget,
    )


def test_a_day_costs_no_more_than_its_budget(database: Database) -> None:
    first = post(database, "s/1", "is it warm ?", 0.5)
    with pytest.raises(BudgetSpent):  # 0.3 is waited for, 0.6 would be too much
        post(database, "s/2", "is it red ?", 0.5)
    post(database, "s/3", "is it warm ?", 0.5)  # who joins pays nothing
    assert post(database, "s/1", "is it warm ?", 0.0) == first, "after a restart it is the same asker"
    (waiting,) = requests.queue(database, ANN)
    requests.claim(database, waiting.id, ANN, claim_s=60)
    requests.answer(database, waiting.id, ANN, "yes", "", "k")
    with pytest.raises(BudgetSpent):
        post(database, "s/4", "is it red ?", 0.5)
    post(database, "s/4", "is it red ?", 0.6)
    with database.writing() as session:
        session.execute(update(Request).where(Request.status == "answered").values(answered_at=terms.midnight() - 1))
        assert terms.committed(session, "served") == pytest.approx(0.3), "yesterday's answers were of another day"
    post(database, "s/5", "is it big ?", 0.6)


def test_figures_of_each_day(database: Database) -> None:
    noon = terms.midnight() - 12 * 3600
    numbers = []
    for n, advised in enumerate((False, False, False, True)):
        question = questions.ask(database, 1, f"q {n}", "p1").result()
        numbers.append(question.number)
        with database.writing() as session:
            session.execute(
                update(Question)
                .where(Question.number == question.number)
                .values(created_at=noon, finished_at=noon, status="failed" if n == 2 else "answered", advised=advised)
            )
    question = questions.ask(database, 1, "unfinished", "p1").result()
    for n, (verdict, sampled) in enumerate((("right", True), ("wrong", False))):
        (asked,) = [q for q in questions.newest(database) if q.number == numbers[n]]
        found = questions.by_id(database, asked.id)
        assert found is not None
        reviews.review(database, None, found, ANN, verdict, sampled=sampled, key=f"k{n}")  # type: ignore[arg-type]
    for n, wait in enumerate((10.0, 20.0, 60.0)):
        post(database, f"s/{n}", f"is it {n} ?")
        (waiting,) = requests.queue(database, ANN)
        requests.claim(database, waiting.id, ANN, claim_s=60)
        requests.answer(database, waiting.id, ANN, "yes", "", f"k{n}")
        with database.writing() as session:
            session.execute(
                update(Request).where(Request.id == waiting.id).values(created_at=noon - wait, answered_at=noon)
            )
    (day,) = figures.days(database)
    assert day.date == datetime.date.fromtimestamp(noon)
    assert (day.finished, day.failed, day.advice_rate, day.wait_s) == (4, 1, 0.25, 20.0)
    assert day.spent == pytest.approx(0.9) and day.accuracy == reviews.Accuracy(2, 1)
    assert day.sampled_accuracy == reviews.Accuracy(1, 1)
    asked_chart, right, wait_chart, spent = figures.charts([day])
    assert asked_chart.points == ((6.0, figures.HEIGHT - 6 - 0.25 * (figures.HEIGHT - 12)),)
    assert [right.top, wait_chart.top, spent.top] == pytest.approx([100.0, 1 / 3, 0.9])
    assert figures.charts([])[0].points == () and question.number == 5


def asks_always(context: str) -> Action:
    if "no advice" in context:
        return Action("PredictAnswer", "nobody is there")
    return asks_once(context)


def test_administrators_set_the_price_and_the_budget_at_once(tmp_path: Path) -> None:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_always), wait_s=20)) as server:
        root, ann = server.person("root"), server.person("ann")
        assert "One answer of an expert costs 0.3" in ann.client.get("/desk/figures").text
        assert "Nothing was asked yet" in ann.client.get("/desk/figures").text
        assert 'name="price"' not in ann.client.get("/desk/figures").text
        assert ann.send("/desk/figures/terms", price="0.5").status_code == 403
        for price, budget in (
            ("0", ""),
            ("1.5", ""),
            ("nan", ""),
            ("x", ""),
            ("0.5", "-1"),
            ("0.5", "inf"),
            ("0.5", "x"),
        ):
            assert root.send("/desk/figures/terms", price=price, budget=budget).status_code == 422, (price, budget)
        assert root.send("/desk/figures/terms", price="0.5", budget="0").headers["location"].endswith("saved")
        assert ask(server, "is it warm ?") == "nobody is there"
        assert requests.num_waiting(server.database) == 0
        first = questions.session_of(server.database, 1)
        assert first is not None and first.price == 0.5 and first.advice is not None
        assert first.advice.explanation == "the budget of the day is spent" and not first.advised
        root.send("/desk/figures/terms", price="0.25", budget="")
        asking = threading.Thread(target=ask, args=(server, "is it red ?"))
        asking.start()
        ann.answers("yes")
        asking.join(30)
        second = questions.session_of(server.database, 2)
        assert second is not None and second.advice is not None and second.advice.price == 0.25
        page = root.client.get("/desk/figures").text
        assert "price 0.25, no budget" in page and "price 0.5, budget 0" in page and "<circle" in page


def body(question: str) -> dict[str, object]:
    return {"model": "agile/p1", "messages": [{"role": "user", "content": question}]}


def ask(server: Running, question: str) -> str:
    said = httpx2.post(
        f"{server.url}/v1/chat/completions", json=body(question), headers=server.key(), timeout=30
    ).json()
    return str(said["choices"][0]["message"]["content"])
