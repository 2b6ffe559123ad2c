"""The desk in real browsers, by keyboard: two experts see a question live, one answers, the asker's stream ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from agile.serve import reviews
from agile.types import Action
from tests.browser import Browser, find_browser
from tests.serve.desk import PASSWORD, Counted, Running, an_app, asks_once, open_desk, running, until

pytestmark = pytest.mark.slow
QUESTION = "is it warm ? <b>"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once))) as server:
        yield server


@pytest.fixture
def browsers() -> Iterator[list[Browser]]:
    program = find_browser()
    if program is None:
        pytest.skip("needs a Chromium")
    with Browser(program) as first, Browser(program) as second:
        yield [first, second]


def log_in(browser: Browser, url: str, name: str, width: int = 1280) -> None:
    browser.open(f"{url}/desk/queue", width)  # sends to the login page, whose first field has the focus
    browser.type(name)
    browser.press("Tab")
    browser.type(PASSWORD)
    browser.press("Enter")
    until(lambda: shows(browser, "Nothing waits"))


def shows(browser: Browser, text: str) -> Any:
    return text in str(browser.value("document.body?.innerText ?? ''")) or None


def picture(browser: Browser, name: str) -> None:
    """Kept where AGILE_PICTURES says, to be looked at."""
    if folder := os.environ.get("AGILE_PICTURES"):
        browser.picture(Path(folder) / f"{name}.png")


def ask(server: Running, said: list[str]) -> threading.Thread:
    key = server.key()["authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    def run() -> None:
        messages: Any = [{"role": "user", "content": QUESTION}]
        stream = client.chat.completions.create(model="agile/p1", messages=messages, stream=True)
        said.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_question_is_seen_by_two_and_answered_by_one(server: Running, browsers: list[Browser]) -> None:
    ann, bob = browsers
    log_in(ann, server.url, "ann")
    log_in(bob, server.url, "bob", 390)
    said: list[str] = []
    asking = ask(server, said)
    for browser in browsers:
        until(lambda browser=browser: shows(browser, QUESTION))  # type: ignore[misc]
        assert browser.value("document.title") == "(1) Queue · AGILE"
        assert browser.value("document.querySelector('b')") is None
    picture(bob, "queue-390")
    picture(ann, "queue-1280")

    ann.press("c")
    until(lambda: shows(ann, "I don't know".upper()) or shows(ann, "I don't know"))
    until(lambda: shows(bob, "ann is at it"))
    until(lambda: ann.value("document.activeElement.name") == "answer" or None)
    ann.type("half an ans")
    other: list[str] = []
    joined = ask(server, other)  # the page changes while ann writes
    until(lambda: shows(ann, "2 waiting") or shows(bob, "2 waiting"))
    assert ann.value("document.querySelector('input[name=answer]').value") == "half an ans"
    picture(ann, "answer-1280")
    ann.type("wer")
    ann.press("Enter", ctrl=True)
    asking.join(30)
    joined.join(30)
    assert said == other == ["half an answer"]
    until(lambda: shows(ann, "Thank you"))
    until(lambda: shows(bob, "Nothing waits"))

    ask(server, said).join(30)
    assert said[1] == "half an answer" and server.app.state.desk.runner.memory.search("")[0][0].answer == said[1]

    for name in ("memory", "memory/1", "sessions"):
        for width in (1280, 390):
            ann.open(f"{server.url}/desk/{name}", width)
            assert ann.value("document.documentElement.scrollWidth") <= width, name
            picture(ann, f"{name.replace('/', '-')}-{width}")
    first = ann.value("document.querySelector('.rows a').href")
    for width in (1280, 390):
        ann.open(first, width)
        assert shows(ann, "SeekAdvice") or shows(ann, "PredictAnswer")
        assert ann.value("document.documentElement.scrollWidth") <= width
        picture(ann, f"session-{width}")
    assert ann.complaints == bob.complaints == [], "no script, style or request that the policy forbids"


def test_answers_are_reviewed_by_keyboard(tmp_path: Path, browsers: list[Browser]) -> None:
    ann, _ = browsers
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(lambda _: Action("PredictAnswer", "yes")))) as server:
        for n in range(3):
            body = {"model": "agile/p1", "messages": [{"role": "user", "content": f"is it {n} ? <i>"}]}
            assert httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key()).status_code == 200
        log_in(ann, server.url, "root")
        ann.open(f"{server.url}/desk/review", 1280)
        assert (
            shows(ann, "is it 0 ? <i>")
            and shows(ann, "3 to review")
            and ann.value("document.querySelector('i')") is None
        )
        picture(ann, "review-1280")
        ann.press("r")  # the first has the focus
        until(lambda: shows(ann, "Noted as right"))
        ann.press("j")
        ann.press("c")
        until(lambda: ann.value("document.activeElement.name") == "answer" or None)
        ann.type("a little rw")  # letters are no keys here
        ann.press("Enter")
        until(lambda: shows(ann, "Corrected. The agent knows it"))
        ann.press("w")
        until(lambda: shows(ann, "There is nothing to review"))
        said = {a.question: a.words[0].verdict for a in reviews.own_answers(server.database, "done")}
        assert said == {"is it 0 ? <i>": "right", "is it 2 ? <i>": "corrected", "is it 1 ? <i>": "wrong"}
        assert server.app.state.desk.memory.search("")[0][0].text == "is it 2 ? <i> -> a little rw"
        for width in (1280, 390):
            ann.open(f"{server.url}/desk/review?order=done", width)
            assert shows(ann, "33 % of 3") and ann.value("document.documentElement.scrollWidth") <= width
            picture(ann, f"reviewed-{width}")
            ann.open(f"{server.url}/desk/figures", width)
            assert shows(ann, "33 % of 3") and ann.value("document.documentElement.scrollWidth") <= width
            assert ann.value("document.querySelectorAll('circle').length") == 3, "nobody waited"
            picture(ann, f"figures-{width}")
        assert ann.complaints == [], "no script, style or request that the policy forbids"
