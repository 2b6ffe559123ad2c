"""A run that is killed at random moments, while it plays, learns and writes checkpoints, is the run that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.runs import assert_same_run, run_config

NUM_KILLS = 20
SETTINGS = (
    "task.num_questions=2",
    "sft.num_steps=6",
    "sft.batch_size=4",
    "sft.checkpoint_every=3",
    "ppo.num_iterations=4",
    "ppo.checkpoint_every=2",
    "ppo.lr=0.01",
    "ppo.kl_target=0.01",
    "checkpoints.every_minutes=0.01",  # also between those of the schedule
    *("validation.every=2", "validation.num_streams=1", "validation.select_best=true"),
    *("guard.action=rollback", "guard.max_kl=0.05", "guard.max_rollbacks=9"),
)
# one process imports everything once, and every run is a copy of it
FORKS = multiprocessing.get_context("forkserver")


def resume(out: Path) -> None:
    from agile.training import train  # imported where the copies are made, not here

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(run_config(*SETTINGS), out, resume=True)


def start(out: Path) -> ForkServerProcess:
    process = FORKS.Process(target=resume, args=(out,))
    process.start()
    return process


def run_whole(out: Path) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    process = start(out)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def kill(process: ForkServerProcess, out: Path, delay: float, *, writing: bool) -> bool:
    """Kill a run some seconds from now, or a moment after it next begins to write a checkpoint or an agent.

    Returns:
        Whether it had not ended before.
    """
    if writing:
        while process.is_alive() and not [*out.glob("checkpoints/.*.draft"), *out.glob(".*.draft")]:
            time.sleep(0.0005)
        delay /= 100
    process.join(delay)
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_20_random_moments_is_the_same_run(tmp_path: Path) -> None:
    FORKS.set_forkserver_preload(["agile.training", "deepspeed", "tests.runs"])
    rng = random.Random(0)
    whole, out = tmp_path / "whole", tmp_path / "run-0"
    run_whole(tmp_path / "first")  # pays for the imports
    seconds = run_whole(whole)
    assert_same_run(tmp_path / "first", whole)
    num_kills = num_runs = 0
    while num_kills < NUM_KILLS:
        if kill(start(out), out, rng.uniform(0.1, 0.7) * seconds, writing=num_kills % 3 == 2):
            num_kills += 1
        else:  # it came to its end: the next one
            assert_same_run(out, whole)
            num_runs += 1
            out = tmp_path / f"run-{num_runs}"
    run_whole(out)
    assert_same_run(out, whole)
