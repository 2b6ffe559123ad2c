"""A run that is killed at random moments, while it imitates, plays, learns and saves, is the run that was not."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import pytest

from tests.processes import LIMIT_S, Processes
from tests.runs import assert_same_run, metrics, run_config

# what a process counts as it begins and as it ends: an odd number is something under way
DOINGS = ("imitation", "collection", "update", "saving")
WORLD = ("rollout.max_turns=12", "sft.batch_size=32", "sft.checkpoint_every=100")
SETTINGS = (
    *("rollout.max_turns=12", "task.num_questions=3"),
    *("sft.num_steps=6", "sft.batch_size=8", "sft.checkpoint_every=3", "sft.lr=0.0005"),
    *("ppo.num_iterations=4", "ppo.checkpoint_every=2", "ppo.lr=0.003", "ppo.kl_target=0.01"),
    "checkpoints.every_minutes=0.01",  # also between those of the schedule
    *("validation.every=2", "validation.num_streams=1", "validation.select_best=true"),
)
ROLLBACK = ("guard.action=rollback", "guard.max_kl=0.01", "guard.max_rollbacks=9")


def note(counts: Any) -> None:
    """Count what this process does from now on."""
    from agile.rollout import collect
    from agile.run_folder import RunFolder
    from agile.train.ppo import update
    from agile.train.sft import train_sft

    @contextmanager
    def doing(what: str) -> Iterator[None]:
        counts[DOINGS.index(what)] += 1
        yield
        counts[DOINGS.index(what)] += 1

    async def collect_noted(*args: Any, **kwargs: Any) -> Any:
        with doing("collection"):
            return await collect(*args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr("agile.stages.sft.train_sft", doing("imitation")(train_sft))
    patch.setattr("agile.stages.collection.collect", collect_noted)
    patch.setattr("agile.train.ppo.update", doing("update")(update))
    patch.setattr("agile.run_folder.RunFolder.save", doing("saving")(RunFolder.save))


def run(out: Path, words: tuple[str, ...], counts: Any = None) -> None:
    """Start or resume a run; in a process of its own."""
    from agile import ranks
    from agile.training import train

    if counts is not None and ranks.is_main():
        note(counts)
    train(run_config(*words), out, resume=True)


def wait_until(event: Callable[[], bool], processes: Processes) -> None:
    """Or until they have ended."""
    until = time.monotonic() + LIMIT_S
    while processes.running and not event():
        assert time.monotonic() < until
        time.sleep(0.0005)


class Killer:
    """Kills runs, and counts in `fell` what they were doing.

    Args:
        seconds: How long a run takes when nobody kills it.
    """

    def __init__(self, words: tuple[str, ...], num: int, seconds: float):
        self.words, self.num, self.seconds = words, num, seconds
        self.rng = random.Random(0)
        self.aims = cycle(("any", "collection", "saving", "update"))  # an imitation is begun, and so killed, once a run
        self.fell: Counter[str] = Counter()

    def ended(self, out: Path) -> bool:
        """Start or resume the run in this folder, and kill it; returns whether it had ended before."""
        counts = RawArray("i", len(DOINGS))
        aim = "imitation" if not (out / "metrics.jsonl").exists() else next(self.aims)
        with Processes(run, out, self.words, counts, num=self.num) as processes:
            if aim == "any":
                processes.wait(self.rng.uniform(0.1, 0.7) * self.seconds)
            else:
                begins = 1 if aim == "imitation" else 2 * self.rng.randint(1, 2) - 1
                wait_until(lambda: counts[DOINGS.index(aim)] >= begins, processes)
                processes.wait(self.rng.uniform(0, 0.02))
        codes = {process.exitcode for process in processes.all}
        assert codes <= {0, -signal.SIGKILL}
        if codes == {0}:
            return True
        under_way = {what for what, count in zip(DOINGS, counts, strict=True) if count % 2}
        if not [*out.glob("checkpoints/.*.draft")]:
            under_way.discard("saving")  # nothing was written yet, or all was
        self.fell.update(under_way)
        return False


def whole_run(out: Path, words: tuple[str, ...], num: int = 1) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    with Processes(run, out, words, num=num) as processes:
        processes.finish()
    return time.monotonic() - began


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that earns something in some of its sessions."""
    out = tmp_path_factory.mktemp("agent") / "run"
    whole_run(out, (*WORLD, "stages=[sft]", "sft.num_steps=100"))
    return out / "sft"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("num", "words", "num_kills"),
    [
        (1, ROLLBACK, 20),
        (1, ("rollout.lag=1",), 6),
        (2, ("engine.zero_stage=2", *ROLLBACK), 6),
    ],
    ids=["one", "ahead", "two"],
)
def test_a_run_killed_at_random_moments_is_the_same_run(
    agent: Path, tmp_path: Path, num: int, words: tuple[str, ...], num_kills: int
) -> None:
    words = (f"model.path={agent}", *SETTINGS, *words)
    whole, out = tmp_path / "whole", tmp_path / "run-0"
    seconds = whole_run(whole, words, num)
    assert any(metrics(whole, "guard")) == (ROLLBACK[0] in words), "it goes back to earlier weights"
    scores = {line["score"] for line in metrics(whole, "ppo")}
    assert len(scores) > 1 and max(scores) > 0.2, "there is something to learn"
    killer = Killer(words, num, seconds)
    done = num_runs = 0
    while done < num_kills or (done < 8 * num_kills and not all(killer.fell[w] for w in DOINGS)):
        if killer.ended(out):
            assert_same_run(out, whole)
            num_runs += 1
            out = tmp_path / f"run-{num_runs}"
        else:
            done += 1
    whole_run(out, words, num)
    assert_same_run(out, whole)
    print(f"{done} kills in {num_runs + 1} runs fell in {dict(killer.fell)}")
    assert all(killer.fell[what] for what in DOINGS), killer.fell
