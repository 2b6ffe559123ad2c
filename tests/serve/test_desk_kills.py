"""kill -9 of the server at random moments: what was acknowledged is answered, once, by one expert, remembered once.

AGILE_KILLS="20 50 5 1000" makes it 20 kills, 50 users, 5 experts, 1,000 questions; AGILE_DESK_URL another database.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import httpx2
import pytest
import uvicorn
from sqlalchemy import text

from agile.serve import accounts
from agile.serve.database import Database
from tests.machine import free_port
from tests.serve.desk import ENCODER, PASSWORD, Counted, Person, an_app, asks_once, empty_database, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NUM_KILLS, NUM_USERS, NUM_EXPERTS, NUM_QUESTIONS = map(int, os.environ.get("AGILE_KILLS", "5 10 3 60").split())


def keep_starting(folder: Path, url: str, port: int, orders: Connection) -> None:
    """A process without threads, from which servers are forked: starting one anew would take seconds of imports."""
    while orders.recv():
        child = os.fork()
        if not child:
            app = an_app(folder, Database(url), Counted(asks_once), wait_s=0, requests_per_minute=100_000)
            uvicorn.run(app, port=port, log_level="critical", access_log=False)
            os._exit(0)
        orders.send(child)
        os.waitpid(child, 0)


class Crowd:
    """Users and experts who do not give up while the server comes and goes."""

    def __init__(self, base: str, database: Database) -> None:
        self.base, self.database = base, database
        self.acknowledged: dict[str, str] = {}  # question by the id of its answer
        self.given: Counter[str] = Counter()  # answers that experts were thanked for, by request
        self.up, self.done = threading.Event(), threading.Event()

    def user(self, number: int) -> None:
        key = {"authorization": f"Bearer {accounts.add_key(self.database, 'cust')}"}
        with httpx2.Client(base_url=self.base, headers=key, timeout=30) as client:
            for n in range(number, NUM_QUESTIONS, NUM_USERS):
                words = f"is number {n} warm ?"
                body = {"model": "agile/p1", "messages": [{"role": "user", "content": words}]}
                try:
                    said = client.post("/v1/chat/completions", json=body)
                except httpx2.HTTPError:
                    time.sleep(0.05)  # until the killer has noted it
                    self.up.wait(120)
                    continue  # nobody promised anything
                assert said.status_code == 200, said.text
                self.acknowledged[said.json()["agile"]["answer_id"]] = words
                time.sleep(0.1 * random.random())

    def expert(self, name: str) -> None:
        person: Person | None = None
        while not self.done.is_set():
            try:
                if person is None:
                    somebody = Person(httpx2.Client(base_url=self.base, timeout=30))
                    assert somebody.log_in(name, PASSWORD).status_code == 303
                    person = somebody
                for request in random.sample(waiting := person.waiting(), min(3, len(waiting))):
                    self.answer(person, request)
            except httpx2.HTTPError:
                self.up.wait(120)
            time.sleep(0.05)

    def answer(self, person: Person, request: str) -> None:
        if person.send(f"/desk/requests/{request}/claim").headers.get("location") != "/desk/queue":
            return
        while True:
            try:
                said = person.send(f"/desk/requests/{request}/answer", answer="yes", key=f"of {request}")
                break
            except httpx2.HTTPError:  # did it arrive? the same key may be sent again
                time.sleep(0.05)
        if said.headers["location"].endswith(("taken", "again")):
            self.given[request] += 1


def test_nothing_acknowledged_is_lost_or_asked_twice(tmp_path: Path) -> None:
    url = empty_database(tmp_path)
    port = free_port()
    ENCODER.encode(["once"])
    orders, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    starter = fork.Process(target=keep_starting, args=(tmp_path, url, port, theirs), daemon=True)
    starter.start()
    database = Database(url)
    experts = [f"expert{n}" for n in range(NUM_EXPERTS)]
    for name in ("cust", *experts):
        accounts.add_user(database, name, "user" if name == "cust" else "expert", PASSWORD)
    crowd = Crowd(f"http://127.0.0.1:{port}", database)

    def start() -> int:
        orders.send(True)
        child = orders.recv()
        until(lambda: up(crowd.base), 300)
        crowd.up.set()
        return int(child)

    def users_left() -> bool:
        return any(thread.is_alive() for thread in users)

    server = start()
    users = [threading.Thread(target=crowd.user, args=(n,), daemon=True) for n in range(NUM_USERS)]
    others = [threading.Thread(target=crowd.expert, args=(name,), daemon=True) for name in experts]
    for thread in (*users, *others):
        thread.start()
    for killed in range(NUM_KILLS):
        asked_by_then = NUM_QUESTIONS * killed // (NUM_KILLS + 1)
        until(lambda: len(crowd.acknowledged) >= asked_by_then or not users_left() or None, 300)  # noqa: B023
        time.sleep(2 * random.random())
        crowd.up.clear()
        os.kill(server, signal.SIGKILL)
        server = start()
    for thread in users:
        thread.join()

    def all_answered() -> bool | None:
        with database.reading() as session:
            left = session.execute(text("SELECT count(*) FROM questions WHERE status NOT IN ('answered')")).scalar()
        return True if left == 0 else None

    until(all_answered, 900)
    crowd.done.set()
    for thread in others:
        thread.join(30)
    os.kill(server, signal.SIGKILL)
    orders.send(False)
    with database.reading() as session:
        found = session.execute(text("SELECT id, answer FROM questions"))
        answers: dict[str, str] = {row[0]: row[1] for row in found}
        taken = Counter(r for (r,) in session.execute(text("SELECT request_id FROM claims WHERE outcome = 'answered'")))
        written = Counter(k for (k,) in session.execute(text("SELECT key FROM memory")))
        asked = Counter(k for (k,) in session.execute(text("SELECT matched FROM requests")))
        sessions = session.execute(text("SELECT session FROM questions")).scalars().all()
    print(f"{NUM_KILLS} kills, {len(crowd.acknowledged)} of {NUM_QUESTIONS} acknowledged, {len(answers)} kept")
    assert crowd.acknowledged and all(answers[i] == "yes" for i in crowd.acknowledged)
    assert set(taken.values()) == {1} and set(asked.values()) == {1}, "nobody was asked twice"
    assert set(crowd.given) <= set(taken) and set(crowd.given.values()) == {1}
    assert set(written.values()) == {1} and set(written) == {f"is number {n.split()[2]} warm ?" for n in asked}
    assert all(json.loads(s)["status"] == "completed" for s in sessions)


def up(base: str) -> bool | None:
    try:
        return httpx2.get(f"{base}/healthz", timeout=5).status_code == 200 or None
    except httpx2.HTTPError:
        return None
