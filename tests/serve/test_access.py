"""Nobody sees or changes what is not for their role, and what people write is data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.routing import BaseRoute, Route

from agile.errors import AgileError
from agile.serve import questions
from agile.serve.access import COOKIE, FAILED_LOGINS
from agile.serve.server import is_loopback, run_server
from agile.types import MemoryItem, MemoryKind
from tests.serve.desk import PASSWORD, PEOPLE, Counted, Person, Running, an_app, asks_once, found, open_desk, running

# Who may use each route: everybody, who shows a key, or who has this role at the desk (the higher ones included).
ROUTES = {
    "GET /": "all",
    "GET /static/{name}": "all",
    "GET /login": "all",
    "POST /login": "all",
    "GET /healthz": "all",
    "GET /v1/openapi.json": "all",
    "GET /v1/models": "key",
    "POST /v1/chat/completions": "key",
    "GET /v1/answers/{answer_id}": "key",
    "POST /logout": "user",
    "GET /desk/queue": "expert",
    "GET /desk/queue/list": "expert",
    "GET /desk/events": "expert",
    "POST /desk/requests/{request_id}/claim": "expert",
    "POST /desk/requests/{request_id}/answer": "expert",
    "POST /desk/requests/{request_id}/unknown": "expert",
    "POST /desk/requests/{request_id}/skip": "expert",
    "GET /desk/review": "expert",
    "POST /desk/review/{question_id}": "expert",
    "GET /desk/memory": "expert",
    "GET /desk/memory/{entry_id}": "expert",
    "POST /desk/memory/{entry_id}/edit": "expert",
    "POST /desk/memory/{entry_id}/retire": "expert",
    "POST /desk/memory/{entry_id}/undo": "expert",
    "GET /desk/sessions": "expert",
    "GET /desk/sessions/{question_id}": "expert",
    "POST /desk/webhooks/{webhook_id}/again": "expert",
    "GET /desk/figures": "expert",
    "POST /desk/figures/terms": "administrator",
    "GET /metrics": "administrator",
}
RANKS = ("user", "expert", "administrator")
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7919 * 7907 }}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("access")
    with running(an_app(folder, open_desk(folder), Counted(asks_once), wait_s=0)) as server:
        yield server


@pytest.fixture(scope="module")
def people(server: Running) -> dict[str, Person]:
    return {role: server.person(name) for name, role in PEOPLE.items()}


def routes_of(routes: list[BaseRoute]) -> set[str]:
    named: set[str] = set()
    for route in routes:
        nested = getattr(route, "original_router", None)
        if nested is not None:
            named |= routes_of(nested.routes)
        else:
            assert isinstance(route, Route), route
            named |= {f"{method} {route.path}" for method in (route.methods or set()) - {"HEAD"}}
    return named


def test_every_route_has_its_role(server: Running) -> None:
    assert routes_of(server.app.routes) == set(ROUTES)


def send(client: httpx2.Client, route: str, headers: dict[str, str] | None = None, csrf: str = "") -> int:
    method, path = route.split()
    for name in ("name", "answer_id", "request_id", "question_id"):
        path = path.replace(f"{{{name}}}", "desk.js" if name == "name" else "unknown")
    path = path.replace("{entry_id}", "1").replace("{webhook_id}", "1")
    form = {"csrf": csrf, "key": "k", "text": "t", "answer": "a"} if csrf else None
    with client.stream(method, path, headers=headers, data=form) as answer:  # events have no end
        return answer.status_code


@pytest.mark.parametrize("route", [route for route, who in ROUTES.items() if who != "all"])
def test_each_route_refuses_who_is_below_its_role(server: Running, people: dict[str, Person], route: str) -> None:
    who, nobody = ROUTES[route], httpx2.Client(base_url=server.url)
    refused = 303 if "GET /desk" in route else 401
    assert send(nobody, route) == refused
    assert send(nobody, route, {"cookie": f"{COOKIE}=e30.x.y", "authorization": "Bearer x"}) == refused
    key = server.key("root")
    if who == "key":
        assert send(people["administrator"].client, route) == 401, "a cookie is no key: another page could use it"
        assert send(nobody, route, key) in (200, 400, 404)
        return
    if who != "administrator":
        assert send(nobody, route, key) == refused, "a key is for programs"
    for rank in RANKS[: RANKS.index(who)]:
        assert send(people[rank].client, route) == 403
    if route.startswith("POST"):
        assert send(people[who].client, route) == 403, "without the token of its form"
        assert send(people[who].client, route, csrf="another") == 403


def test_pages_are_safe_with_whatever_people_write(server: Running, people: dict[str, Person]) -> None:
    body = {"model": "agile/p1", "messages": [{"role": "user", "content": EVIL}]}
    httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=server.key())
    expert = people["expert"]
    expert.answers("yes" + EVIL, "because" + EVIL)
    memory = server.app.state.desk.memory
    memory.write([MemoryItem(MemoryKind.HISTORY, EVIL, EVIL, EVIL, EVIL, EVIL)])
    (asked,) = questions.newest(server.database)
    for path in (
        "/desk/queue",
        "/desk/memory",
        f"/desk/memory?q={EVIL}",
        "/desk/memory/1",
        "/desk/sessions",
        f"/desk/sessions/{asked.id}",
    ):
        page = expert.client.get(path)
        assert page.status_code == 200 and "<script>alert" not in page.text and "<img" not in page.text, path
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert str(7919 * 7907) not in page.text, "no template"
    assert expert.client.get("/desk/memory?q=%27%20OR%201=1;%20DROP%20TABLE%20memory;--").status_code == 200
    assert len(memory) >= 1


def test_memory_is_edited_retired_and_taken_back(server: Running, people: dict[str, Person]) -> None:
    memory, expert = server.app.state.desk.memory, people["expert"]
    entry = MemoryItem(
        MemoryKind.HISTORY, "is it red ?", "is it red ? -> yes", "yes", "shop", "p1", "served/1", "advice"
    )
    (number,) = memory.write([entry])
    path = f"/desk/memory/{number}"

    def now() -> tuple[str, bool, list[str]]:
        item, retired, changes = memory.entry(number)
        return item.text, retired, [f"{change.action} by {change.user}" for change in changes]

    assert expert.send(f"{path}/edit", key="is it red ?", text="is it red ? -> no", answer="no").status_code == 303
    assert expert.send(f"{path}/retire").headers["location"].endswith("saved")
    assert now() == ("is it red ? -> no", True, ["retired by bob", "edited by bob", "written by the agent"])
    assert number not in [found.id for found in memory._current()[0]]
    expert.send(f"{path}/undo")
    assert now()[:2] == ("is it red ? -> no", False)
    expert.send(f"{path}/edit", key="is it red ?", text="is it red ? -> yes", answer="yes")
    page = expert.client.get(path).text
    assert "undone by bob" in page and "<del>is it red ? -&gt; no</del>" in page
    assert expert.client.get("/desk/memory/999").status_code == 404
    assert expert.client.get(f"/desk/memory/{10**40}").status_code == 404


def test_logins(server: Running) -> None:
    person = Person(httpx2.Client(base_url=server.url))
    wrong = person.log_in("ann", "wrong password")
    assert wrong.status_code == 401 and COOKIE not in person.client.cookies
    assert person.client.post("/login", data={"name": "ann", "password": PASSWORD}).status_code == 403, "no token"
    person.client.cookies.set(COOKIE, "fixed", domain="127.0.0.1")
    said = person.log_in("ann", PASSWORD).headers.get_list("set-cookie")
    assert any(c.startswith(COOKIE) and "HttpOnly" in c and "SameSite=lax" in c and "fixed" not in c for c in said)
    stolen = dict(person.client.cookies)
    assert person.send("/logout").status_code == 303
    assert httpx2.get(f"{server.url}/desk/queue", cookies=stolen).status_code == 303, "a copied cookie ends too"


def test_guessing_passwords_is_stopped(tmp_path: Path) -> None:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once))) as server:
        person = Person(httpx2.Client(base_url=server.url))
        codes = [person.log_in("ann", f"guess number {n}").status_code for n in range(FAILED_LOGINS + 1)]
        assert codes == [401] * FAILED_LOGINS + [429]
        assert person.log_in("ann", PASSWORD).status_code == 429


def test_it_listens_elsewhere_only_encrypted(tmp_path: Path) -> None:
    from rich.console import Console

    with pytest.raises(AgileError, match="--behind-proxy"):
        run_server(tmp_path / "x.yaml", (), tmp_path, Console(), host="0.0.0.0", port=1)
    assert is_loopback("::1") and not is_loopback("192.168.0.1")


def test_pages_hold_the_token_of_their_forms(people: dict[str, Person]) -> None:
    assert len(found(r'name="csrf" value="([^"]+)"', people["expert"].client.get("/desk/queue").text)) > 20
