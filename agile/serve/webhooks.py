"""Answers told to who asked, at an address that they gave: tried again and again, and never inside the own network."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from agile.serve.database import Database
from agile.serve.models import Asker, Question, Webhook
from agile.serve.requests import number_of

logger = logging.getLogger(__name__)
DUE, DELIVERED, FAILED = "due", "delivered", "failed"
DELAYS_S = (10.0, 60.0, 300.0, 1800.0, 7200.0, 21600.0, 43200.0)  # between tries; after the last it has failed
TIMEOUT_S = 10.0
MAX_URL = 2000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # whose addresses lead to any of IPv4


@dataclass(frozen=True, slots=True)
class Told:
    """How far a webhook is."""

    id: int
    question_id: str
    question: str
    host: str
    state: str
    attempts: int
    error: str
    late: bool


def problem(url: str) -> str:
    """Why this is no address of a webhook; empty if it is one."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "it cannot be read"
    if parts.scheme not in ("http", "https") or not parts.hostname or len(url) > MAX_URL:
        return "expected https://HOST/PATH"
    if parts.username is not None or any(ord(c) <= 32 for c in url):
        return "it holds a password or white space"
    return ""


def add(session: Session, question: int, url: str, late: str | None = None) -> None:
    """As part of a transaction, have the answer to a question told; `late` is what an expert said too late for it."""
    session.add(Webhook(question=question, url=url, late=late, state=DUE, attempts=0, next_at=time.time()))


def tell_late(database: Database, request_id: str, answer: str) -> None:
    """Have those told who gave an address and had stopped waiting for an expert."""
    with database.writing() as session:
        asked = session.scalars(
            select(Asker.session_id).where(Asker.request_id == request_id, Asker.status == "expired")
        )
        numbers = [number_of(name) for name in asked]
        first = select(Webhook).where(Webhook.question.in_(numbers), Webhook.late.is_(None))
        for webhook in session.scalars(first).all():
            add(session, webhook.question, webhook.url, answer)


def deliver(database: Database, body: Callable[[Question], dict[str, Any]], hosts: Collection[str]) -> list[str]:
    """Tell what is due, one after the other; the states that these webhooks now have.

    Args:
        body: What the API says of an answer.
        hosts: Names or addresses that may be reached although they are not public.
    """
    due = (
        select(Webhook, Question)
        .join(Question, Question.number == Webhook.question)
        .where(Webhook.state == DUE, Webhook.next_at <= time.time(), Question.finished_at.is_not(None))
        .order_by(Webhook.next_at)
        .limit(20)
    )
    with database.reading() as session:
        found = [(w, q) for w, q in session.execute(due)]
    states = []
    for webhook, question in found:
        late = {} if webhook.late is None else {"late_answer": webhook.late}
        error = send(webhook.url, {**body(question), **late}, hosts)
        attempts = webhook.attempts + 1
        state = DELIVERED if not error else FAILED if attempts > len(DELAYS_S) else DUE
        next_at = time.time() + DELAYS_S[min(attempts, len(DELAYS_S)) - 1]
        with database.writing() as session:
            changed = update(Webhook).where(Webhook.id == webhook.id)
            session.execute(changed.values(state=state, attempts=attempts, error=error, next_at=next_at))
        states.append(state)
    return states


def send(url: str, body: dict[str, Any], hosts: Collection[str]) -> str:
    """Post to an address; why that did not work, or nothing.

    The name is looked up once, and what was looked up is what is reached: it cannot become another address meanwhile.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"{host} is not known: {error.strerror}"
    addresses = [str(info[4][0]) for info in found]
    if host not in hosts and not all(map(is_public, addresses)):
        return f"{host} is an address of the own network; serve.webhook_hosts may name it"
    address = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    reached = urlunsplit((parts.scheme, f"{address}:{port}", parts.path or "/", parts.query, ""))
    headers = {"host": parts.netloc, "content-type": "application/json", "user-agent": "agile"}
    try:
        with (
            httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "POST",
                reached,
                content=json.dumps(body).encode(),
                headers=headers,
                extensions={"sni_hostname": host},
            ) as answer,
        ):
            return "" if answer.is_success else f"{host} answered with {answer.status_code}"
    except (httpx2.HTTPError, OSError) as error:
        return f"{host}: {type(error).__name__}: {error}"[:300]


def is_public(address: str) -> bool:
    """Whether an address is one of the whole network, not of this machine or of one that only it can reach.

    >>> [is_public(a) for a in ("93.184.216.34", "127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1")]
    [True, False, False, False, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in _NAT64 or found.sixtofour is not None or found.teredo is not None:
            return False
    return found.is_global and not found.is_multicast


def of(database: Database, numbers: Sequence[int]) -> list[Told]:
    """The webhooks of these questions."""
    return _told(database, select(Webhook, Question).where(Webhook.question.in_(numbers)))


def troubled(database: Database, *, limit: int = 20) -> list[Told]:
    """Those that failed, or did not work so far, the newest first."""
    return _told(database, select(Webhook, Question).where(Webhook.error != "", Webhook.state != DELIVERED), limit)


def again(database: Database, webhook: int) -> bool:
    """Try one anew, from the first delay; False if there is none that was not delivered."""
    with database.writing() as session:
        found = session.get(Webhook, webhook)
        if found is None or found.state == DELIVERED:
            return False
        found.state, found.attempts, found.next_at = DUE, 0, time.time()
        return True


def _told(database: Database, found: Any, limit: int = 100) -> list[Told]:
    found = found.join(Question, Question.number == Webhook.question).order_by(Webhook.id.desc()).limit(limit)
    with database.reading() as session:
        return [
            Told(w.id, q.id, q.text, urlsplit(w.url).hostname or "", w.state, w.attempts, w.error, w.late is not None)
            for w, q in session.execute(found)
        ]
