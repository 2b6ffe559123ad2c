"""Cheap passwords, and a desk that listens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from httpx2._config import DEFAULT_TIMEOUT_CONFIG

from agile.serve import accounts
from tests.serve.desk import Counted, Running, an_app, asks_once, open_desk, running


@pytest.fixture(autouse=True, scope="session")
def cheap_passwords() -> Iterator[None]:
    kept = accounts._hasher, accounts._NOBODY
    accounts._hasher = PasswordHasher(1, 8, 1)
    accounts._NOBODY = accounts._hasher.hash("nobody")
    yield
    accounts._hasher, accounts._NOBODY = kept


@pytest.fixture(autouse=True, scope="session")
def patient_clients() -> Iterator[None]:
    """A machine with much to do may take longer than the five seconds after which clients give up."""
    names = ("connect", "read", "write", "pool")
    kept = {name: getattr(DEFAULT_TIMEOUT_CONFIG, name) for name in names}
    for name in names:
        setattr(DEFAULT_TIMEOUT_CONFIG, name, 60.0)
    yield
    for name in names:
        setattr(DEFAULT_TIMEOUT_CONFIG, name, kept[name])


@pytest.fixture
def policy() -> Counted:
    return Counted(asks_once)


@pytest.fixture
def server(tmp_path: Path, policy: Counted) -> Iterator[Running]:
    with running(an_app(tmp_path, open_desk(tmp_path), policy, wait_s=0)) as server:
        yield server
