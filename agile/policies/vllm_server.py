"""vLLM servers as a policy: requests over HTTP to the least loaded one, weights through a shared folder."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from torch import Tensor

from agile import ranks, threads
from agile.errors import AgileError
from agile.policies.serving import TOLERANCE, ServedModel, check_logprobs, mean_difference, not_taken_over
from agile.policies.vllm_http import (
    REMEDY,
    Busy,
    Failed,
    LoadFailed,
    Pushed,
    Server,
    patience,
    read_answer,
    read_completion,
    reading,
    request_body,
)
from agile.types import Completion

logger = logging.getLogger(__name__)

T = TypeVar("T")
OUTDATED = "newer weights came while it was given the last ones"
FRESH = "default"  # what vLLM calls the weights that a server was started with


async def _aside(function: Callable[[], T]) -> T:
    """Run a blocking function; the end of the event loop does not wait for it, as it does for `asyncio.to_thread`."""
    return await asyncio.wrap_future(threads.start(function))


class VLLMServerPolicy:
    """Samples with vLLM servers, which may be on other machines and in environments of their own.

    A request goes to the server with the fewest under way; when all have as many as they may, it waits. It is repeated,
    there or elsewhere, when a server is busy, fails or dies; the seed makes the answer the same. A dead server is left
    out and tried again; before it is used again it gets the current weights. The distribution is
    softmax(logits / temperature), never truncated.

    Args:
        model: A folder with the config of the model that the servers serve.
        servers: Their addresses, `http://host:port`.
        num_tokens: Length of the tokenizer, to be checked against the model; None for no check.
        name: What the servers call the model.
        dtype: What the servers were started with; says how exact their log-probabilities are.
        max_model_len: Most tokens of prompt and completion that will be asked for; the model's own by default.
        temperature: Of sampling.
        weights_dir: Where `update_weights` writes, one folder per version and run; the servers see it under the same
            path. `close` removes them.
        timeout_s: How long a request may go unanswered, over all tries, before the run ends. While it waits for a
            server with room, only the time counts in which no server answers any request.
        request_timeout_s: How long one try may take; `timeout_s` by default.
        max_active: Most requests under way at one server.
        retry_s: How long a dead server is left out while others live.
        verify: Compare log-probabilities with transformers' after each update of the weights, and with those of `model`
            if completions are asked for before the first update. Loads the weights on the CPU of this machine.

    Raises:
        AgileError: No server answers, or one serves another model or with other options than this policy needs.
    """

    def __init__(
        self,
        model: str | Path,
        servers: Sequence[str],
        *,
        num_tokens: int | None = None,
        name: str = "agile",
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        temperature: float = 1.0,
        weights_dir: str | Path | None = None,
        timeout_s: float = 300.0,
        request_timeout_s: float | None = None,
        max_active: int = 256,
        retry_s: float = 30.0,
        verify: bool = True,
    ):
        if not servers:
            raise AgileError(
                "rollout.policy=vllm-server needs the address of a server (vllm.servers=[http://host:port]). " + REMEDY
            )
        self.model = ServedModel.read(model, max_model_len=max_model_len, num_tokens=num_tokens)
        self.name = name
        self.dtype = dtype
        self.temperature = temperature
        self.forbidden: Collection[int] = ()
        self.weights_dir = None if weights_dir is None else Path(weights_dir).absolute()
        self.timeout_s = timeout_s
        self.max_active = max_active
        self.retry_s = retry_s
        self.verify = verify
        self.version = 0
        self._servers = [Server(url.rstrip("/")) for url in servers]
        # tells this run's weights from another's on the same server
        self._run: str = ranks.broadcast(os.urandom(4).hex())
        self._pushed: Pushed | None = None
        self._own: list[float] | None = None  # log-probabilities of the probe under the weights of the model folder
        self._own_lock = threading.Lock()
        self._written: list[Path] = []
        self._random = random.Random()
        self._waiting: deque[asyncio.Future[None]] = deque()  # requests for which no server has room
        self._answered = 0.0  # when any server last did
        # addresses are reached directly; a proxy of the environment is for the world outside
        secure = any(url.startswith("https:") for url in servers)
        self._tls = httpx2.create_ssl_context() if secure else False  # reading certificates takes long
        self._client = httpx2.Client(trust_env=False, verify=self._tls)
        self._async: tuple[asyncio.AbstractEventLoop, httpx2.AsyncClient] | None = None
        self._request_timeout_s = timeout_s if request_timeout_s is None else request_timeout_s
        for server in self._servers:
            try:
                self._check(server)
            except (Failed, Busy) as error:
                self._take_out(server, error)
        if not any(s.up for s in self._servers):
            raise self._none_left()

    # ----------------------------------------------------------------------------------------------------------------
    # Requests

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        self.model.check_request(prompt_ids, max_tokens)
        bias = {"logit_bias": {str(i): -100.0 for i in self.forbidden}} if self.forbidden else {}
        body = request_body(
            self.name,
            prompt_ids,
            temperature=self.temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=sorted(stop),
            **bias,
        )
        asked_at = time.monotonic()
        spent_s, delay_s = 0.0, 0.25  # `spent_s` on tries and pauses, not on waiting for room
        failed: set[Server] = set()
        while True:
            server = await self._choose(asked_at, failed)
            began_at = time.monotonic()
            try:
                if self.verify and not self._pushed and not server.compared:
                    await self._compare(server)
                    continue  # others may have taken the room
                return await self._generate(server, body)
            except Busy as busy:
                server.last_error = str(busy)
                wait_s = busy.after_s or delay_s
            except Failed as error:
                failed.add(server)
                await self._note_failure(server, error, began_at)
                wait_s = 0.0 if error.gone else delay_s
            delay_s = min(2 * delay_s, 10.0)
            wait_s *= self._random.uniform(1.0, 1.5)  # not all at once again
            left_s = self.timeout_s - spent_s - (time.monotonic() - began_at)
            await asyncio.sleep(max(0.0, min(wait_s, left_s)))
            spent_s += time.monotonic() - began_at
            if spent_s >= self.timeout_s and all(s in failed for s in self._servers if s.up):
                raise self._none_left()

    async def _choose(self, asked_at: float, failed: Collection[Server]) -> Server:
        """A server with room, of which those that `failed` this request come last."""
        ready: asyncio.Future[None] | None = None
        try:
            while True:
                now = time.monotonic()
                if ready and now >= max(asked_at, self._answered) + self.timeout_s:
                    raise self._none_left()
                for server in self._servers:
                    if not server.up and now >= server.next_try and (server.revival is None or server.revival.done()):
                        server.revival = asyncio.create_task(self._revive(server))
                up = [s for s in self._servers if s.up]
                if room := [s for s in up if s.active < self.max_active]:
                    return min(room, key=lambda s: (s in failed, s.active))
                if ready is None or ready.done():
                    queue = self._waiting.append if ready is None else self._waiting.appendleft  # if it was overtaken
                    ready = asyncio.get_running_loop().create_future()
                    queue(ready)
                await asyncio.wait([ready], timeout=min(0.5, self.timeout_s / 10) if up else 0.05)
        finally:
            if ready:
                ready.cancel()

    def _leave(self, server: Server) -> None:
        """One request less at a server: one that waits may go there."""
        server.active -= 1
        loop = asyncio.get_running_loop()
        while self._waiting:
            ready = self._waiting.popleft()
            if ready.get_loop() is loop and not ready.done():
                ready.set_result(None)
                break

    async def _generate(self, server: Server, body: dict[str, Any]) -> Completion:
        server.active += 1
        try:
            response = await self._async_client().post(f"{server.url}/inference/v1/generate", json=body)
        except httpx2.RequestError as error:
            raise Failed.of(error) from None
        finally:
            self._leave(server)
        completion, labels = read_completion(response, self.version)
        self._check_label(server, labels)
        server.failures = 0
        self._answered = time.monotonic()
        return completion

    async def _compare(self, server: Server) -> None:
        """Refuse a server that was started from other weights; requests that come meanwhile wait together."""
        loop = asyncio.get_running_loop()
        task = server.comparison
        if task is None or task.done() or task.get_loop() is not loop:
            task = server.comparison = loop.create_task(_aside(lambda: self._check_own(server)))
        await asyncio.shield(task)
        server.compared = True

    def _check_own(self, server: Server) -> None:
        found, labels = self._ask_probe(server)
        self._check_label(server, labels)
        with self._own_lock:
            self._own = self._own or self.model.folder_logprobs()
        difference = mean_difference(found, self._own)
        if not difference <= TOLERANCE[self.dtype] and not self._pushed:
            raise AgileError(
                f"{server.url} serves other weights than {self.model.folder}: its log-probabilities of {len(found)} "
                f"tokens are off by {difference:.3g} on average, {TOLERANCE[self.dtype]:g} is what {self.dtype} "
                "explains. Start it from that folder, or push weights by update_weights."
            )

    def _check_label(self, server: Server, labels: set[str]) -> None:
        expected = self._pushed.label if self._pushed else FRESH
        if labels == {expected}:
            return
        if all(label == FRESH or label.endswith(self._run) for label in labels):
            raise Failed(f"it was restarted and holds weights {labels}, not {expected}", gone=True)
        raise AgileError(
            f"{server.url} holds the weights {', '.join(sorted(labels))}, expected {expected}: another run gave it its "
            "own. Restart the server, or give each run servers of its own."
        )

    def _async_client(self) -> httpx2.AsyncClient:
        """One per event loop: connections do not outlive theirs."""
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
            timeout = patience(self._request_timeout_s)
            client = httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=self._tls)
            self._async = (loop, client)
        return self._async[1]

    # ----------------------------------------------------------------------------------------------------------------
    # Servers that fail, and come back

    async def _note_failure(self, server: Server, error: Failed, began_at: float) -> None:
        server.last_error = str(error)
        if not server.up or (began_at < server.failed_at and not error.gone):
            return  # with this request others failed, and one of them was counted
        server.failures += 1
        server.failed_at = time.monotonic()
        dead = error.gone or server.failures >= 3
        if error.silent and not dead:
            dead = not await self._is_healthy(server)
        if server.up and dead:
            self._take_out(server, error)

    async def _is_healthy(self, server: Server) -> bool:
        """Whether a server that left a request without an answer is busy rather than dead."""
        try:
            timeout = patience(min(10.0, self._request_timeout_s))
            response = await self._async_client().get(f"{server.url}/health", timeout=timeout)
        except httpx2.RequestError:
            return False
        return response.status_code < 500

    def _take_out(self, server: Server, error: Exception) -> None:
        server.up = False
        server.last_error = str(error)
        others = sum(s.up for s in self._servers)
        server.next_try = time.monotonic() + (self.retry_s if others else 0.5)
        logger.warning("%s is left out (%s); %d other servers are left.", server.url, error, others)

    async def _revive(self, server: Server) -> None:
        """Look whether a server is back, and give it the current weights before anyone uses it."""
        try:
            await _aside(lambda: self._check(server))
            if pushed := self._pushed:
                await _aside(lambda: self._push(server, pushed))
            if pushed != self._pushed:
                raise Failed(OUTDATED)
        except (Failed, Busy, AgileError) as error:
            server.last_error = str(error)
            server.next_try = time.monotonic() + (self.retry_s if any(s.up for s in self._servers) else 0.5)
            return
        self._take_back(server)

    def _take_back(self, server: Server) -> None:
        server.up, server.failures, server.compared = True, 0, False  # it may have been restarted
        logger.warning("%s is back.", server.url)

    def _none_left(self) -> AgileError:
        errors = "; ".join(f"{s.url}: {s.last_error or 'no error'}" for s in self._servers)
        return AgileError(
            f"No vLLM server answered within {self.timeout_s:g} s ({errors}). Are they running? If they are only slow, "
            f"raise vllm.timeout_s. {REMEDY}"
        )

    # ----------------------------------------------------------------------------------------------------------------
    # What a server must be like

    def _ask(self, server: Server, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0) -> Any:
        """GET, or POST of a body; also from threads."""
        method = "GET" if body is None else "POST"
        try:
            response = self._client.request(method, server.url + path, json=body, timeout=patience(timeout_s))
        except httpx2.RequestError as error:
            raise Failed.of(error) from None
        return read_answer(response)

    def _check(self, server: Server) -> None:
        """Refuse a server that would sample something else than asked for.

        Raises:
            AgileError: Its model, vocabulary, context or options are not those of this policy.
        """
        answer = self._ask(server, "/v1/models")
        with reading():
            models = {str(m["id"]): int(m.get("max_model_len") or 0) for m in answer["data"]}
        if self.name not in models:
            raise AgileError(f"{server.url} serves {sorted(models)}, expected {self.name!r}. {REMEDY}")
        if (found := models[self.name]) < self.model.max_model_len:
            raise AgileError(
                f"{server.url} serves a context of {found} tokens, expected {self.model.max_model_len}. Start it with "
                f"--max-model-len {self.model.max_model_len}, or lower rollout.max_context_tokens."
            )
        size = self.model.vocab_size
        self._ask_top(server, logit_bias={str(size - 1): 0.0})
        try:
            self._ask_top(server, logit_bias={str(size): 0.0})
        except AgileError:
            pass  # vLLM refuses ids out of the vocabulary
        else:
            raise AgileError(f"{server.url} has a vocabulary larger than the {size} of {self.model.folder}. {REMEDY}")
        if self.temperature not in (0.0, 1.0):
            plain, tempered = (self._ask_top(server, temperature=t, logprobs=5) for t in (1.0, self.temperature))
            if all(abs(plain[i] - tempered[i]) < 1e-6 for i in plain.keys() & tempered.keys()):
                raise AgileError(
                    f"{server.url} gives log-probabilities of temperature 1, expected those of temperature "
                    f"{self.temperature:g}. Start it with --logprobs-mode processed_logprobs."
                )

    def _ask_top(self, server: Server, **sampling: Any) -> dict[int, float]:
        """The likeliest first tokens of a completion."""
        body = request_body(self.name, self.model.probe, max_tokens=1, seed=0, **sampling)
        answer = self._ask(server, "/inference/v1/generate", body)
        with reading():
            (choice,) = answer["choices"]
            return {int(t["token_id"]): float(t["logprob"]) for t in choice["logprobs"]["content"][0]["top_logprobs"]}

    # ----------------------------------------------------------------------------------------------------------------
    # Weights

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.weights_dir is None:
            raise AgileError(
                "To update the weights of servers, set vllm.weights_dir to a folder that they see under the same "
                "path, on a shared file system if they are on other machines."
            )
        error: AgileError | None = None
        weights = iter(weights)
        if ranks.is_main():
            try:
                self._take_over(weights, f"{version}-{self._run}")
            except AgileError as reason:
                error = reason
        for _ in weights:  # they may be gathered from all processes: each must walk through all of them
            pass
        error, self._pushed = ranks.broadcast((error, self._pushed))
        if error is not None:
            raise error
        self.version = version

    def _take_over(self, weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Write the weights, and have all servers load them; if there are none, wait for the first that comes back."""
        assert self.weights_dir is not None
        folder = self.weights_dir / label
        self.model.write(weights, folder)
        self._written = [f for f in self._written if f != folder] + [folder]
        expected = self.model.written_logprobs(folder) if self.verify else None
        self._pushed = pushed = Pushed(folder, label, expected)
        end = time.monotonic() + self.timeout_s
        refusals: list[LoadFailed] = []
        errors = self._push_all([s for s in self._servers if s.up], pushed)
        while not any(s.up for s in self._servers):
            refusals += [e for e in errors if isinstance(e, LoadFailed)]
            if len(refusals) > len(self._servers):  # not a mishap of one that dies
                raise AgileError(str(refusals[-1]))
            if time.monotonic() >= end:
                raise self._none_left()
            time.sleep(min(0.5, self.timeout_s / 10))
            errors = self._push_all(self._servers, pushed)
        for old in self._written[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        self._written = self._written[-2:]

    def _push_all(self, servers: Iterable[Server], pushed: Pushed) -> list[Exception | None]:
        futures = [threads.start(partial(self._try_push, server, pushed)) for server in servers]
        wait(futures)
        return [future.result() for future in futures]

    def _try_push(self, server: Server, pushed: Pushed) -> Exception | None:
        """Push to a server, which is left out if it fails and used again if it was."""
        try:
            if not server.up:
                self._check(server)
        except (Failed, Busy, AgileError) as error:
            server.last_error = str(error)
            return error
        try:
            self._push(server, pushed)
        except (Failed, Busy) as error:
            if server.up:
                self._take_out(server, error)
            server.last_error = str(error)
            return error
        if not server.up:
            self._take_back(server)
        return None

    def _push(self, server: Server, pushed: Pushed) -> None:
        """Have a server load the weights, forget what it cached under the old ones, and prove it.

        Raises:
            AgileError: It does not, or was not started in a mode that allows it.
        """
        with server.push:
            if pushed != self._pushed:
                raise Failed(OUTDATED)
            kwargs = {"weights_path": str(pushed.folder)}
            body = {"method": "reload_weights", "kwargs": kwargs}
            self._ask(server, "/collective_rpc", body, timeout_s=max(self.timeout_s, 60.0))
            answer = self._ask(server, "/reset_prefix_cache", {})
            with reading():
                reset = answer["success"]
            if not reset:
                raise AgileError(
                    f"{server.url} kept its prefix cache, which other weights filled: somebody else's requests run "
                    "there. Give each run servers of its own."
                )
            self._ask(server, "/update_weight_version", {"new_version": pushed.label})
            answer = self._ask(server, "/weight_info")
            with reading():
                label = str(answer["weight_version"])
            self._check_label(server, {label})
            if pushed.expected is not None:
                try:
                    found, _ = self._ask_probe(server)
                except AgileError as error:  # what it holds gives no numbers, or it would answer as it did before
                    raise not_taken_over(server.url, f"with what it holds it cannot score ({error})") from None
                check_logprobs(found, pushed.expected, self.dtype, server.url)

    def _ask_probe(self, server: Server) -> tuple[list[float], set[str]]:
        """The server's log-probabilities of the probe, and what it calls its weights."""
        probe = self.model.probe
        answer = self._ask(
            server, "/inference/v1/generate", request_body(self.name, probe, max_tokens=1, prompt_logprobs=0)
        )
        with reading():
            rows = zip(probe[1:], answer["prompt_logprobs"][1:], strict=True)
            (choice,) = answer["choices"]
            labels = {str(span["version"]) for span in choice["weight_versions"]}
            return [float(row[str(i)]["logprob"]) for i, row in rows], labels

    def close(self) -> None:
        """Drop the connections and the weights that were written."""
        self._client.close()
        self._async = None
        for folder in self._written:
            shutil.rmtree(folder, ignore_errors=True)
        self._written = []
