"""Who may do what: accounts with passwords, and API keys. Neither is kept, only what checks them."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from agile.errors import AgileError
from agile.serve.database import Database
from agile.serve.models import ApiKey, User

USER, EXPERT, ADMINISTRATOR = ROLES = ("user", "expert", "administrator")
MIN_PASSWORD = 10
KEY_PREFIX = "agile-"

_hasher = PasswordHasher()
_NOBODY = _hasher.hash(secrets.token_urlsafe())  # checked for unknown names, so that they take as long as known ones


def add_user(database: Database, name: str, role: str, password: str) -> User:
    """Make an account.

    Raises:
        AgileError: The name is taken or odd, the role unknown, the password short.
    """
    if not re.fullmatch(r"[\w.@+-]{1,64}", name):
        raise AgileError(f"The name {name!r} cannot be used: expected 1 to 64 letters, digits or . _ @ + -")
    if role not in ROLES:
        raise AgileError(f"The role is {role!r}, expected one of {', '.join(ROLES)}.")
    user = User(name=name, role=role, password_hash=_hashed(password), created_at=time.time())
    with database.writing() as session:
        if _by_name(session, name) is not None:
            raise AgileError(f"There is a user {name!r} already; choose another name, or set a password for this one.")
        session.add(user)
    return user


def set_password(database: Database, name: str, password: str) -> None:
    """Give a user another password, and end what is logged in under the old one."""
    hashed = _hashed(password)
    with database.writing() as session:
        user = _named(session, name)
        user.password_hash, user.epoch = hashed, user.epoch + 1


def disable_user(database: Database, name: str) -> None:
    """Shut a user out: no login, no key works any more; what they said stays."""
    with database.writing() as session:
        user = _named(session, name)
        user.disabled, user.epoch = True, user.epoch + 1


def users(database: Database) -> Sequence[User]:
    with database.reading() as session:
        return session.scalars(select(User).order_by(User.id)).all()


def by_password(database: Database, name: str, password: str) -> User | None:
    """The user whose name and password these are."""
    with database.reading() as session:
        user = _by_name(session, name)
    try:
        _hasher.verify(_NOBODY if user is None else user.password_hash, password)
    except (VerificationError, InvalidHashError):
        return None
    return None if user is None or user.disabled else user


def by_id(database: Database, user_id: int, epoch: int) -> User | None:
    """The user of a cookie, if it has not been ended since."""
    with database.reading() as session:
        user = session.get(User, user_id)
    return user if user is not None and not user.disabled and user.epoch == epoch else None


def end_sessions(database: Database, user_id: int) -> None:
    """Log a user out of every browser."""
    with database.writing() as session:
        session.execute(update(User).where(User.id == user_id).values(epoch=User.epoch + 1))


def add_key(database: Database, name: str) -> str:
    """A new API key of a user; this is the only time that it can be seen."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    with database.writing() as session:
        user = _named(session, name)
        session.add(ApiKey(user_id=user.id, digest=digest(key), hint=key[-4:], created_at=time.time()))
    return key


def revoke_keys(database: Database, name: str) -> int:
    """End all keys of a user; how many there were."""
    with database.writing() as session:
        user = _named(session, name)
        keys = session.scalars(select(ApiKey).where(ApiKey.user_id == user.id, ~ApiKey.revoked)).all()
        for key in keys:
            key.revoked = True
        return len(keys)


def by_key(database: Database, key: str) -> User | None:
    """The user of an API key."""
    with database.reading() as session:
        found = select(User).join(ApiKey).where(ApiKey.digest == digest(key), ~ApiKey.revoked, ~User.disabled)
        return session.scalars(found).one_or_none()


def digest(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()  # keys are long and random: nothing to guess


def _hashed(password: str) -> str:
    if len(password) < MIN_PASSWORD:
        raise AgileError(f"The password has {len(password)} characters, expected at least {MIN_PASSWORD}.")
    return _hasher.hash(password)


def _by_name(session: Session, name: str) -> User | None:
    return session.scalars(select(User).where(User.name == name)).one_or_none()


def _named(session: Session, name: str) -> User:
    user = _by_name(session, name)
    if user is None:
        known = ", ".join(session.scalars(select(User.name).order_by(User.id)).all()) or "nobody yet"
        raise AgileError(f"There is no user {name!r}; there are: {known}.")
    return user
