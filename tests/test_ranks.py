"""Shares of work, and that processes of one run say and end as one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agile import ranks

ROOT = Path(__file__).parents[1]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_shares_are_balanced_and_whole(sizes: list[int], num: int) -> None:
    parts = ranks.shares(sizes, num)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(sizes[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_process_is_the_first_of_one() -> None:
    assert (ranks.rank(), ranks.world_size(), ranks.is_main()) == (0, 1, True)
    ranks.join()
    assert ranks.gather("x") == ["x"]
    assert ranks.broadcast("x") == "x"
    assert ranks.total({"a": 1.5}) == {"a": 1.5}
    assert ranks.gather_shares(["a", "b"], [1, 2]) == ["a", "b"]
    with ranks.main_first():
        ranks.barrier()
    with ranks.failing() as first:
        assert first


def launch(program: str, *words: object, num: int = 2, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "--no-python"]
    command = [*launcher, sys.executable, "-c", program, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=timeout, capture_output=True, text=True)


@pytest.mark.slow
def test_what_processes_exchange(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from agile import ranks
ranks.join()
me = ranks.rank()
assert ranks.gather(f"r{me}") == ["r0", "r1", "r2"]
assert ranks.broadcast(me) == 0
assert ranks.total({"a": me, "b": 1.0}) == {"a": 3, "b": 3.0}
sizes = [3, 1, 4, 1, 5]
assert ranks.gather_shares([f"i{i}" for i in ranks.own_share(sizes)], sizes) == [f"i{i}" for i in range(5)]
written = Path(sys.argv[1]) / "written"
with ranks.main_first():
    assert written.exists() == (me > 0)
    written.touch()
"""
    done = launch(program, tmp_path, num=3)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_process_ends_all_and_is_said_once(who: int, tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from agile import ranks
from agile.errors import AgileError
from agile.screen import one_screen
import typer
try:
    with one_screen():
        ranks.join()
        ranks.barrier()
        if ranks.rank() == int(sys.argv[1]):
            (Path(sys.argv[2]) / "failed").write_text(str(time.time()))
            raise AgileError("the well is dry")
        ranks.barrier()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
    done = launch(program, who, tmp_path)
    took = time.time() - float((tmp_path / "failed").read_text())
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("Error: the well is dry") == 1
    assert "RuntimeError" not in done.stderr.partition("torch.distributed.elastic")[0]
    assert took < 300, "the others wait for days at a barrier, unless they are told"
