"""Around every request: a limit on its size, headers that keep browsers safe, and a line of log without secrets."""

from __future__ import annotations

import json
import logging
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("agile.serve.requests")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware.

    Args:
        max_body_bytes: Bodies are read whole before anybody sees them; longer ones are answered with 413.
        secure: Whether browsers come by HTTPS and should stay there.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, *, secure: bool) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self.headers = HEADERS + (((b"strict-transport-security", b"max-age=31536000"),) if secure else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, status = uuid.uuid4().hex[:16], time.monotonic(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                added = (*self.headers, (b"x-request-id", request_id.encode()), (b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *(h for h in added if h[0] not in given)]
            await send(message)

        try:
            body = await self._body(scope, receive)
            if body is None:
                await _refuse(sent, self.max_body_bytes)
            else:
                await self.app(scope, _replayed(body, receive), sent)
        finally:
            line = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1000 * (time.monotonic() - began), 1),
            }
            logger.info("request", extra={"fields": line})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too long."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""  # who asked has gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, limit: int) -> None:
    error = {"message": f"The body is longer than {limit} bytes.", "type": "invalid_request_error", "code": "too_large"}
    body = json.dumps({"error": {**error, "param": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # the rest of the body is not read: the connection is of no more use
    await send({"type": "http.response.start", "status": 413, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
