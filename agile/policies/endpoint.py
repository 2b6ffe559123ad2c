"""A chat endpoint that speaks OpenAI's protocol: retries, rate limits, money, and answers kept for the next run."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import openai

from agile.errors import AgileError
from agile.policies.answer_cache import AnswerCache
from agile.types import Usage, to_json

logger = logging.getLogger(__name__)

ATTEMPTS = 6  # of a request that fails; waiting for a rate limit is no failure
MAX_BACKOFF_S = 30.0
MAX_WAIT_S = 600.0  # an endpoint that asks for more is out of quota
SECTION = "evaluate.prompted"  # of the config, for errors
MAX_WAITS = 50  # of one request for a rate limit


@dataclass(frozen=True, slots=True)
class Prices:
    """Money for a million tokens; cached input costs as much as other input if its price is None."""

    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None

    def of(self, usage: Usage) -> Usage:
        """The same usage with its cost."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.prompt_tokens - usage.cached_tokens
        total = fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output
        return replace(usage, cost=total / 1e6)


@dataclass(frozen=True, slots=True)
class Answer:
    """The `message` of the protocol, why it ended (`length`: cut off), and what it took, failed attempts included."""

    message: Mapping[str, Any]
    finish_reason: str
    usage: Usage


def read_key(base_url: str, variable: str | None, section: str = SECTION) -> str | None:
    """The key in an environment variable; None where none is needed.

    Raises:
        AgileError: The variable is not set.
    """
    key = os.environ.get(variable, "").strip() if variable else None
    if variable and not key:
        raise AgileError(
            f"The key for {base_url} is missing: set the environment variable {variable}, or name another one with "
            f"{section}.api_key_env (null for an endpoint without keys)."
        )
    return key


class Rejected(Exception):
    """The endpoint does not accept a request (400, 404, 422)."""

    def __init__(self, status: int, text: str, code: str | None):
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text.lower()
        self.code = code


class _Unusable(Exception):
    """An answer that holds nothing to use, but may have been charged."""

    def __init__(self, reason: str, usage: Usage):
        super().__init__(reason)
        self.usage = usage


@dataclass(slots=True)
class _Line:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore
    first: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: dict[str, asyncio.Task[Answer]] = field(default_factory=dict)
    sending: set[asyncio.Task[Any] | None] = field(default_factory=set)
    closing: bool = False


class Endpoint:
    """Asks a model of an endpoint, every question once.

    Args:
        base_url: Up to and including `/v1`.
        model: As the endpoint names it.
        api_key_env: Environment variable that holds the key; None for an endpoint without keys.
        max_concurrent: Most requests under way at once.
        requests_per_minute: Requests are spaced to stay below it; None for no limit but the endpoint's own.
        timeout_s: Of one attempt.
        prices: What tokens cost.
        cache: SQLite file of answers; None keeps them in RAM.
        backoff_s: Wait after a first failure; it doubles with each further one.
        section: The section of the config that holds all this: errors name it.

    Attributes:
        spent: What the requests of this process took; answers of the cache take nothing.
        num_requests: Attempts that were sent.
        num_cached: Questions that the cache answered.

    Raises:
        AgileError: The variable of the key is not set, or the cache cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        max_concurrent: int = 8,
        requests_per_minute: float | None = None,
        timeout_s: float = 120.0,
        prices: Prices | None = None,
        cache: Path | None = None,
        backoff_s: float = 1.0,
        section: str = SECTION,
    ):
        self._key = read_key(base_url, api_key_env, section)
        self.section = section
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.max_concurrent = max_concurrent
        self.interval_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.timeout_s = timeout_s
        self.prices = prices or Prices()
        self.cache = AnswerCache(cache)
        self.backoff_s = backoff_s
        self.spent = Usage()
        self.num_requests = self.num_cached = 0
        self.answered = False
        self._next_start = 0.0  # of `time.monotonic`
        self._here: _Line | None = None

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a request body (`model` is added); equal requests are sent once, also concurrent ones.

        Raises:
            AgileError: No other request would fare better: key, model, address, quota or disk.
            Rejected: The endpoint does not accept this request.
            RuntimeError: It failed again and again.
        """
        body = {"model": self.model, **body}
        line, key = self._line(), self.cache.key({"base_url": self.base_url, **body})
        if key not in line.tasks:
            if (kept := self.cache.get(key)) is not None:
                self.answered = True
                self.num_cached += 1
                return Answer(kept["message"], kept["finish_reason"], self.prices.of(Usage(**kept["usage"])))
            task = asyncio.ensure_future(self._pay(line, key, body))
            line.tasks[key] = task
            task.add_done_callback(lambda done: (line.tasks.pop(key), done.cancelled() or done.exception()))
        # what is under way is paid: it is waited for and kept, even if the session that asked is cancelled
        return await asyncio.shield(line.tasks[key])

    @asynccontextmanager
    async def first_alone(self) -> AsyncIterator[None]:
        """Until a first answer has come, one at a time: what all requests have wrong is found by one of them."""
        lock = self._line().first
        async with lock:
            if not self.answered:
                yield
                return
        yield

    async def close(self) -> None:
        """Wait for the answers that are under way, and keep them; send nothing more."""
        line, self._here = self._here, None
        if line is not None and line.loop is asyncio.get_running_loop():
            await self._drain(line)
        self.cache.close()

    async def _drain(self, line: _Line) -> None:
        line.closing = True
        tasks = list(line.tasks.values())
        if line.sending:
            logger.info("Waiting for %d answers that are under way: they are paid for.", len(line.sending))
        for task in tasks:
            if task not in line.sending:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await line.client.close()

    def _line(self) -> _Line:
        loop = asyncio.get_running_loop()
        if self._here is None or self._here.loop is not loop:
            client = openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout_s
            )
            self._here = _Line(loop, client, asyncio.Semaphore(self.max_concurrent))
        return self._here

    # ---------------------------------------------------------------------------------------------------------------

    async def _pay(self, line: _Line, key: str, body: Mapping[str, Any]) -> Answer:
        async with line.slots:
            answer = await self._send(line, body)
        usage = replace(answer.usage, cost=0.0)  # prices may be corrected later
        kept = {"message": answer.message, "finish_reason": answer.finish_reason, "usage": to_json(usage)}
        self.cache.put(key, kept)
        self.answered = True
        return answer

    async def _send(self, line: _Line, body: Mapping[str, Any]) -> Answer:
        """One answer, whatever number of attempts it takes."""
        taken, failures, waits = Usage(), 0, 0
        while True:
            await self._turn(line)
            try:
                answer = await self._attempt(line, body)
                usage = self.prices.of(answer.usage)
                self.spent += usage
                return replace(answer, usage=taken + usage)
            except openai.RateLimitError as error:
                waits += 1
                self._wait_for_quota(error, waits)
            except (openai.APIConnectionError, openai.APIStatusError, TimeoutError, _Unusable) as error:
                if isinstance(error, openai.APIStatusError):
                    self._give_up(error)
                if isinstance(error, _Unusable):
                    usage = self.prices.of(error.usage)
                    self.spent, taken = self.spent + usage, taken + usage
                failures += 1
                if failures >= ATTEMPTS or line.closing:
                    raise self._failed(error) from error
                asked = _retry_after(error.response.headers) if isinstance(error, openai.APIStatusError) else None
                delay = min(MAX_BACKOFF_S, self.backoff_s * 2 ** (failures - 1)) if asked is None else asked
                logger.info("%s: %s; attempt %d of %d follows", self.base_url, error, failures + 1, ATTEMPTS)
                await asyncio.sleep(min(MAX_WAIT_S, delay))

    async def _attempt(self, line: _Line, body: Mapping[str, Any]) -> Answer:
        headers = {} if self._key else {"Authorization": openai.omit}
        create: Any = line.client.chat.completions.with_raw_response.create
        task = asyncio.current_task()
        self.num_requests += 1
        line.sending.add(task)
        try:
            async with asyncio.timeout(self.timeout_s):  # the client's own limit is for each read
                response = await create(**body, extra_headers=headers)
        finally:
            line.sending.discard(task)
        self._heed(response.headers)
        return _read(response.text)

    async def _turn(self, line: _Line) -> None:
        """Wait until the rate limit lets one more request through."""
        while (delay := self._next_start - time.monotonic()) > 0 and not line.closing:
            await asyncio.sleep(delay)
        if line.closing:
            raise asyncio.CancelledError
        self._next_start = time.monotonic() + self.interval_s

    def _heed(self, headers: Mapping[str, str]) -> None:
        """Pause everybody where the endpoint says that nothing remains."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
                reset = _seconds(headers.get(f"x-ratelimit-reset-{kind}", ""))
                self._pause(min(reset or 0.0, MAX_WAIT_S))

    def _pause(self, seconds: float) -> None:
        self._next_start = max(self._next_start, time.monotonic() + seconds)

    def _wait_for_quota(self, error: openai.RateLimitError, waits: int) -> None:
        headers = error.response.headers
        asked = _retry_after(headers)
        if asked is None:
            asked = _seconds(headers.get("x-ratelimit-reset-requests", ""))
        delay = min(MAX_BACKOFF_S, self.backoff_s * 2 ** (waits - 1)) if asked is None else asked
        if error.code == "insufficient_quota" or delay > MAX_WAIT_S or waits > MAX_WAITS:
            raise AgileError(
                f"{self.base_url} lets no more requests through: {_said(error)}. Raise the quota or wait, then start "
                "again: what was answered is kept and not paid for twice."
            ) from error
        logger.info("%s: rate limit, all requests wait %.1f s", self.base_url, delay)
        self._pause(delay)

    def _give_up(self, error: openai.APIStatusError) -> None:
        """Raise for what no further attempt would mend."""
        status = error.status_code
        if status in (401, 402, 403):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "requests without a key"
            raise AgileError(
                f"{self.base_url} does not accept {key} ({status}: {_said(error)}). Check the key, its rights and its "
                f"credit, and {self.section}.base_url."
            ) from error
        if status in (400, 404, 413, 422):
            raise Rejected(status, _said(error), error.code) from error
        if status < 500 and status not in (408, 409, 425):
            raise RuntimeError(f"{self.base_url} answered {status}: {_said(error)}") from error

    def _failed(self, error: Exception) -> Exception:
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return TimeoutError(f"{self.base_url} gave no answer within {self.timeout_s:g} s, {ATTEMPTS} times")
        if isinstance(error, openai.APIConnectionError):
            return AgileError(
                f"Cannot reach {self.base_url}: {error.__cause__ or error}. Check {self.section}.base_url, the "
                "network and whether the server runs; what was answered is kept."
            )
        reason = f"{error.status_code}: {_said(error)}" if isinstance(error, openai.APIStatusError) else error
        return RuntimeError(f"{self.base_url} gave no usable answer in {ATTEMPTS} attempts; the last: {reason}")


def _read(text: str) -> Answer:
    """The answer in a response body.

    Raises:
        _Unusable: There is none.
        RuntimeError: The model came to no answer within its token limit.
    """
    try:
        data = json.loads(text)
        usage = _usage(data.get("usage"))
        choice = data["choices"][0]
        message = {key: choice["message"].get(key) for key in ("content", "tool_calls", "refusal")}
        finish_reason = str(choice.get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Unusable(f"expected a chat completion, found {text[:200]!r}", Usage()) from None
    if isinstance(parts := message["content"], list):
        message["content"] = "".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))
    if not any(message.values()):
        if finish_reason == "length":
            raise RuntimeError("the model used up its tokens before it answered; raise max_tokens")
        raise _Unusable("an empty answer", usage)
    return Answer(message, finish_reason, usage)


def _usage(data: Any) -> Usage:
    if not isinstance(data, dict):
        return Usage()
    details = data.get("prompt_tokens_details") or {}
    prompt, cached, written = (
        int(v or 0) for v in (data.get("prompt_tokens"), details.get("cached_tokens"), data.get("completion_tokens"))
    )
    return Usage(prompt, min(cached, prompt), written)


def _said(error: openai.APIStatusError) -> str:
    """What the endpoint said, in one short line."""
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(text or error.message).split())[:300].rstrip(".")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, of a header that holds them or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _seconds(text: str) -> float | None:
    """A duration as rate limit headers write it.

    >>> _seconds("6m0s"), _seconds("120ms"), _seconds("1h2m3.5s"), _seconds("7"), _seconds("soon")
    (360.0, 0.12, 3723.5, 7.0, None)
    """
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    if not re.fullmatch(r"(\d+(\.\d+)?(h|ms|m|s))+|\d+(\.\d+)?", text):
        return None
    return sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(h|ms|m|s|)", text))
