"""What every test shares: a quiet, offline, single-threaded process and the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.tiny import TinyRun

# Before anything imports torch or transformers: two workers of pytest-xdist would otherwise fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# What is printed is looked at: neither colours nor the width are those of whoever runs the tests.
for name in (
    "FORCE_COLOR",
    "CLICOLOR_FORCE",
    "PY_COLORS",
    "GITHUB_ACTIONS",
    "TTY_COMPATIBLE",
    "COLUMNS",
    "TERMINAL_WIDTH",
):
    os.environ.pop(name, None)
# Servers of tests are on this machine, which no proxy reaches.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# a busy machine is not a failure
settings.register_profile("agile", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("agile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests start processes, each of which takes a while, and may be beside others."""
    for item in items:
        slow = any(item.get_closest_marker(name) for name in ("slow", "vllm", "frameworks"))
        if slow and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """What a library puts into the environment of this process must not make the next test's programs join others."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data that AGILE_DATA names; without it the test is skipped."""
    folder = os.environ.get("AGILE_DATA")
    if not folder:
        pytest.skip("needs real data: set AGILE_DATA to the folder that holds productqa/")
    if not Path(folder, "productqa").is_dir():
        pytest.fail(f"AGILE_DATA={folder} holds no folder productqa/; name one that does, or unset it.")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run, for reading: copy it to change it."""
    from tests.tiny import TINY, TinyRun, agile  # imports what the environment above is for

    path = tmp_path_factory.mktemp("runs") / "tiny"
    result = agile("demo", f"out={path}", *TINY)
    assert result.exit_code == 0, result.output
    return TinyRun(path, result.output)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of logged sessions without training, for reading: copy it to change it."""
    from tests.tiny import make_run

    path = tmp_path_factory.mktemp("made") / "run"
    make_run(path)
    return path
