"""Answers that were paid for, on disk: whoever asks the same again pays nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agile.memory.database import database_errors, open_database, transaction

_WHAT = "cache of answers"
_ID = 0x41474C41
_SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"


class AnswerCache:
    """JSON values by request, each on disk before `put` returns; processes may share the file.

    Args:
        path: SQLite file; None keeps the answers in RAM.

    Raises:
        AgileError: The file is not such a cache, is damaged or locked, or cannot be read and written.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._db = open_database(path, _WHAT, _ID, _SCHEMA)

    @staticmethod
    def key(request: Mapping[str, Any]) -> str:
        """The same for equal requests alone, whatever the order of their keys."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The value, or None."""
        with database_errors(_WHAT, self.path):
            row = self._db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        with database_errors(_WHAT, self.path), transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        self._db.close()
