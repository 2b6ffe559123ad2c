"""Answers are told to webhooks, tried again where that fails, and never inside the own network unless it is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from agile.serve import requests, webhooks
from agile.serve.models import Webhook
from agile.types import Action
from tests.serve.desk import Counted, Running, an_app, asks_once, open_desk, running, until


@dataclass
class Ear:
    """A server that notes what it is told, and answers with these codes, the last one for ever."""

    codes: list[int]
    heard: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def ear() -> Iterator[Ear]:
    ear = Ear([200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ear.heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(ear.codes.pop(0) if len(ear.codes) > 1 else ear.codes[0])
            self.send_header("location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ear.url = f"http://127.0.0.1:{server.server_port}/told?x=1"
    yield ear
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.serve.app.TELL_LOOK_S", 0.02)


def ask(server: Running, question: str, url: str) -> httpx2.Response:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": question}], "metadata": {"webhook": url}}
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=30)


@pytest.mark.slow
def test_an_answer_is_told_when_it_is_there_and_again_where_that_failed(
    tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "DELAYS_S", (0.05, 0.05))
    ear.codes = [500, 302, 204]
    app = an_app(tmp_path, open_desk(tmp_path), Counted(asks_once), wait_s=0, webhook_hosts=["127.0.0.1"])
    with running(app) as server:
        asked = ask(server, "is it warm ?", ear.url).json()["agile"]["answer_id"]
        until(lambda: requests.num_waiting(server.database) or None)
        assert ear.heard == [], "there is no answer yet"
        ann = server.person("ann")
        ann.answers("yes")
        until(lambda: len(ear.heard) == 3 or None)
        assert all(h["id"] == asked and h["status"] == "answered" and h["answer"] == "yes" for h in ear.heard)
        until(lambda: states(server) == [("delivered", 3, "")] or None)

        ear.codes = [500]
        ask(server, "is it red ?", ear.url)
        ann.answers("no")
        until(lambda: states(server)[0][0] == "failed" or None)
        assert states(server)[0] == ("failed", 3, "127.0.0.1 answered with 500")
        page = ann.client.get("/desk/sessions").text
        assert "given up after 3 tries" in page and "answered with 500" in page
        ear.codes = [200]
        assert ann.send("/desk/webhooks/2/again").headers["location"] == "/desk/sessions"
        until(lambda: states(server)[0][0] == "delivered" or None)
        assert ann.send("/desk/webhooks/2/again").headers["location"].endswith("gone")
        assert "did not work" not in ann.client.get("/desk/sessions").text
        metrics = httpx2.get(f"{server.url}/metrics", headers=server.key("root")).text
        assert 'agile_webhooks_total{state="delivered"} 2.0' in metrics


def states(server: Running) -> list[tuple[str, int, str]]:
    return [(w.state, w.attempts, w.error) for w in webhooks.of(server.database, [1, 2])]


def test_who_stopped_waiting_is_told_what_the_expert_said(tmp_path: Path, ear: Ear) -> None:
    policy = Counted(lambda _: Action("PredictAnswer", "maybe"))
    with running(an_app(tmp_path, open_desk(tmp_path), policy, webhook_hosts=["127.0.0.1"])) as server:
        ann = server.person("ann")
        ask(server, "is it warm ?", ear.url)
        until(lambda: ear.heard or None)
        # as if the session had asked, and had gone on when nobody answered in time
        given = {"scope": "served", "group": "shop", "product": "p1", "detail": {}, "price": 0.3, "reuse": False}
        asker = requests.post(
            server.database,
            session_id="served/1",
            session_key="k",
            question="is it warm ?",
            **given,  # type: ignore[arg-type]
        )
        (request,) = ann.waiting()
        ann.send(f"/desk/requests/{request}/claim")
        assert requests.expire(server.database, asker)
        ann.send(f"/desk/requests/{request}/answer", answer="yes", key="k")
        until(lambda: len(ear.heard) == 2 or None)
        first, second = ear.heard
        assert first["answer"] == second["answer"] == "maybe"
        assert "late_answer" not in first and second["late_answer"] == "yes"


def test_the_own_network_is_not_reached(tmp_path: Path, ear: Ear) -> None:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(lambda _: Action("PredictAnswer", "yes")))) as server:
        for url in ("file:///etc/passwd", "ftp://x/", "https://", "http://a:b@x/", "http://x/ y", "http://[x", "x"):
            told = ask(server, "is it red ?", url)
            assert told.status_code == 400 and told.json()["error"]["param"] == "metadata.webhook", url
        assert ask(server, "is it red ?", ear.url).status_code == 200
        until(lambda: [w for w in webhooks.troubled(server.database) if "own network" in w.error] or None)
        assert ear.heard == []
        with server.database.writing() as session:
            session.execute(update(Webhook).values(url="http://localhost:1/"))
    assert "own network" in webhooks.send("http://localhost:1/", {}, ())
    assert "ConnectError" in webhooks.send("http://localhost:1/", {}, ("localhost",))
    assert "not known" in webhooks.send("http://no-such-host.invalid/", {}, ())
