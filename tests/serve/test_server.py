"""A server that listens: clients ask, experts answer, the agent remembers; restarts lose nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from agile.serve import questions, requests
from agile.serve.runner import LOG
from agile.session_log import read_lines
from agile.types import Action, Completion
from tests.serve.desk import Counted, Running, an_app, asks_once, open_desk, running, served, until
from tests.worlds import make_codec

QUESTION = "is it warm ?"


def client(server: Running) -> openai.OpenAI:
    key = server.key()["authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(server: Running, **body: object) -> httpx2.Response:
    given = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}], **body}
    return httpx2.post(f"{server.url}/v1/chat/completions", json=given, headers=server.key())


def test_openai_client_asks_an_expert_answers_and_memory_keeps_it(server: Running) -> None:
    api, ann = client(server), server.person("ann")
    assert [model.id for model in api.models.list()] == ["agile", "agile/p1", "agile/p2"]
    messages: Any = [{"role": "user", "content": QUESTION}]
    first = api.chat.completions.create(model="agile/p1", messages=messages)
    answer_id = (first.model_extra or {})["agile"]["answer_id"]
    assert f"GET /v1/answers/{answer_id}" in (first.choices[0].message.content or "")
    page = until(lambda: (QUESTION in (seen := ann.client.get("/desk/queue").text) and seen) or None)
    assert "maybe, 100 % sure" in page and "red" in page
    assert answer(server, answer_id)["status"] == "waiting"
    answering = threading.Thread(target=ann.answers, args=("yes", "wool is warm"))
    answering.start()  # before or after the next line: nobody is asked again
    stream = api.chat.completions.create(model="agile/p1", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "yes"
    answering.join()

    told = until(lambda: ((a := answer(server, answer_id))["status"] == "answered" and a) or None)
    assert told["answer"] == "yes"
    again = api.chat.completions.create(
        model="agile",
        messages=messages,
        metadata={"product": "p1"},
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = again
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "yes" and ann.waiting() == []
    assert last.usage is not None and last.usage.completion_tokens > 0
    assert len(server.app.state.desk.memory) == 1, "two sessions that were told together remember it once"
    assert httpx2.get(f"{server.url}/v1/answers/{answer_id}", headers=server.key("ann")).status_code == 404


def answer(server: Running, answer_id: str) -> dict[str, str]:
    found: dict[str, str] = httpx2.get(f"{server.url}/v1/answers/{answer_id}", headers=server.key()).json()
    return found


def test_a_stream_says_what_is_waited_for(server: Running) -> None:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    url = f"{server.url}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, headers=server.key()) as stream:
        comments = (line for line in stream.iter_lines() if line.startswith(":"))
        assert any(line.startswith(": an expert has been asked") for line in comments)
        assert next(comments) == ": waiting"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": "agile/p9"}, 404, "model"),
        ({"model": "agile"}, 400, "metadata.product"),
        ({"model": "agile", "metadata": {"product": "p9"}}, 400, "metadata.product"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "messages"),
        ({"messages": "x"}, 400, "messages"),
        ({"n": 3}, 400, "n"),
    ],
)
def test_bad_requests_are_told_in_openais_shape(
    shared: Running, change: dict[str, object], status: int, param: str | None
) -> None:
    answer = ask(shared, **change)
    error = answer.json()["error"]
    assert answer.status_code == status and error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("shared")
    with running(an_app(folder, open_desk(folder), Counted(asks_once))) as server:
        yield server


def test_bodies_that_are_no_json_or_too_long(shared: Running) -> None:
    url, key = f"{shared.url}/v1/chat/completions", shared.key()
    for body in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null"):
        told = httpx2.post(url, content=body, headers={**key, "content-type": "application/json"})
        assert told.status_code == 400 and "error" in told.json(), body[:9]
    assert httpx2.post(url, content=b"x" * 1_000_000, headers=key).status_code == 413
    chunked = httpx2.post(url, content=(b"x" * 100_000 for _ in range(5)), headers=key)
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "too_large"
    assert httpx2.post(url, json={}, headers={"authorization": "Bearer no"}).status_code == 401
    assert httpx2.get(f"{shared.url}/v1/nothing", headers=key).json()["error"]["message"] == "Not Found"


def searches_then_asks(context: str) -> Action:
    if "[SearchProduct]" not in context:
        return Action("SearchProduct", "SELECT 1")
    return asks_once(context)


def test_a_session_that_waits_goes_on_after_a_restart_from_what_it_has(tmp_path: Path) -> None:
    first, second = Counted(searches_then_asks), Counted(searches_then_asks)
    with running(an_app(tmp_path, open_desk(tmp_path), first, wait_s=0)) as server:
        asked = ask(server).json()["agile"]
        until(lambda: requests.num_waiting(server.database) or None)
        assert first.calls == 2
        (before,) = requests.queue(server.database, 2)
    with running(an_app(tmp_path, open_desk(tmp_path), second)) as server:
        (after,) = requests.queue(server.database, 2)
        assert after.id == before.id and len(after.asked) == 1
        server.person("ann").answers("yes")
        told = until(lambda: ((a := answer(server, asked["answer_id"]))["status"] == "answered" and a) or None)
        assert told["answer"] == "yes"
        assert second.calls == 2, "reflection and answer: what was sampled before is not sampled again"
        played = questions.session_of(server.database, 1)
        assert played is not None and [step.action.name for step in played.steps][2:4] == [
            "SearchProduct",
            "SeekAdvice",
        ]
        (logged,) = until(lambda: list(read_lines(tmp_path / LOG)) or None)
        assert logged["session"]["id"] == "served/1" and logged["agent"] == "ppo"
        with server.database.reading() as session:
            assert session.connection().exec_driver_sql("SELECT count(*) FROM journal").scalar() == 0


class Slow(Counted):
    """Reflects only once it may."""

    def __init__(self) -> None:
        super().__init__(asks_once)
        self.may = threading.Event()

    async def complete(self, prompt_ids: Sequence[int], **given: Any) -> Completion:
        if make_codec().awaited(prompt_ids) == "Reflection":
            await asyncio.to_thread(self.may.wait)
        return await super().complete(prompt_ids, **given)


def test_who_asks_while_an_answer_is_on_its_way_to_memory_is_told_it(tmp_path: Path) -> None:
    policy = Slow()
    with running(an_app(tmp_path, open_desk(tmp_path), policy, wait_s=0)) as server:
        first = ask(server).json()["agile"]["answer_id"]
        server.person("ann").answers("yes")
        second = ask(server).json()["agile"]["answer_id"]

        def told() -> bool | None:
            with server.database.reading() as session:
                status = session.connection().exec_driver_sql("SELECT status FROM askers").scalars().all()
            return status == ["told", "told"] or None

        until(told)
        assert len(server.app.state.desk.memory) == 0 and requests.num_waiting(server.database) == 0
        policy.may.set()
        for asked in (first, second):
            assert until(lambda: answer(server, asked)["answer"] or None) == "yes"  # noqa: B023
        assert len(server.app.state.desk.memory) == 1


def test_a_log_that_a_crash_cut_is_made_whole(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with running(
            an_app(tmp_path, open_desk(tmp_path), Counted(lambda _: Action("PredictAnswer", "yes")))
        ) as server:
            assert ask(server).json()["choices"][0]["message"]["content"] == "yes", name
        with (tmp_path / LOG).open("r+b") as log:
            log.truncate(len(log.read()) - 7)
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once))):
        ids = [record["session"]["id"] for record in read_lines(tmp_path / LOG)]
    assert sorted(ids) == ["served/1", "served/2"]


def test_a_session_that_fails_is_told_as_it_is(tmp_path: Path) -> None:
    def broken(context: str) -> Action:
        raise RuntimeError("no weights")

    with running(an_app(tmp_path, open_desk(tmp_path), Counted(broken))) as server:
        said = ask(server).json()
        assert said["choices"][0]["message"]["content"] == "The agent came to no answer."
        assert said["agile"]["status"] == "failed"
        assert json.loads(httpx2.get(f"{server.url}/healthz").text) == {"status": "ok"}


def test_what_an_expert_said_outlives_the_session_that_fails_on_it(tmp_path: Path) -> None:
    def breaks(context: str) -> Action:
        if "answer:" in context and "history 1.00 same" not in context:
            raise RuntimeError("no weights")
        return asks_once(context)

    with running(an_app(tmp_path, open_desk(tmp_path), Counted(breaks), wait_s=0)) as server:
        first = ask(server).json()["agile"]["answer_id"]
        server.person("ann").answers("yes")
        assert until(lambda: answer(server, first)["answer"] or None) == "yes"
        again = ask(server).json()["agile"]["answer_id"]
        assert until(lambda: answer(server, again)["answer"] or None) == "yes"
        assert len(server.app.state.desk.memory) == 1 and requests.num_waiting(server.database) == 0


def test_metrics_and_limits(tmp_path: Path) -> None:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once), requests_per_minute=2, wait_s=0)) as server:
        assert [ask(server).status_code for _ in range(3)] == [200, 200, 429]
        until(lambda: requests.num_waiting(server.database) or None)
        text = httpx2.get(f"{server.url}/metrics", headers=server.key("root")).text
        assert "agile_questions_total 2.0" in text and "agile_queue_length 1.0" in text


def test_a_long_queue_shows_its_oldest(server: Running) -> None:
    given = {"scope": "served", "group": "shop", "product": "p1", "detail": {}, "price": 0.3, "reuse": False}
    for n in range(53):
        requests.post(server.database, session_id="s", session_key=f"s{n}", question=f"is it {n} ?", **given)  # type: ignore[arg-type]
    ann = server.person("ann")
    assert len(ann.waiting()) == 50
    page = ann.client.get("/desk/queue/list").text
    assert 'data-number="53"' in page and "3 more wait" in page and "is it 0 ?" in page and "is it 52 ?" not in page


def test_an_answer_that_comes_too_late_is_remembered(server: Running) -> None:
    given = {"scope": "served", "group": "shop", "product": "p1", "detail": {}, "price": 0.3, "reuse": False}
    asker = requests.post(server.database, session_id="s", session_key="s", question=QUESTION, **given)  # type: ignore[arg-type]
    ann = server.person("ann")
    (request,) = ann.waiting()
    ann.send(f"/desk/requests/{request}/claim")
    assert requests.expire(server.database, asker)
    late = ann.send(f"/desk/requests/{request}/answer", answer="yes", key="k")
    assert late.headers["location"].endswith("late")
    (entry,) = server.app.state.desk.memory.search("")
    assert entry[0].text == f"{QUESTION} -> yes"


class Closable(Counted):
    """Says whose it is, and nothing once it is closed."""

    closed = False

    def __init__(self, name: str) -> None:
        super().__init__(lambda _: Action("PredictAnswer", name))

    async def complete(self, prompt_ids: Sequence[int], **given: Any) -> Completion:
        await asyncio.sleep(0)  # others get their turn in the middle of a session
        assert not self.closed, "an agent was closed before its sessions had ended"
        return await super().complete(prompt_ids, **given)

    def close(self) -> None:
        self.closed = True


def test_agents_are_swapped_while_many_ask(tmp_path: Path) -> None:
    policies = [Closable("no")]
    with running(an_app(tmp_path, open_desk(tmp_path), policies[0])) as server:
        runner, key, said = server.app.state.desk.runner, server.key(), list[str]()
        body = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}]}

        def asks() -> None:
            with httpx2.Client(headers=key, timeout=60) as user:
                for _ in range(10):
                    told = user.post(f"{server.url}/v1/chat/completions", json=body).json()
                    said.append(told["choices"][0]["message"]["content"])

        users = [threading.Thread(target=asks) for _ in range(8)]
        for user in users:
            user.start()
        for number in range(1, 8):
            until(lambda: len(said) >= 10 * number or None)  # noqa: B023
            policies.append(Closable("yes" if number % 2 else "no"))
            runner.swap(served(policies[-1]))
        for user in users:
            user.join()
        assert len(said) == 80 and set(said) == {"yes", "no"}
        until(lambda: all(policy.closed for policy in policies[:-1]) or None)
        assert not policies[-1].closed
