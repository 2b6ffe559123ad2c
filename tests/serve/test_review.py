"""Answers of the agent's own are reviewed: least sure first, once, with history; a correction is remembered at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

import agile.serve
from agile.serve import accounts, questions, reviews
from agile.serve.database import Database
from agile.serve.reviews import Accuracy
from agile.types import Action, Completion
from tests.serve.desk import PASSWORD, Counted, Running, an_app, asks_once, empty_database, open_desk, running
from tests.worlds import make_codec

SURE = {"is it red ?": -0.1, "is it warm ?": -2.0, "is it big ?": -0.7}


def recalls(context: str) -> Action:
    """What memory says of the very question, else yes."""
    said = context.rsplit("->", 1)[1].split("\n")[0].strip() if "history 1.00 same" in context else "yes"
    return Action("PredictAnswer", said)


class Doubtful(Counted):
    """As sure of its answers as `SURE` says."""

    async def complete(self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Any, seed: int) -> Completion:
        said = await super().complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)
        context = make_codec().conversation(prompt_ids)
        last = next((logprob for question, logprob in SURE.items() if question in context), 0.0)
        return replace(said, logprobs=(*said.logprobs[:-1], last))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(an_app(tmp_path, open_desk(tmp_path), Doubtful(recalls))) as server:
        yield server


def ask(server: Running, question: str) -> str:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": question}]}
    said = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=20).json()
    return str(said["choices"][0]["message"]["content"])


def listed(server: Running, order: str) -> list[str]:
    return [a.question for a in reviews.own_answers(server.database, order)]


def test_least_sure_first_and_each_once(server: Running) -> None:
    for question in SURE:
        assert ask(server, question) == "yes"
    assert listed(server, "unsure") == ["is it warm ?", "is it big ?", "is it red ?"]
    assert sorted(listed(server, "sample")) == sorted(SURE) and reviews.num_left(server.database) == 3
    ann, bob = server.person("ann"), server.person("bob")
    page = ann.client.get("/desk/review").text
    assert "14 % sure" in page and page.index("is it warm") < page.index("is it red")

    first, second, third = reviews.own_answers(server.database, "unsure")
    said = ann.send(f"/desk/review/{first.id}", verdict="right", key="k1")
    assert said.headers["location"] == "/desk/review?order=unsure&said=right"
    again = ann.send(f"/desk/review/{first.id}", verdict="wrong", key="k1")
    assert again.headers["location"].endswith("said=again"), "the same form sent twice"
    bob.send(f"/desk/review/{second.id}", verdict="wrong", key="k2", order="sample", explanation="it is small")
    assert ann.send(f"/desk/review/{third.id}", verdict="corrected", key="k3").headers["location"].endswith("empty")
    assert listed(server, "unsure") == ["is it red ?"] and listed(server, "done") == ["is it big ?", "is it warm ?"]
    assert reviews.accuracy(server.database, sampled=False) == Accuracy(2, 1)
    assert reviews.accuracy(server.database, sampled=True) == Accuracy(1, 0)

    ann.send(f"/desk/review/{second.id}", verdict="right", key="k4")
    (word, before) = reviews.own_answers(server.database, "done")[0].words
    assert (word.verdict, word.user, before.verdict, before.user) == ("right", "ann", "wrong", "bob")
    assert "it is small" in ann.client.get("/desk/review?order=done").text
    assert "it is small" in ann.client.get(f"/desk/sessions/{second.id}").text
    metrics = httpx2.get(f"{server.url}/metrics", headers=server.key("root")).text
    assert 'agile_reviews_total{verdict="right"} 2.0' in metrics
    assert 'agile_review_accuracy{answers="all"} 1.0' in metrics
    assert len(server.app.state.desk.memory) == 0, "only a correction is remembered"


def test_a_correction_is_memory_at_once_and_can_be_corrected(server: Running) -> None:
    assert ask(server, "is it warm ?") == "yes"
    ann, memory = server.person("ann"), server.app.state.desk.memory
    (answer,) = reviews.own_answers(server.database, "unsure")

    def say(verdict: str, key: str, **more: str) -> None:
        assert ann.send(f"/desk/review/{answer.id}", verdict=verdict, key=key, **more).status_code == 303

    def known() -> dict[str, tuple[str, bool]]:
        return {entry.text: (entry.origin, retired) for entry, retired, _ in memory.search("")}

    say("corrected", "k1", answer=" no ", explanation="it is thin")
    (entry,) = memory.search("")[0][:1]
    assert (entry.text, entry.session_id, entry.answer) == ("is it warm ? -> no", "served/1", "no")
    assert ask(server, "is it warm ?") == "no"
    assert reviews.use_of(server.database, entry.id) == (1, Accuracy(0, 0))
    (second,) = [a for a in reviews.own_answers(server.database, "unsure") if a.number == 2]
    assert [text for _, text, _ in second.retrieved] == ["is it warm ? -> no"]
    ann.send(f"/desk/review/{second.id}", verdict="right", key="of the second")
    assert reviews.use_of(server.database, entry.id) == (1, Accuracy(1, 1))
    assert (
        "Shown to 1 finished session; of 1 of their answers that were reviewed 1 is right"
        in ann.client.get(f"/desk/memory/{entry.id}").text
    )

    say("wrong", "k2", answer="a little")  # wrong with an answer is a correction
    assert known() == {"is it warm ? -> no": ("review", True), "is it warm ? -> a little": ("review", False)}
    say("corrected", "k3", answer="YES")  # what the agent had said
    assert known()["is it warm ? -> yes"] == ("review", False) and known()["is it warm ? -> a little"][1]
    say("wrong", "k4")
    assert all(retired for _, retired in known().values()), "nobody knows what is right"
    words = [w.verdict for w in reviews.history(server.database, [1])[1]]
    assert words == ["wrong", "right", "corrected", "corrected"]
    changes = memory.entry(entry.id)[2]
    assert [(c.action, c.user) for c in changes] == [("retired", "ann"), ("written", "the agent")]


def test_what_an_expert_said_is_not_for_review(server: Running) -> None:
    server.app.state.desk.runner.served.policy.decide = asks_once
    asking = threading.Thread(target=ask, args=(server, "is it red ?"))
    asking.start()
    ann = server.person("ann")
    ann.answers("no")
    asking.join(20)
    (asked,) = questions.newest(server.database)
    assert asked.status == "answered" and reviews.own_answers(server.database, "unsure") == []
    assert ann.send(f"/desk/review/{asked.id}", verdict="right", key="k").status_code == 404
    assert ann.send(f"/desk/review/{asked.id}", verdict="odd", key="k").status_code == 422


def test_a_database_of_before_is_brought_up_to_date(tmp_path: Path) -> None:
    url = empty_database(tmp_path)
    with running(an_app(tmp_path, Database(url), Counted(recalls))) as server:
        accounts.add_user(server.database, "cust", "user", PASSWORD)
        assert ask(server, "is it red ?") == "yes"
        database = server.database
    config = Config()
    config.set_main_option("script_location", str(Path(agile.serve.__file__).parent / "migrations"))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "v0001")
        assert "advised" not in connection.execute(text("SELECT * FROM questions")).keys()  # noqa: SIM118
    database.close()
    (answer,) = reviews.own_answers(Database(url), "unsure")
    assert (answer.question, answer.answer, answer.confidence) == ("is it red ?", "yes", None)
