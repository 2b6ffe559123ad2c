"""Follow-up questions: experts see what was said before, the model where its config says so, memory keeps it whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agile.agents.product_qa import ProductQAAgent
from agile.config import RunConfig
from agile.experts import who_always_asks
from agile.serve import export, questions
from agile.serve.runner import Served
from agile.serve.server import make_app
from agile.subjects import subjects
from agile.tasks.medmcqa import MedMCQA
from tests.agents.test_multiple_choice import executor as choosing
from tests.serve.desk import ENCODER, PRODUCTS, Counted, Running, asks_once, open_desk, running, until
from tests.tasks.test_medmcqa import ROW, write
from tests.worlds import make_executor

BEFORE = [("user", "is p1 washable ?"), ("assistant", "yes"), ("user", "and the red <i> one ?")]
FULL = "is p1 washable ? and the red <i> one ?"


def serve(folder: Path, agent: ProductQAAgent) -> Any:
    served = Served("agile", "ppo", make_executor(agent), Counted(asks_once), PRODUCTS, 0)
    return make_app(RunConfig(serve={"wait_s": 0}), folder, open_desk(folder), served, ENCODER)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(serve(tmp_path, ProductQAAgent(show_schema=False))) as server:
        yield server


def ask(server: Running, turns: list[tuple[str, str]], **more: Any) -> str:
    messages = [{"role": "system", "content": "Be rude."}, *({"role": r, "content": t} for r, t in turns)]
    body = {"model": "agile/p1", "messages": messages, **more}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["agile"]["answer_id"])


def answered(server: Running, asked: str) -> str:
    """The text of the session, when it is over."""
    until(lambda: ((q := questions.by_id(server.database, asked)) is not None and q.status == "answered") or None)
    question = questions.by_id(server.database, asked)
    assert question is not None
    session = questions.session_of(server.database, question.number)
    assert session is not None
    codec = server.app.state.desk.runner.served.executor.codec
    return " ".join(codec.decode(segment.token_ids) for segment in session.segments)


def test_experts_see_the_conversation_and_the_model_does_not(server: Running) -> None:
    ann = server.person("ann")
    asked = ask(server, BEFORE)
    until(lambda: ann.waiting() or None)
    alone = ask(server, BEFORE[-1:])
    until(lambda: len(ann.waiting()) == 2 or None)  # the same words mean something else by themselves
    page = ann.client.get("/desk/queue").text
    assert "<dd>is p1 washable ?</dd>" in page and "and the red &lt;i&gt; one ?" in page and "Be rude" not in page
    ann.answers("red is fine")
    assert "user: is p1" not in answered(server, asked)
    memory = server.app.state.desk.memory
    assert [entry.text for entry, _, _ in memory.search("")] == [f"{FULL} -> red is fine"]
    assert questions.by_id(server.database, alone).status == "waiting"  # type: ignore[union-attr]
    said = export.words(server.database)
    assert set(said) == {export.about("p1", FULL)}, "what was said holds for this conversation alone"


def test_the_model_is_shown_as_many_turns_as_its_config_says(tmp_path: Path) -> None:
    agent = ProductQAAgent(show_schema=False, show_turns=2)
    item = PRODUCTS["p1"]
    with running(serve(tmp_path, agent)) as server:
        asked = ask(server, BEFORE)
        server.person("ann").answers("red is fine")
        played = " ".join(answered(server, asked).split())
        assert "user: is p1 washable ? agent: yes question: and the red" in played
        again = ask(server, BEFORE)  # memory answers, for it is searched by the whole conversation
        assert "SeekAdvice" not in answered(server, again)
    assert "user:" not in agent.question(item, 0.0, 0.3)


def test_what_was_said_before_is_cut_and_one_line_each(server: Running) -> None:
    ann = server.person("ann")
    long = ("user", "x" * 4000)
    ask(server, [long, ("assistant", "two\nlines"), ("user", "and ?")])
    until(lambda: ann.waiting() or None)
    page = ann.client.get("/desk/queue").text
    assert "two lines" in page and "xxxx" not in page


def test_an_agent_that_chooses_is_given_options(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", ROW)
    known = subjects(MedMCQA(tmp_path), "medmcqa")
    runner = choosing()
    served = Served("agile", "ppo", runner, who_always_asks(runner.codec, PRODUCTS["p1"]), known, 0)
    with running(make_app(RunConfig(serve={"wait_s": 0}), tmp_path, open_desk(tmp_path), served, ENCODER)) as server:
        messages = [{"role": "user", "content": "Which dissolves in water?"}]
        body: dict[str, Any] = {"model": "agile", "messages": messages, "metadata": {"A": "Vitamin A"}}
        url, headers = f"{server.url}/v1/chat/completions", server.key()
        few = httpx2.post(url, json=body, headers=headers)
        assert few.status_code == 400 and "two or more" in few.json()["error"]["message"]
        body["metadata"]["B"] = "Vitamin C"
        asked = httpx2.post(url, json=body, headers=headers).json()["agile"]["answer_id"]
        ann = server.person("ann")
        until(lambda: ann.waiting() or None)
        assert "<dt>B</dt><dd>Vitamin C</dd>" in ann.client.get("/desk/queue").text
        httpx2.post(url, json={**body, "metadata": {"A": "Vitamin C", "B": "Vitamin K"}}, headers=headers)
        until(lambda: len(ann.waiting()) == 2 or None)  # the same words, but B is another
        ann.answers("B")
        assert "Vitamin A" in answered(server, asked)
        question = questions.by_id(server.database, asked)
        assert question is not None and question.answer == "B"
        assert server.app.state.desk.memory.search("")[0][0].answer == "Vitamin C"
