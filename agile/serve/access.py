"""Who may come in: cookies of people, keys of programs, and how often either may try."""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Form, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from itsdangerous import BadSignature, URLSafeTimedSerializer

from agile.errors import AgileError
from agile.serve import accounts
from agile.serve.accounts import ROLES
from agile.serve.database import Database
from agile.serve.errors import ApiError
from agile.serve.models import User

COOKIE, LOGIN_COOKIE = "agile_session", "agile_login"
KEY_S = 1.0  # how long a key is good after it was revoked
FAILED_LOGINS, FAILED_LOGINS_S = 5, 300.0


@dataclass(slots=True)
class Limiter:
    """At most `most` events of one kind in any `seconds`; forgotten at a restart."""

    most: int
    seconds: float
    _events: dict[Hashable, deque[float]] = field(default_factory=dict)

    def full(self, key: Hashable) -> bool:
        events, now = self._events.get(key, deque()), time.monotonic()
        while events and events[0] < now - self.seconds:
            events.popleft()
        if not events:
            self._events.pop(key, None)
        return len(events) >= self.most

    def add(self, key: Hashable) -> None:
        if len(self._events) > 10_000:  # somebody makes names up
            for old in list(self._events):
                self.full(old)
        self._events.setdefault(key, deque(maxlen=self.most)).append(time.monotonic())

    def forget(self, key: Hashable) -> None:
        self._events.pop(key, None)


@dataclass(frozen=True, slots=True)
class Login:
    """Somebody at the desk, and the token that their forms must carry."""

    user: User
    csrf: str

    def may(self, role: str) -> bool:
        return ROLES.index(self.user.role) >= ROLES.index(role)


class Access:
    """Cookies and limits of one server.

    Args:
        secret: Signs cookies.
        hours: How long a login lasts.
        secure: Whether cookies are for HTTPS alone.
        requests_per_minute: Questions of one user.
    """

    def __init__(
        self, database: Database, secret: str, *, hours: float, secure: bool, requests_per_minute: int
    ) -> None:
        self.database, self.secure, self.seconds = database, secure, int(3600 * hours)
        self._cookies = URLSafeTimedSerializer(secret, salt="desk")
        self.logins = Limiter(FAILED_LOGINS, FAILED_LOGINS_S)
        self.questions = Limiter(requests_per_minute, 60.0)
        self._keys: dict[str, tuple[User, float]] = {}  # whose they were, and when that was

    def new_cookie(self, user: User) -> str:
        """Of a login: signed, and with a token of its own, so that nobody can have set it beforehand."""
        return str(self._cookies.dumps({"user": user.id, "epoch": user.epoch, "csrf": secrets.token_urlsafe(24)}))

    def login(self, request: Request) -> Login | None:
        """Who a browser is logged in as."""
        try:
            said = self._cookies.loads(request.cookies.get(COOKIE, ""), max_age=self.seconds)
        except BadSignature:
            return None
        user = accounts.by_id(self.database, said["user"], said["epoch"])
        return None if user is None else Login(user, said["csrf"])

    def key_user(self, request: Request) -> User | None:
        """Whose API key a program shows."""
        key = _bearer(request)
        user = accounts.by_key(self.database, key) if key else None
        if user is not None:
            if len(self._keys) > 10_000:
                self._keys.clear()
            self._keys[accounts.digest(key)] = user, time.monotonic()
        return user

    def known_user(self, request: Request) -> User | None:
        """As `key_user`, if that has said so within `KEY_S`."""
        user, checked = self._keys.get(accounts.digest(_bearer(request)), (None, 0.0))
        return user if time.monotonic() - checked < KEY_S else None


def _bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def access_of(request: Request) -> Access:
    access: Access = request.app.state.desk.access
    return access


class Needs:
    """Dependency of pages: the login, if its role is high enough; forms must carry its token.

    >>> Needs("expert").role
    'expert'
    """

    def __init__(self, role: str) -> None:
        self.role = role

    def __call__(self, request: Request) -> Login:
        login = access_of(request).login(request)
        if login is None and request.method == "GET":
            raise HTTPException(303, headers={"location": "/login"})
        if login is None:
            raise HTTPException(401, "You are not logged in any more. Log in and try again.")
        if not login.may(self.role):
            raise HTTPException(403, f"This page is for the role {self.role}; you have the role {login.user.role}.")
        return login


class NeedsForm(Needs):
    """`Needs` for forms that change something."""

    def __call__(self, request: Request, csrf: Annotated[str, Form()] = "") -> Login:
        login = super().__call__(request)
        if not hmac.compare_digest(csrf.encode(), login.csrf.encode()):
            raise HTTPException(403, "The form was not of this login. Load the page again.")
        return login


async def api_user(request: Request) -> User:
    """Dependency of the API: whose key it is."""
    access = access_of(request)
    user = access.known_user(request) or await run_in_threadpool(access.key_user, request)
    if user is None:
        raise ApiError(
            401,
            "The API key is missing or not known. Send Authorization: Bearer KEY (agile serve-user key NAME).",
            type="authentication_error",
            code="invalid_api_key",
        )
    return user


def administrator(request: Request) -> User:
    """Dependency of what only administrators see, by key or cookie."""
    access = access_of(request)
    login = access.login(request)
    user = login.user if login is not None else access.key_user(request)
    if user is None:
        raise HTTPException(401, "Log in, or send the API key of an administrator.")
    if user.role != accounts.ADMINISTRATOR:
        raise HTTPException(403, f"This is for administrators; you have the role {user.role}.")
    return user


KeyUser = Annotated[User, Depends(api_user)]


def secret_of(folder: Path) -> str:
    """The secret that signs cookies, made at the first start and readable by its owner alone."""
    path = folder / "secret.key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(48))
        secret = path.read_text().strip()
    except OSError as error:
        raise AgileError(f"Cannot keep the secret of cookies in {path}: {error.strerror}.") from None
    if len(secret) < 32:
        raise AgileError(f"{path} holds no secret; remove it, and the server makes a new one (all log in again).")
    return secret
