"""An endpoint that fails in every way, what it costs, and that nothing is asked twice."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.policies.answer_cache import AnswerCache
from agile.policies.endpoint import ATTEMPTS, Answer, Endpoint, Prices, Rejected
from agile.types import Usage
from tests.stub_endpoint import KEY, Reply, StubEndpoint, called, refused, said, stub_endpoint

BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubEndpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with stub_endpoint() as stub:
        yield stub


def endpoint(stub: StubEndpoint, **changes: Any) -> Endpoint:
    return Endpoint(stub.url, "tiny", **{"backoff_s": 0.01, "timeout_s": 10.0, **changes})


def ask(end: Endpoint, *bodies: dict[str, Any]) -> list[Answer]:
    async def together() -> list[Answer]:
        try:
            return await asyncio.gather(*(end.ask(body) for body in bodies or (BODY,)))
        finally:
            await end.close()

    return asyncio.run(asyncio.wait_for(together(), 200))


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": str(i)}]} for i in range(n)]


def test_an_answer_and_its_cost(stub: StubEndpoint) -> None:
    end = endpoint(stub, prices=Prices(input=10.0, output=30.0, cached_input=1.0))
    (answer,) = ask(end)
    assert answer.message["content"] == "[PredictAnswer] steel is washable"
    assert answer.usage == Usage(100, 40, 10, (60 * 10 + 40 * 1 + 10 * 30) / 1e6)
    assert end.spent == answer.usage and end.num_requests == 1
    assert stub.requests == [{"model": "tiny", **BODY}]
    assert stub.keys == [f"Bearer {KEY}"]


def test_prices_without_one_for_cached_input() -> None:
    assert Prices(input=10.0, output=30.0).of(Usage(100, 40, 10)).cost == pytest.approx((100 * 10 + 10 * 30) / 1e6)


def test_an_endpoint_without_keys_gets_none(stub: StubEndpoint) -> None:
    ask(endpoint(stub, api_key_env=None))
    assert stub.keys == [None]


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(AgileError, match="set the environment variable MY_KEY"):
        Endpoint("http://127.0.0.1:1/v1", "tiny", api_key_env="MY_KEY")


# --------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    "bad",
    [
        refused(500, "oh no"),
        refused(503, "busy", code="overloaded"),
        Reply(200, "<html>gateway</html>"),
        Reply(200, ""),
        Reply(200, "[]"),
        Reply(200, '{"choices": []}'),
        Reply(200, '{"error": {"message": "overloaded"}}'),
        Reply(502, "<html>bad gateway</html>"),
        said(""),
        said(None),
    ],
    ids=["500", "503", "html", "empty", "list", "no choice", "error in 200", "502", "blank", "null"],
)
def test_what_may_pass_is_tried_again_and_then_given_up(stub: StubEndpoint, bad: Reply) -> None:
    stub.script(bad, bad, said("fine"))
    assert ask(endpoint(stub, backoff_s=0.001))[0].message["content"] == "fine"
    assert len(stub.requests) == 3
    stub.script(bad)
    with pytest.raises(RuntimeError, match=f"no usable answer in {ATTEMPTS} attempts"):
        ask(endpoint(stub, backoff_s=0.001))
    assert len(stub.requests) == 3 + ATTEMPTS


def test_blank_answers_are_paid_for(stub: StubEndpoint) -> None:
    stub.script(said(""), said("fine"))
    (answer,) = ask(end := endpoint(stub, prices=Prices(input=10.0)))
    assert answer.usage == end.spent == Usage(200, 80, 20, 2 * (100 * 10 / 1e6))


def test_a_server_that_hangs(stub: StubEndpoint) -> None:
    stub.script(Reply(delay_s=30), said("fine"))
    assert ask(endpoint(stub, timeout_s=0.3))[0].message["content"] == "fine"
    stub.script(Reply(delay_s=30))
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        ask(endpoint(stub, timeout_s=0.1))


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgileError, match=r"Cannot reach http://127.0.0.1:9/v1.*base_url"):
        ask(Endpoint("http://127.0.0.1:9/v1", "tiny", api_key_env=None, backoff_s=0.001))


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_wrong_key_ends_it_at_once(stub: StubEndpoint, status: int) -> None:
    stub.script(refused(status, "Incorrect API key"))
    with pytest.raises(AgileError, match=f"the key in OPENAI_API_KEY .{status}: Incorrect API key") as error:
        ask(endpoint(stub))
    assert KEY not in str(error.value)
    assert len(stub.requests) == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_rejected_request_is_not_repeated(stub: StubEndpoint, status: int) -> None:
    stub.script(refused(status, "no such field: tools", code="bad"))
    with pytest.raises(Rejected, match="no such field: tools") as error:
        ask(endpoint(stub))
    assert (error.value.status, error.value.code, len(stub.requests)) == (status, "bad", 1)


def test_a_model_that_only_thinks(stub: StubEndpoint) -> None:
    stub.script(said("", "length"))
    with pytest.raises(RuntimeError, match="raise max_tokens"):
        ask(endpoint(stub))
    assert len(stub.requests) == 1


# --------------------------------------------------------------------------------------------------------------------
# Limits


def test_too_many_requests_make_everybody_wait(stub: StubEndpoint) -> None:
    stub.script(Reply(429, "{}", {"Retry-After": "0.5"}), said("fine"))
    assert len(ask(endpoint(stub, max_concurrent=1), *numbered(3))) == 3
    assert stub.times[1] - stub.times[0] >= 0.5
    assert len(stub.requests) == 4


def test_too_many_requests_without_a_time_to_wait(stub: StubEndpoint) -> None:
    stub.script(*[refused(429, "slow down")] * 4, said("fine"))
    began = time.monotonic()
    ask(endpoint(stub, backoff_s=0.05))
    assert time.monotonic() - began >= 0.05 * (1 + 2 + 4 + 8)


def test_a_date_to_wait_for(stub: StubEndpoint) -> None:
    stub.script(Reply(429, "{}", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), said("fine"))
    ask(endpoint(stub, backoff_s=60.0))  # it has passed


@pytest.mark.parametrize(
    "reply",
    [refused(429, "You exceeded your quota", code="insufficient_quota"), Reply(429, "{}", {"Retry-After": "86400"})],
    ids=["quota", "a day"],
)
def test_no_quota_ends_it_at_once(stub: StubEndpoint, reply: Reply) -> None:
    stub.script(reply)
    with pytest.raises(AgileError, match="not paid for twice"):
        ask(endpoint(stub))
    assert len(stub.requests) == 1


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_headers_of_what_remains_are_heeded(stub: StubEndpoint, kind: str) -> None:
    fine = said("fine")
    last = Reply(200, fine.body, {f"x-ratelimit-remaining-{kind}": "0", f"x-ratelimit-reset-{kind}": "400ms"})
    stub.script(last, fine)
    ask(endpoint(stub, max_concurrent=1), *numbered(2))
    assert stub.times[1] - stub.times[0] >= 0.4


def test_most_requests_at_once(stub: StubEndpoint) -> None:
    stub.script(Reply(200, said("fine").body, delay_s=0.3))
    ask(endpoint(stub, max_concurrent=3), *numbered(9))
    assert stub.most_busy == 3


def test_requests_per_minute(stub: StubEndpoint) -> None:
    began = time.monotonic()  # before the first is sent; the server may hear of that one late
    ask(endpoint(stub, requests_per_minute=600), *numbered(6))
    assert stub.times[-1] - began >= 0.5


def test_the_first_request_goes_alone(stub: StubEndpoint) -> None:
    async def all_rejected(end: Endpoint) -> list[BaseException | Answer]:
        async def one(body: dict[str, Any]) -> Answer:
            async with end.first_alone():
                return await end.ask(body)

        tasks = [asyncio.ensure_future(one(b)) for b in numbered(8)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        result = await asyncio.gather(*tasks, return_exceptions=True)
        await end.close()
        return result

    stub.script(Reply(401, "{}", delay_s=0.2))
    found = asyncio.run(all_rejected(endpoint(stub)))
    assert isinstance(found[0], AgileError)
    assert len(stub.requests) <= 2


# --------------------------------------------------------------------------------------------------------------------
# The cache


def test_nothing_is_asked_twice(stub: StubEndpoint, tmp_path: Path) -> None:
    stub.script(called("Search", '{"argument": "SELECT 1 \\u2713 \\ud800"}'))
    prices = Prices(input=10.0)
    first = ask(one := endpoint(stub, cache=tmp_path / "a.sqlite", prices=prices), *numbered(3))
    again = ask(two := endpoint(stub, cache=tmp_path / "a.sqlite", prices=prices), *numbered(3))
    assert again == first
    assert len(stub.requests) == 3
    assert (one.num_requests, one.num_cached, one.spent.prompt_tokens) == (3, 0, 300)
    assert (two.num_requests, two.num_cached, two.spent) == (0, 3, Usage())
    assert again[0].usage.cost == pytest.approx(1e-3), "it is what the session costs, whoever paid"


def test_another_model_or_address_is_another_question(stub: StubEndpoint, tmp_path: Path) -> None:
    ask(endpoint(stub, cache=tmp_path / "a.sqlite"))
    for end in (
        Endpoint(stub.url, "other", cache=tmp_path / "a.sqlite"),
        Endpoint(stub.url.replace("127.0.0.1", "localhost"), "tiny", cache=tmp_path / "a.sqlite"),
    ):
        ask(end)
    ask(endpoint(stub, cache=tmp_path / "a.sqlite"), {**BODY, "seed": 1})
    assert len(stub.requests) == 4


def test_equal_requests_at_once_are_sent_once(stub: StubEndpoint) -> None:
    stub.script(Reply(200, said("fine").body, delay_s=0.1))
    answers = ask(end := endpoint(stub), *[BODY] * 5)
    assert [a.message["content"] for a in answers] == ["fine"] * 5
    assert len(stub.requests) == 1 and end.spent == answers[0].usage


def test_failures_are_not_kept(stub: StubEndpoint, tmp_path: Path) -> None:
    stub.script(Reply(500))
    with pytest.raises(RuntimeError):
        ask(endpoint(stub, cache=tmp_path / "a.sqlite"))
    stub.script(said("fine"))
    assert ask(endpoint(stub, cache=tmp_path / "a.sqlite"))[0].message["content"] == "fine"


def test_an_answer_under_way_is_kept_when_its_session_is_cancelled(stub: StubEndpoint, tmp_path: Path) -> None:
    stub.script(Reply(200, said("fine").body, delay_s=0.3))

    async def interrupted(end: Endpoint) -> None:
        task = asyncio.ensure_future(end.ask(BODY))
        waiting = asyncio.ensure_future(end.ask(numbered(1)[0]))
        while not stub.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        waiting.cancel()
        await end.close()

    asyncio.run(interrupted(endpoint(stub, cache=tmp_path / "a.sqlite", max_concurrent=1)))
    assert len(stub.requests) == 1, "what had not been sent is not sent any more"
    ask(endpoint(stub, cache=tmp_path / "a.sqlite"))
    assert len(stub.requests) == 1


@pytest.mark.parametrize("damage", ["text", "torn", "another database"])
def test_a_damaged_cache_is_refused_before_anything_is_paid(stub: StubEndpoint, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.sqlite"
    if damage == "another database":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE t (x)")
    else:
        ask(endpoint(stub, cache=path), *numbered(5))
        data = path.read_bytes()
        path.write_bytes(b"not SQLite at all" * 99 if damage == "text" else data[:100] + b"\xff" * (len(data) - 100))
    stub.requests.clear()
    with pytest.raises(AgileError, match=r"a\.sqlite"):
        ask(endpoint(stub, cache=path))
    assert not stub.requests


def test_a_locked_cache(stub: StubEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.memory.database._TIMEOUT_S", 0.1)
    end = endpoint(stub, cache=tmp_path / "a.sqlite")
    other = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(AgileError, match="locked"):
        ask(end)
    other.execute("ROLLBACK")
    other.close()


def test_the_key_of_a_request_does_not_depend_on_order() -> None:
    assert AnswerCache.key({"a": 1, "b": [2]}) == AnswerCache.key(json.loads('{"b": [2], "a": 1}'))
    assert AnswerCache.key({"a": 1}) != AnswerCache.key({"a": "1"})
