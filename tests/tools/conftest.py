"""A product database, the tool on it, and a watch over its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agile.tools.sql import SqlSearch, write_products

PANS: list[dict[str, object]] = [
    {"asin": "B01", "title": "Stone  Pan", "price": 32.95, "brand": "Ozeri"},
    {"asin": "B02", "title": "Iron Pan", "price": 20, "brand": "Lodge"},
    {"asin": "B03", "title": "Steel Pan", "price": 47.05, "brand": "Lodge"},
    *({"asin": f"B{i:02}", "title": f"Pan {i}", "price": 100, "brand": "Bulk"} for i in range(4, 21)),
    {"asin": "B99", "title": "Mystery"},
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "product?#%.db"  # characters that mean something in a URI
    write_products(path, "pans", {"price": "NUMERIC(10,2)", "brand": "VARCHAR(50)"}, PANS)
    write_products(path, "secrets", {"word": "VARCHAR(50)"}, [{"asin": "S01", "title": "t", "word": "xyzzy"}])
    return path


@pytest.fixture(scope="module")
def tool(database: Path) -> SqlSearch:
    return SqlSearch(database, timeout_s=0.05)


@pytest.fixture
def untouched(database: Path) -> Iterator[None]:
    """The file keeps every byte, and no other appears beside it."""

    def state() -> tuple[str, list[Path]]:
        return hashlib.sha256(database.read_bytes()).hexdigest(), sorted(database.parent.iterdir())

    before = state()
    yield
    assert state() == before
