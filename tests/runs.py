"""Runs of `agile train` of a few seconds, and whether two of them are the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agile.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
SETTINGS = (
    "task.num_train_worlds=3",
    "task.num_test_worlds=2",
    "task.num_questions=4",
    "memory.encoder=hashing",
    "model.hidden_size=32",
    "model.num_layers=1",
    "rollout.max_failed=1.0",
    "rollout.max_turns=3",
    "sft.num_steps=30",
    "sft.sessions_per_item=1",
    "sft.checkpoint_every=10",
    "ppo.num_iterations=2",
    "ppo.streams_per_iteration=2",
    "ppo.value_warmup_epochs=1",
    "ppo.checkpoint_every=1",
    "ppo.kl_coef=0.05",
    "threads=1",
)


def run_config(*overrides: str) -> RunConfig:
    return load_config(CONFIG, [*SETTINGS, *overrides])


def saved_model(folder: Path, *overrides: str) -> str:
    """The small model of these runs with random weights, saved for others to start from."""
    from agile.build import Setup

    setup = Setup(run_config(*overrides), folder / "data")
    tokenizer = setup.tokenizer()
    setup.language_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def metrics(run: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one stage or all, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if stage in (None, line["stage"])]


def assert_same_run(run: Path, expected: Path) -> None:
    assert metrics(run) == metrics(expected)
    logs = sorted(f.name for f in expected.glob("sessions-*.jsonl"))
    assert sorted(f.name for f in run.glob("sessions-*.jsonl")) == logs
    for log in logs:
        assert (run / log).read_bytes() == (expected / log).read_bytes(), log
    for name in ("sft", "ppo"):
        exported = sorted(f.name for f in (expected / name).iterdir())
        assert sorted(f.name for f in (run / name).iterdir()) == exported and "model.safetensors" in exported
        for file in exported:
            assert (run / name / file).read_bytes() == (expected / name / file).read_bytes(), f"{name}/{file}"
