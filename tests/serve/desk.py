"""What tests of the server share: a desk of scripted agents on a temporary database, and people who use it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from sqlalchemy import create_engine

from agile.config import RunConfig
from agile.memory.encoders import CachedEncoder, HashingEncoder
from agile.policies.scripted import ScriptedPolicy
from agile.serve import accounts
from agile.serve.database import Database
from agile.serve.runner import Served
from agile.serve.server import make_app
from agile.types import Action, Completion
from tests.worlds import item, make_codec, make_executor

PASSWORD = "correct horse"
PEOPLE = {"cust": "user", "ann": "expert", "bob": "expert", "root": "administrator"}
ENCODER = CachedEncoder(HashingEncoder())
PRODUCTS = {name: replace(item(), id="", question="", answer="", product=name) for name in ("p1", "p2")}


def asks_once(context: str) -> Action:
    """Say what memory or the expert said, else ask; reflect nothing."""
    if context.rstrip().endswith("[Reflection]"):
        return Action("Reflection", "none")
    if "answer:" in context:
        return Action("PredictAnswer", context.rsplit("answer:", 1)[1].split("\n")[0].strip())
    if "history 1.00 same" in context:
        return Action("PredictAnswer", context.rsplit("->", 1)[1].split("\n")[0].strip())
    return Action("SeekAdvice")


@dataclass(slots=True)
class Counted:
    """A scripted policy that counts its calls, without those that ask what it would have answered."""

    decide: Callable[[str], Action]
    calls: int = 0

    async def complete(self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Any, seed: int) -> Completion:
        codec = make_codec()
        forced = codec.awaited(prompt_ids) == "PredictAnswer"
        if forced and "[SeekAdvice]" not in codec.conversation(prompt_ids):
            decide: Callable[[str], Action] = _maybe
        else:
            self.calls += 1
            decide = self.decide
        return await ScriptedPolicy(codec, decide).complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)


def _maybe(context: str) -> Action:
    return Action("PredictAnswer", "maybe")


def empty_database(folder: Path) -> str:
    """The URL of a new database; AGILE_DESK_URL names one of PostgreSQL, which is emptied."""
    if url := os.environ.get("AGILE_DESK_URL"):
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        engine.dispose()
        return url
    return f"sqlite:///{folder / 'desk.sqlite'}"


def open_desk(folder: Path, people: Mapping[str, str] = PEOPLE) -> Database:
    """A database with accounts; the same one again for the same folder."""
    url = folder / "url"
    if not url.exists():
        url.write_text(empty_database(folder))
    database = Database(url.read_text())
    known = {user.name for user in accounts.users(database)}
    for name, role in people.items():
        if name not in known:
            accounts.add_user(database, name, role, PASSWORD)
    return database


def served(policy: Counted, **parts: Any) -> Served:
    return Served("agile", "ppo", make_executor(**parts), policy, PRODUCTS, 0)


def an_app(folder: Path, database: Database, policy: Counted, **serve: Any) -> FastAPI:
    options = {"wait_s": 30, "keep_alive_s": 0.1, **serve}
    return make_app(RunConfig(serve=options), folder, database, served(policy), ENCODER)


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    url: str
    database: Database
    app: FastAPI

    def key(self, name: str = "cust") -> dict[str, str]:
        """The header of a new API key."""
        return {"authorization": f"Bearer {accounts.add_key(self.database, name)}"}

    def person(self, name: str) -> Person:
        """Somebody who has logged in."""
        person = Person(httpx2.Client(base_url=self.url))
        answer = person.log_in(name, PASSWORD)
        assert answer.status_code == 303, answer.text
        return person


@dataclass(frozen=True)
class Person:
    """A browser without a screen."""

    client: httpx2.Client

    def log_in(self, name: str, password: str) -> httpx2.Response:
        token = found(r'name="token" value="([^"]+)"', self.client.get("/login").text)
        return self.client.post("/login", data={"name": name, "password": password, "token": token})

    def send(self, path: str, **form: str) -> httpx2.Response:
        csrf = found(r'name="csrf" value="([^"]+)"', self.client.get("/desk/memory").text)
        return self.client.post(path, data={"csrf": csrf, **form})

    def waiting(self) -> list[str]:
        """Ids of the questions that this expert can claim or has claimed."""
        page = self.client.get("/desk/queue").text
        return list(dict.fromkeys(re.findall(r"/desk/requests/(\w+)/", page)))

    def answers(self, text: str, why: str = "") -> None:
        """Wait for a question, claim it, answer it."""
        request = until(lambda: next(iter(self.waiting()), None))
        assert self.send(f"/desk/requests/{request}/claim").headers["location"] == "/desk/queue"
        said = self.send(f"/desk/requests/{request}/answer", answer=text, explanation=why, key="k")
        assert said.headers["location"] == "/desk/queue?said=taken"


@contextmanager
def running(app: FastAPI, port: int = 0) -> Iterator[Running]:
    """The app on a port of this machine, by default a free one, in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or None)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app.state.desk.database, app)
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def until(look: Callable[[], Any], seconds: float = 200.0) -> Any:
    """What `look` finds, as soon as it is not None."""
    deadline = time.monotonic() + seconds
    while (seen := look()) is None:
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return seen


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text[:500]}"
    return match[1]
