"""A chat endpoint on this machine that answers as a test wants it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "secret-key"


@dataclass(frozen=True)
class Reply:
    """What the endpoint sends back; a `delay_s` above the client's limit looks like a server that hangs."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


def said(content: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    """A chat completion of 100 tokens read, 40 of them cached, and 10 written."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 40}, "completion_tokens": 10}
    return Reply(body=json.dumps({"choices": [choice], "usage": usage}))


def called(name: str, arguments: str) -> Reply:
    """A tool call."""
    return said(None, "tool_calls", tool_calls=[{"id": "x", "function": {"name": name, "arguments": arguments}}])


def refused(status: int, message: str, **more: Any) -> Reply:
    return Reply(status, json.dumps({"error": {"message": message, **more}}))


class StubEndpoint:
    """Answers with `reply(body)`, and notes every request."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: said("[PredictAnswer] steel is washable")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.requests.append(body)
                    stub.keys.append(self.headers.get("Authorization"))
                    stub.times.append(time.monotonic())
                    stub.busy += 1
                    stub.most_busy = max(stub.most_busy, stub.busy)
                    reply = stub.reply(body)
                stub._stop.wait(reply.delay_s)
                with stub._lock:
                    stub.busy -= 1
                data = reply.body.encode()
                try:
                    self.send_response(reply.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def script(self, *replies: Reply) -> None:
        """These in turn; the last one for all that follow."""
        rest = list(replies)
        self.reply = lambda body: rest.pop(0) if len(rest) > 1 else rest[0]

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def stub_endpoint() -> Iterator[StubEndpoint]:
    stub = StubEndpoint()
    try:
        yield stub
    finally:
        stub.close()
