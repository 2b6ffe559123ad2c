"""A run that is validated on its way, stopped or rolled back at a limit, and keeps what was best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agile.engine import Engine
from agile.errors import AgileError
from agile.tasks.productqa import ProductQA
from agile.training import train
from agile.types import Item, Reward, Session
from tests.runs import metrics, run_config

VALIDATED = ("validation.every=1", "validation.num_streams=1", "sft.num_steps=10", "ppo.num_iterations=4")


def saved(run: Path, iteration: int) -> dict[str, Any]:
    """The weights in a checkpoint."""
    (path,) = (run / f"checkpoints/ppo-{iteration:06d}").rglob("*model_states.pt")
    weights: dict[str, Any] = torch.load(path, weights_only=False)["module"]
    return weights


def trained_streams(run: Path) -> set[str]:
    lines = (run / "sessions-0.jsonl").read_text().splitlines()
    return {json.loads(line)["session"]["stream_id"] for line in lines}


@pytest.mark.slow
def test_validation_plays_what_is_not_learned_from_and_the_best_is_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a learning rate that ruins what imitation taught, so that the best is not the last
    config = [*VALIDATED, "ppo.lr=0.05", "ppo.checkpoint_every=3", "checkpoints.keep=1"]
    train(run_config(*config, "validation.select_best=true"), run)
    assert len(trained_streams(run)) == 2
    scores = [line["validation/score"] for line in metrics(run, "ppo")]
    best = 1 + scores.index(max(scores))
    assert best < len(scores) == 4
    assert {f"ppo-{best:06d}", "ppo-000004"} <= {p.name for p in (run / "checkpoints").iterdir()}
    exported, found = load_file(run / "ppo/model.safetensors"), saved(run, best)
    assert all(torch.equal(exported[name], found[f"lm.{name}"]) for name in exported)


def test_a_run_that_passes_a_limit_stops(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match=r"Iteration 3 was stopped by the guard: kl is .*iteration 1 were .*--resume"):
        train(run_config("sft.num_steps=10", "ppo.lr=0.05", "ppo.num_iterations=3", "guard.max_kl=1e-3"), tmp_path)
    (line,) = metrics(tmp_path, "guard")
    assert line["step"] == 3 and line["action"] == "stop" and "above guard.max_kl" in line["reason"]


def test_a_rollback_goes_on_from_the_last_good_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of iteration 2 is seen to be bad in iteration 3, although a checkpoint holds it."""
    config = ["sft.num_steps=10", "ppo.lr=0.05", "ppo.num_iterations=3", "guard.action=rollback", "guard.max_kl=1e-3"]

    def count(iteration: int, figures: Mapping[str, Any]) -> None:
        if iteration == 2:  # as if steps had been skipped since the checkpoint that is gone back to
            monkeypatch.setattr(Engine, "_count_skipped", lambda engine: setattr(engine, "num_skipped", 7))

    train(run_config(*config), tmp_path, watch=count)
    client = torch.load(next((tmp_path / "checkpoints/ppo-000003").rglob("*model_states.pt")), weights_only=False)
    assert client["num_skipped"] == 7, "what was skipped stays counted"
    lines = metrics(tmp_path)[10:]
    assert [(x["stage"], x["step"], x.get("to")) for x in lines[2:]] == [("ppo", 3, None), ("guard", 3, 1)]
    imitated, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("sft", "ppo"))
    assert all(torch.equal(imitated[name], exported[name]) for name in exported), "iteration 1 trains the critic alone"
    state = json.loads((tmp_path / "checkpoints/ppo-000003/state.json").read_text())["state"]
    assert state["course"]["num_rollbacks"] == 1


def test_more_streams_for_validation_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match=r"validation.num_streams is 3, but there are 3 train streams"):
        train(run_config("validation.every=1", "validation.num_streams=3"), tmp_path / "run")


def test_a_rollback_before_the_first_checkpoint_keeps_the_warm_critic(tmp_path: Path) -> None:
    config = ["sft.num_steps=10", "ppo.lr=0.05", "ppo.num_iterations=3", "ppo.checkpoint_every=50"]
    train(run_config(*config, "guard.action=rollback", "guard.max_kl=1e-3"), tmp_path)
    (guard,) = metrics(tmp_path, "guard")
    assert (guard["step"], guard["to"]) == (3, 1)
    after, warm = saved(tmp_path, 3), saved(tmp_path, 1)
    assert all(torch.equal(after[name], warm[name]) for name in warm)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_rollbacks(tmp_path: Path) -> None:
    """No checkpoint was kept for one: it takes that of where it stands."""
    config = ["sft.num_steps=10", "ppo.lr=0.05", "ppo.num_iterations=3"]
    with pytest.raises(AgileError, match=r"guard\.action=rollback"):
        train(run_config(*config, "guard.max_kl=1e-3"), tmp_path)
    train(run_config(*config, "guard.max_kl=1e-3", "guard.action=rollback"), tmp_path, resume=True)
    assert [line["step"] for line in metrics(tmp_path, "ppo")][-1] == 3


def test_rewards_that_are_no_numbers_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the sessions have such a one: imitation, iterations and validations say so, and use the others."""

    def score(task: ProductQA, question: Item, session: Session) -> Reward:
        return Reward({"correct": math.nan if session.index % 2 else 1.0})

    monkeypatch.setattr(ProductQA, "score", score)
    config = ["sft.num_steps=1", "ppo.num_iterations=1", "ppo.value_warmup_epochs=0", "validation.every=1"]
    train(run_config(*config), tmp_path)
    told = [r.getMessage() for r in caplog.records if r.name == "agile.rollout"]
    reason = "failed, task: ValueError: the reward is {'correct': nan}, expected finite numbers"
    assert told == [
        f"Imitation: 4 of 8 sessions failed, not by the policy's doing; 4 of them: {reason}",
        f"Iteration 1: 4 of 8 sessions failed, not by the policy's doing; 4 of them: {reason}",
        f"Validation after iteration 1: 2 of 4 sessions failed, not by the policy's doing; 2 of them: {reason}",
    ]
    (line,) = metrics(tmp_path, "ppo")
    assert line["status/failed"] == 4 and all(math.isfinite(x) for x in line.values() if isinstance(x, float))
