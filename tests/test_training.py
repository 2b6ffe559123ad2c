"""A whole run: what it leaves, and that a run which was killed and resumed is the run that was not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from agile.errors import AgileError
from agile.policies import HFPolicy
from agile.run_folder import Place, RunFolder
from agile.stages.ppo import check_mismatch
from agile.stages.rewards import terminal_rewards
from agile.training import train
from agile.types import Advice, AdviceStatus, Reward, Session, SessionStatus, Trajectory
from tests.doors import session
from tests.runs import assert_same_run, metrics, run_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(run_config(), out)
    return out


def test_a_run_leaves_its_agents_and_figures(whole: Path) -> None:
    lines = metrics(whole)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("sft", i + 1) for i in range(30)),
        ("ppo", 1),
        ("ppo", 2),
    ]
    assert lines[29]["loss"] < lines[0]["loss"]
    assert all(line["first_ratio"] == pytest.approx(1, abs=1e-6) for line in lines[30:])
    assert all(line["rollout_ratio"] == pytest.approx(1, abs=1e-4) for line in lines[30:])
    sessions = (whole / "sessions-0.jsonl").read_text().splitlines()
    assert len(sessions) == 2 * 2 * 4
    sft, ppo = (load_file(whole / name / "model.safetensors") for name in ("sft", "ppo"))
    assert sft.keys() == ppo.keys()
    assert any((sft[name] != ppo[name]).any() for name in sft)


class Stop(Exception):
    pass


SLOW = pytest.mark.slow


@pytest.fixture(
    params=[
        pytest.param(Place("sft", 20), marks=SLOW),
        pytest.param(Place("sft", 30), marks=SLOW),
        Place("ppo", 1),
    ],
    ids=lambda place: place.name,
)
def stopping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The run stops right after one of its checkpoints."""
    save = RunFolder.save

    def save_and_stop(self: RunFolder, place: Place, *args: Any, **kwargs: Any) -> None:
        save(self, place, *args, **kwargs)
        if place == request.param:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save_and_stop)
        yield request.param


def test_a_run_resumed_where_it_stopped_is_the_same_run(
    whole: Path, tmp_path: Path, stopping: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        train(run_config(), out)
    assert len(metrics(out)) == (stopping.step if stopping.stage == "sft" else 30 + stopping.step)
    monkeypatch.undo()
    train(run_config(), out, resume=True)
    assert_same_run(out, whole)


def test_checkpoints_by_the_clock_come_between_those_of_the_schedule(tmp_path: Path) -> None:
    """Here every step takes longer than `every_minutes`, and the schedule has the last ones alone."""
    few = ("sft.num_steps=3", "sft.checkpoint_every=9", "ppo.checkpoint_every=9", "checkpoints.keep=9")
    train(run_config(*few, "checkpoints.every_minutes=1e-9"), tmp_path / "run")
    found = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["ppo-000001", "ppo-000002", "sft-000001", "sft-000002", "sft-000003"]


@pytest.mark.slow
def test_a_run_that_collects_ahead_is_the_same_run_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was collected with weights that are gone is part of the checkpoint."""
    ahead = run_config("rollout.lag=1", "ppo.num_iterations=4", "sft.num_steps=10")
    train(ahead, tmp_path / "whole")
    assert [line["staleness"] for line in metrics(tmp_path / "whole")[10:]] == [0, 1, 1, 1]
    save = RunFolder.save

    def save_and_stop(self: RunFolder, place: Place, *args: Any, **kwargs: Any) -> None:
        save(self, place, *args, **kwargs)
        if place == Place("ppo", 2):
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunFolder, "save", save_and_stop)
        train(ahead, tmp_path / "run")
    train(ahead, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_stale_weights_end_the_run_before_anything_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that forgets to take over new weights; nothing of what it played is logged as learned."""
    setup_policy = HFPolicy.__init__

    def copied(self: HFPolicy, model: Any, *args: Any, **kwargs: Any) -> None:
        setup_policy(self, copy.deepcopy(model), *args, **kwargs)

    monkeypatch.setattr(HFPolicy, "__init__", copied)
    with pytest.raises(AgileError, match=r"Iteration 3: .*rollout.policy=hf.*differ by up to .*--resume"):
        train(run_config("ppo.num_iterations=4", "sft.num_steps=10"), tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("lag", "exact", "figures", "said"),
    [
        (0, True, (1.0, 0.0, 1e-5), ""),
        (0, True, (1.0, 0.0, 0.02), "stops"),
        (0, True, (np.nan, 0.0, np.nan), "stops"),
        (1, True, (1.0, 0.0, 0.3), ""),
        (0, False, (0.995, 0.069, 0.3), ""),
        (0, False, (0.97, 0.069, 0.3), "warns"),
        (0, False, (np.nan, 0.0, np.nan), "warns"),
        (1, True, (1.0, 0.2, 0.3), "warns"),
    ],
)
def test_a_mismatch_of_rollout_and_trainer_is_told(
    lag: int, exact: bool, figures: tuple[float, float, float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollout = run_config(f"rollout.lag={lag}").rollout
    found = dict(zip(("rollout_ratio", "rollout_outside", "rollout_difference"), figures, strict=True))
    with pytest.raises(AgileError, match=r"expected at most 0\.01") if said == "stops" else nullcontext():
        check_mismatch(rollout, 4, found, exact=exact)
    assert ("Iteration 5: rollout and trainer drift apart" in caplog.text) == (said == "warns")


# --------------------------------------------------------------------------------------------------------------------
# Rewards


def trajectory(stream_id: str, *rewards: float, advised: tuple[int, ...] = ()) -> Trajectory:
    """A stream of sessions with these rewards; `advised` are those whom an expert answered."""

    def one(index: int, reward: float) -> Session:
        status = AdviceStatus.ANSWERED if index in advised else AdviceStatus.TIMEOUT
        return replace(
            session(stream_id=stream_id, index=index, advice=Advice("yes", status=status)),
            reward=Reward({"correct": reward}),
        )

    return Trajectory(stream_id, tuple(one(i, r) for i, r in enumerate(rewards)))


# Of four questions 0, 2 and 3 are alike in stream a; in stream b none are.
SIMILAR = {"a": np.eye(4, dtype=np.float32), "b": np.eye(2, dtype=np.float32)}
for i, j in ((0, 2), (0, 3), (2, 3)):
    SIMILAR["a"][i, j] = SIMILAR["a"][j, i] = 0.5
PLAYED = [trajectory("a", 0.7, 1.0, 0.7, 0.0, advised=(0, 2, 3)), trajectory("b", 0.7, 0.7, advised=(0, 1))]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ppo.credit=none"], [[0.7, 1.0, 0.7, 0.0], [0.7, 0.7]]),
        (["ppo.credit=chain", "ppo.gamma_session=0.5"], [[0.7, 1.0, 0.7, 0.0], [0.7, 0.7]]),
        # 0 comes up again, never before: 0.2 / 1; 2 again, once before: 0.2 / 2; 3 never again
        (["ppo.credit=utility", "ppo.utility_beta=0.2"], [[0.9, 1.0, 0.8, 0.0], [0.7, 0.7]]),
        (["ppo.credit=utility", "ppo.utility_similarity=0.6"], [[0.7, 1.0, 0.7, 0.0], [0.7, 0.7]]),
    ],
)
def test_rewards_of_each_credit_mode(overrides: list[str], expected: list[list[float]]) -> None:
    found = terminal_rewards(run_config(*overrides), SIMILAR.__getitem__, PLAYED, np.random.default_rng(0))
    for row, expected_row in zip(found, expected, strict=True):
        assert row == pytest.approx(expected_row)


def test_copies_of_a_stream_have_the_similarities_of_its_questions() -> None:
    played = [replace(PLAYED[0], stream_id=f"a#{i}") for i in range(2)]
    config = run_config("ppo.credit=utility", "ppo.utility_beta=0.2", "ppo.rollouts_per_stream=2")
    found = terminal_rewards(config, SIMILAR.__getitem__, played, np.random.default_rng(0))
    assert found[0] == found[1] == pytest.approx([0.9, 1.0, 0.8, 0.0])


def test_failed_sessions_may_have_a_reward_of_their_own() -> None:
    failed = replace(PLAYED[1].sessions[1], status=SessionStatus.INVALID_ACTION)
    played = [PLAYED[0], Trajectory("b", (PLAYED[1].sessions[0], failed))]
    found = terminal_rewards(
        run_config("rollout.failed_reward=-1"), SIMILAR.__getitem__, played, np.random.default_rng(0)
    )
    assert found == [[0.7, 1.0, 0.7, 0.0], [0.7, -1.0]]


def test_shuffled_rewards_are_the_same_ones_elsewhere() -> None:
    config = run_config("demo.shuffle_rewards=true")
    played = [trajectory(str(i), *(10.0 * i + j for j in range(5))) for i in range(4)]
    true = [float(10 * i + j) for i in range(4) for j in range(5)]
    shuffled, again, other = (
        [r for row in terminal_rewards(config, SIMILAR.__getitem__, played, np.random.default_rng(s)) for r in row]
        for s in (0, 0, 1)
    )
    assert sorted(shuffled) == true
    assert sum(a == b for a, b in zip(shuffled, true, strict=True)) < 5
    assert shuffled == again != other
