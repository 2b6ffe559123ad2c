"""The desk in real browsers, by keyboard: two experts see a question live, one answers, the asker's stream ends."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agile.serve import questions, reviews
from agile.types import Action
from tests.browser import Browser, find_axe, find_browser
from tests.machine import free_port
from tests.serve.desk import PASSWORD, Counted, Running, an_app, asks_once, open_desk, running, until

pytestmark = pytest.mark.slow
QUESTION = "is it warm ? <b>"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once))) as server:
        yield server


@pytest.fixture(scope="module")
def opened() -> Iterator[list[Browser]]:
    program = find_browser()
    with Browser(program) as first, Browser(program) as second, Browser(program) as third:
        yield [first, second, third]


@pytest.fixture
def browsers(opened: list[Browser]) -> Iterator[list[Browser]]:
    for browser in opened:
        browser.open("about:blank", 1280)  # away from a server that has ended
        browser.complaints.clear()
    yield opened
    for browser in opened:
        assert browser.complaints == [], "no script, style or request that the policy forbids"


def log_in(browser: Browser, url: str, name: str, width: int = 1280) -> None:
    browser.open(f"{url}/desk/queue", width)  # sends to the login page, whose first field gets the focus
    until(lambda: browser.value("document.activeElement?.name") == "name" or None)
    browser.type(name)
    browser.press("Tab")
    browser.type(PASSWORD)
    browser.press("Enter")
    until(lambda: shows(browser, "Log out"))


def shows(browser: Browser, text: str) -> Any:
    """Whether a page that is there whole, with its script, holds the text."""
    return text in str(browser.value("document.readyState === 'complete' ? document.body.innerText : ''")) or None


def picture(browser: Browser, name: str) -> None:
    """Kept where AGILE_PICTURES says, to be looked at."""
    if folder := os.environ.get("AGILE_PICTURES"):
        browser.picture(Path(folder) / f"{name}.png")


def fits(browser: Browser, width: int) -> bool:
    return bool(browser.value("document.documentElement.scrollWidth") <= width)


def tab_to(browser: Browser, name: str) -> None:
    """Press Tab until what has the focus is called so."""
    what = "(e => e.name || e.textContent.trim())(document.activeElement)"
    for _ in range(60):
        if browser.value(what) == name:
            return
        browser.press("Tab")
    raise AssertionError(f"no way to {name!r} by the Tab key")


class User:
    """A browser that asks, and reads the stream as it comes."""

    def __init__(self, browser: Browser, server: Running) -> None:
        self.browser, self.key = browser, server.key()["authorization"]
        browser.open(f"{server.url}/login", 1280)

    def ask(self) -> None:
        body = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        headers = {"content-type": "application/json", "authorization": self.key}
        request = {"method": "POST", "headers": headers, "body": json.dumps(body)}
        self.browser.value(
            f"""window.said = ''; window.over = false;
            fetch('/v1/chat/completions', {json.dumps(request)}).then(async answer => {{
              const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
              for (let part; !(part = await reader.read()).done;) window.said += part.value;
              window.over = true;
            }}); 0"""
        )

    @property
    def stream(self) -> str:
        return str(self.browser.value("window.said"))

    def answer(self) -> str:
        """What the stream said, when it is over."""
        until(lambda: self.browser.value("window.over") or None)
        events = [line.removeprefix("data: ") for line in self.stream.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


def test_a_question_is_seen_by_two_and_answered_by_one(server: Running, browsers: list[Browser]) -> None:
    ann, bob, cust = browsers
    log_in(ann, server.url, "ann")
    log_in(bob, server.url, "bob", 390)
    user = User(cust, server)
    user.ask()
    until(lambda: ": an expert has been asked" in user.stream or None)
    for browser in (ann, bob):
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
    joined = httpx2.Client(base_url=server.url, timeout=60, headers=server.key())
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    with joined.stream("POST", "/v1/chat/completions", json=body) as other:  # the page changes while ann writes
        until(lambda: shows(bob, "2 waiting"))
        assert ann.value("document.querySelector('input[name=answer]').value") == "half an ans"
        picture(ann, "answer-1280")
        ann.type("wer")
        ann.press("Enter", ctrl=True)
        assert user.answer() == "half an answer" and "half an answer" in other.read().decode()
    until(lambda: shows(ann, "Thank you"))
    until(lambda: shows(bob, "Nothing waits"))

    user.ask()
    assert user.answer() == "half an answer" and "an expert has been asked" not in user.stream
    assert questions.newest(server.database)[0].answer == "half an answer"
    assert server.app.state.desk.runner.memory.search("")[0][0].answer == "half an answer"

    for name in ("memory", "memory/1", "sessions"):
        for width in (1280, 390):
            ann.open(f"{server.url}/desk/{name}", width)
            assert fits(ann, width), name
            picture(ann, f"{name.replace('/', '-')}-{width}")
    first = ann.value("document.querySelector('.rows a').href")
    for width in (1280, 390):
        ann.open(first, width)
        assert shows(ann, "SeekAdvice") or shows(ann, "PredictAnswer")
        assert fits(ann, width)
        picture(ann, f"session-{width}")


def test_memory_is_mended_and_taken_back_by_keyboard(server: Running, browsers: list[Browser]) -> None:
    ann, _, cust = browsers
    log_in(ann, server.url, "ann")
    user = User(cust, server)
    user.ask()
    until(lambda: shows(ann, QUESTION))
    tab_to(ann, "Claim")
    ann.press("Enter")
    until(lambda: ann.value("document.activeElement?.name") == "answer" or None)
    ann.type("no")
    tab_to(ann, "Answer")
    ann.press("Enter")
    assert user.answer() == "no"
    until(lambda: shows(ann, "Thank you"))
    tab_to(ann, "Memory")
    ann.press("Enter")
    until(lambda: shows(ann, "1 entry"))
    tab_to(ann, f"{QUESTION} -> no")
    ann.press("Enter")
    until(lambda: shows(ann, "Entry 1"))
    tab_to(ann, "answer")  # it is selected as a whole
    ann.type("yes")
    tab_to(ann, "Save")
    ann.press("Enter")
    until(lambda: shows(ann, "Saved"))
    assert ann.value("document.querySelector('[name=answer]').value") == "yes"
    tab_to(ann, "Undo the last change")
    ann.press("Enter")
    until(lambda: shows(ann, "undone by ann"))
    assert ann.value("document.querySelector('[name=answer]').value") == "no"
    ann.open(f"{server.url}/desk/queue", 1280)
    ann.press("Tab")
    assert ann.value("document.activeElement.textContent") == "To the content", "past the links, for who wants to"


def test_the_queue_is_live_again_after_a_restart(tmp_path: Path, browsers: list[Browser]) -> None:
    ann, database = browsers[0], open_desk(tmp_path)
    with running(an_app(tmp_path, database, Counted(asks_once)), free_port()) as server:
        log_in(ann, server.url, "ann")
        until(lambda: shows(ann, "Live"))
        port = int(server.url.rpartition(":")[2])
    until(lambda: shows(ann, "Not live"))
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once), wait_s=0), port) as server:
        until(lambda: None if shows(ann, "Not live") else True)
        body = {"model": "agile/p1", "messages": [{"role": "user", "content": QUESTION}]}
        httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=60)
        until(lambda: shows(ann, QUESTION))
    ann.complaints.clear()  # that the server was away


def test_everybody_can_use_every_page(tmp_path: Path, browsers: list[Browser]) -> None:
    axe, (root, *_) = find_axe(), browsers

    def decide(context: str) -> Action:
        return asks_once(context) if "warm" in context else Action("PredictAnswer", "yes")

    with running(an_app(tmp_path, open_desk(tmp_path), Counted(decide), wait_s=0, agree=2)) as server:
        root.open(f"{server.url}/login", 1280)
        assert root.violations(axe) == [], "/login"
        for text in ("is it red ?", "is it big ?", "is it warm ?", "is it warm or is it cold there ?"):
            messages = [{"role": "user", "content": "what is p1 ?"}, {"role": "user", "content": text}]
            body = {"model": "agile/p1", "messages": messages, "metadata": {"webhook": "https://127.0.0.1/x"}}
            httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=60)
        ann = server.person("ann")
        until(lambda: len(ann.waiting()) == 2 or None)
        until(lambda: reviews.num_left(server.database) == 2 or None)
        ann.send(f"/desk/requests/{ann.waiting()[0]}/claim")
        ann.send(f"/desk/requests/{ann.waiting()[0]}/answer", answer="yes", explanation="I felt it", key="k")
        one, _ = reviews.own_answers(server.database, "unsure")
        ann.send(f"/desk/review/{one.id}", verdict="corrected", answer="no", explanation="look", key="r")
        log_in(root, server.url, "root")
        root.press("c")
        until(lambda: root.value("document.activeElement?.name") == "answer" or None)
        pages = ["queue", "review", "review?order=done", "memory", "memory/1", "sessions", "figures", "memory/99"]
        pages.append(f"sessions/{one.id}")
        for name in pages:
            for dark, width in ((False, 1280), (True, 390)):
                root.open(f"{server.url}/desk/{name}", width, dark=dark)
                assert root.violations(axe) == [], (name, dark)
                assert fits(root, width), (name, width)
                shown = name.replace("/", "-").replace("?order=", "-").replace(one.id, "one")
                picture(root, f"all-{shown}-{width}")
        root.complaints[:] = [told for told in root.complaints if "404" not in told]


def test_answers_are_reviewed_by_keyboard(tmp_path: Path, browsers: list[Browser]) -> None:
    ann = browsers[0]
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
