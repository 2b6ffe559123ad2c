"""What somebody would send who means harm, to every route and in every field."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok
from sqlalchemy import inspect, text

from agile.serve import questions, reviews
from agile.serve.logs import JsonFormatter
from agile.types import Action
from tests.serve.desk import PASSWORD, Counted, Person, Running, an_app, asks_once, found, open_desk, running, until
from tests.serve.test_access import EVIL, ROUTES, send

SQL = ("' OR '1'='1", "'; DROP TABLE users; --", '"; DELETE FROM memory; --', "1 UNION SELECT password_hash FROM users")
ODD = ("", "\0", "\ud800", "x" * 9000, "%s%n%x", "../../etc/passwd", "-1", "9" * 40, "NaN", "[]", "\u202e\U0001f4a9")
# what the forms of the desk have
FIELDS = ("answer", "explanation", "key", "text", "verdict", "order", "price", "budget", "name", "password", "token")


def decide(context: str) -> Action:
    return asks_once(context) if "warm" in context else Action("PredictAnswer", "yes")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("attacks")
    with running(an_app(folder, open_desk(folder), Counted(decide), wait_s=5, requests_per_minute=100_000)) as server:
        yield server


@pytest.fixture(scope="module")
def root(server: Running) -> Person:
    """Somebody who may do everything."""
    return server.person("root")


def ask(server: Running, question: str) -> str:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": question}]}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key(), timeout=60)
    return str(answer.json()["agile"]["answer_id"])


def rows(server: Running) -> dict[str, int]:
    """How many rows each table has that nobody adds to or takes from by the routes that are tried."""
    with server.database.reading() as session:
        names = inspect(session.connection()).get_table_names()
        assert len(names) > 10
        return {n: session.scalar(text(f"SELECT count(*) FROM {n}")) or 0 for n in ("users", "api_keys", "settings")}


def paths(odd: str) -> Iterator[str]:
    for route in ROUTES:
        method, path = route.split()
        if path in ("/logout", "/desk/events"):
            continue
        quoted = httpx2.URL("http://x", params={"q": odd}).query.decode().removeprefix("q=")
        for name in ("name", "answer_id", "request_id", "question_id", "entry_id", "webhook_id"):
            path = path.replace(f"{{{name}}}", quoted or "x")
        yield f"{method} {path}"


@pytest.mark.parametrize("odd", [*SQL, EVIL, *(o for o in ODD if o != "\ud800")], ids=repr)
def test_nothing_breaks_whatever_stands_in_addresses_and_fields(server: Running, root: Person, odd: str) -> None:
    before = rows(server)
    csrf = found(r'name="csrf" value="([^"]+)"', root.client.get("/desk/memory").text)
    headers = server.key("root")
    for route in paths(odd):
        method, path = route.split()
        query = dict.fromkeys(("q", "said", "order", "before"), odd) if method == "GET" else None
        form = {"csrf": csrf, **dict.fromkeys(FIELDS, odd)} if method == "POST" else None
        answer = root.client.request(method, path, params=query, data=form, headers=headers)
        assert answer.status_code < 500, (route, answer.text)
        assert "<script>alert" not in answer.text and "$argon2" not in answer.text, route
    if "\0" not in odd and odd.strip() and len(odd) < 4000:
        asked = ask(server, f"is it {odd} ?")
        assert httpx2.get(f"{server.url}/v1/answers/{asked}", headers=headers).json()["question"] == f"is it {odd} ?"
    with server.database.reading() as session:
        assert session.scalar(text("SELECT count(*) FROM users")) == before["users"] == 4
    assert rows(server).keys() == before.keys()


def test_reviews_show_what_people_wrote_as_text(server: Running, root: Person) -> None:
    asked = ask(server, f"is it red {EVIL} ?")
    question = questions.by_id(server.database, asked)
    assert question is not None
    form = {"verdict": "corrected", "answer": f"no {EVIL}", "explanation": f"see {EVIL}", "key": "evil"}
    assert root.send(f"/desk/review/{asked}", **form).headers["location"].endswith("corrected")
    (done, *_) = reviews.own_answers(server.database, "done")
    assert done.words[0].explanation == f"see {EVIL}"
    for path in (
        "/desk/review",
        "/desk/review?order=done",
        "/desk/memory",
        f"/desk/sessions/{asked}",
        "/desk/sessions",
    ):
        page = root.client.get(path)
        assert page.status_code == 200, path
        assert "<script>alert" not in page.text and "<img" not in page.text, path
    assert "&lt;script&gt;alert" in root.client.get("/desk/review?order=done").text


@pytest.mark.parametrize("route", [route for route in ROUTES if route.startswith("POST /desk")])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'{"csrf": "x"}'),
        ("application/x-www-form-urlencoded", b"csrf=%ff%fe&answer=%00&key=\xff"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data; name=csrf\r\n\r\n"),
        ("text/plain", b"\x00\xff" * 99),
    ],
    ids=["json", "form", "multipart", "cut", "bytes"],
)
def test_forms_that_are_none_are_refused(server: Running, root: Person, route: str, kind: str, body: bytes) -> None:
    path = next(paths_of(route))
    answer = root.client.post(path, content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500, answer.text
    assert root.client.post(path, content=b"x" * 300_000).status_code == 413


def paths_of(route: str) -> Iterator[str]:
    path = route.split()[1]
    for name in ("request_id", "question_id", "entry_id", "webhook_id"):
        path = path.replace(f"{{{name}}}", "1")
    yield path


def test_another_site_cannot_use_a_login(server: Running) -> None:
    """A form there has the cookie, where the browser sends it, but no token; nor may its scripts read answers."""
    ann = server.person("ann")
    entry = server.app.state.desk.memory
    other = found(r'name="csrf" value="([^"]+)"', server.person("bob").client.get("/desk/memory").text)
    for route in (r for r in ROUTES if r.startswith("POST /desk") or r == "POST /logout"):
        assert send(ann.client, route, {"origin": "https://evil.example", "referer": "https://evil.example/"}) == 403
        assert send(ann.client, route, csrf=other) == 403, "the token of another login"
    page = ann.client.get("/desk/queue", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in page.headers and len(entry) >= 0
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert httpx2.options(f"{server.url}/v1/chat/completions", headers=asked).status_code == 405


def test_a_cookie_that_somebody_set_beforehand_is_worth_nothing(server: Running) -> None:
    """Session fixation: the login makes a new cookie, and that of another login ends with it alone."""
    ann = Person(httpx2.Client(base_url=server.url))
    given = dict(server.person("ann").client.cookies)
    ann.client.cookies.update(given)
    assert ann.log_in("bob", PASSWORD).status_code == 303
    assert set(ann.client.cookies.jar) and "bob" in ann.client.get("/desk/queue").text
    assert "bob" not in httpx2.get(f"{server.url}/desk/queue", cookies=given).text


def test_the_log_holds_no_secret(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "agile"):
        ann = server.person("ann")
        ann.client.get("/desk/memory", params={"q": "whisper"})
        key = server.key()
        body = {"model": "agile/p1", "messages": [{"role": "user", "content": "is my secret safe ?"}]}
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=key, timeout=60)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("agile")]
    (line,) = [line for line in lines if answer.headers["x-request-id"] in line]
    assert '"path": "/v1/chat/completions"' in line and '"status": 200' in line
    secrets = [
        PASSWORD,
        key["authorization"].removeprefix("Bearer "),
        "secret",
        "whisper",
        *ann.client.cookies.values(),
    ]
    assert [(s, line) for line in lines for s in secrets if s in line] == []


@pytest.mark.slow
def test_no_request_that_the_schema_allows_breaks_the_api(server: Running) -> None:
    key = server.key()
    schema = schemathesis.openapi.from_url(f"{server.url}/v1/openapi.json")
    seen: set[tuple[str, int]] = set()
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and len(str(case.body)) % 2:  # every other one is a question
                asked = {"model": "agile/p1", "metadata": None, "stream_options": None, "n": 1}
                case.body.update(asked, messages=[{"role": "user", "content": "is it red ?"}])
            answer = case.call(base_url=server.url, headers=key, timeout=60)
            seen.add((case.operation.label, answer.status_code))
            assert answer.status_code < 500, answer.text

        check()
    assert {label for label, _ in seen} == {r for r, who in ROUTES.items() if who == "key"}
    assert ("POST /v1/chat/completions", 200) in seen
    until(lambda: httpx2.get(f"{server.url}/healthz").status_code == 200 or None)
