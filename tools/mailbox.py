"""A mailbox: mails are found by SQLite's full-text search (FTS5) and read one by one."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from agile.errors import AgileError

WEIGHTS = (4.0, 4.0, 1.0)  # of sender, subject and body in BM25: who wrote it counts for more than who is mentioned


@dataclass(frozen=True, slots=True)
class Mail:
    id: int
    sender: str
    subject: str
    body: str

    @property
    def head(self) -> str:
        """What a list of mails shows of it."""
        return f"{self.id} {self.sender} {self.subject}"


class Mailbox:
    """Mails in a database in memory.

    Args:
        max_hits: Mails that one search shows.

    Raises:
        AgileError: Two mails have the same id.
    """

    def __init__(self, mails: Sequence[Mail], *, max_hits: int = 3) -> None:
        self.max_hits = max_hits
        self._mails = {mail.id: mail for mail in mails}
        if len(self._mails) < len(mails):
            raise AgileError(f"{len(mails)} mails have {len(self._mails)} ids, expected one each; number them anew.")
        self._database = sqlite3.connect(":memory:")
        self._database.execute("CREATE VIRTUAL TABLE mails USING fts5(sender, subject, body)")
        rows = [(mail.id, mail.sender, mail.subject, mail.body) for mail in mails]
        self._database.executemany("INSERT INTO mails(rowid, sender, subject, body) VALUES (?, ?, ?, ?)", rows)

    def search(self, query: str) -> list[Mail]:
        """The best of the mails that hold every word of the query, in any field; what is typed is never syntax."""
        words = query.replace("\0", " ").split()
        if not words:
            return []
        match = " ".join('"' + word.replace('"', '""') + '"' for word in words)
        found = self._database.execute(
            "SELECT rowid FROM mails WHERE mails MATCH ? ORDER BY bm25(mails, ?, ?, ?), rowid LIMIT ?",
            (match, *WEIGHTS, self.max_hits),
        )
        return [self._mails[id] for (id,) in found]

    def read(self, id: int) -> Mail | None:
        """The mail of this number; None if there is none."""
        return self._mails.get(id)
