"""A database that goes away and comes back: clear words, nothing half-written, and no restart."""

from __future__ import annotations

import glob
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import text

from agile.serve import database as database_module
from agile.serve import questions
from tests.machine import free_port
from tests.serve.desk import Counted, Running, an_app, asks_once, found, open_desk, running, until

Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Another program writes to the file and does not end."""
    monkeypatch.delenv("AGILE_DESK_URL", raising=False)
    monkeypatch.setattr(database_module, "BUSY_S", 3)

    @contextmanager
    def outage() -> Iterator[None]:
        other = sqlite3.connect(tmp_path / "desk.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.close()

    return outage


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    """A PostgreSQL of this test, which is stopped and started."""
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or [shutil.which("initdb") or ""]
    if not programs[-1]:
        pytest.skip("needs PostgreSQL's initdb")
    folder = Path(tempfile.mkdtemp())
    user = "postgres" if os.getuid() == 0 else None  # it does not run as root
    if user:
        shutil.chown(folder, user)
    port = free_port()

    def run(program: str, *words: str) -> None:
        path = Path(programs[-1]).with_name(program)
        subprocess.run([path, *words], user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    def start() -> None:
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        run("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    @contextmanager
    def outage() -> Iterator[None]:
        run("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop")
        yield
        start()

    run("initdb", "-D", "data", "-A", "trust", "-U", "agile", "--no-sync")
    start()
    monkeypatch.setenv("AGILE_DESK_URL", f"postgresql://agile@127.0.0.1:{port}/postgres")
    yield outage
    run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")
    shutil.rmtree(folder)


def ask(server: Running, key: dict[str, str], question: str) -> httpx2.Response:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": question}]}
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=key, timeout=60)


def goes_on_after(outage: Outage, folder: Path) -> None:
    with running(an_app(folder, open_desk(folder), Counted(asks_once), wait_s=0)) as server:
        key, ann = server.key(), server.person("ann")
        first = ask(server, key, "is it warm ?").json()["agile"]["answer_id"]
        request = until(lambda: next(iter(ann.waiting()), None))
        ann.send(f"/desk/requests/{request}/claim")
        page = ann.client.get("/desk/queue").text
        said = {"csrf": found(r'name="csrf" value="([^"]+)"', page), "answer": "yes", "key": "k"}
        with outage():
            lost = ask(server, key, "is it red ?")
            assert lost.status_code == 503 and lost.json()["error"]["code"] == "database_away"
            told = ann.client.post(f"/desk/requests/{request}/answer", data=said, timeout=60)
            assert told.status_code == 503 and "away" in told.text
        told = ann.client.post(f"/desk/requests/{request}/answer", data=said, timeout=60)
        assert told.headers["location"].endswith("taken")

        def answered() -> bool | None:
            question = questions.by_id(server.database, first)
            return (question is not None and question.answer == "yes") or None

        until(answered)
        assert ask(server, key, "is it warm ?").status_code == 200
        until(lambda: questions.newest(server.database)[0].status == "answered" or None)
        with server.database.reading() as session:
            kept = [session.scalar(text(f"SELECT count(*) FROM {name}")) for name in ("questions", "memory", "journal")]
            assert kept == [2, 1, 0] and session.scalar(text("SELECT count(*) FROM requests")) == 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written(locked: Outage, tmp_path: Path) -> None:
    goes_on_after(locked, tmp_path)


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started(stopped: Outage, tmp_path: Path) -> None:
    goes_on_after(stopped, tmp_path)
