"""A run of seconds, for tests of what works on runs, and the command line in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner, Result

from agile.cli import app

# of the demo: everything it does, on next to nothing; few of its sessions come to an answer
TINY = (
    "task.num_train_worlds=3",
    "task.num_test_worlds=2",
    "task.num_questions=8",
    "memory.encoder=hashing",
    "model.num_layers=1",
    "model.hidden_size=32",
    "sft.num_steps=10",
    "sft.sessions_per_item=1",
    "sft.checkpoint_every=10",
    "ppo.num_iterations=1",
    "ppo.streams_per_iteration=2",
    "ppo.value_warmup_epochs=0",
    "rollout.max_failed=1.0",
)


@dataclass(frozen=True)
class TinyRun:
    """The folder of a finished `agile demo`, and what it printed."""

    path: Path
    output: str


def agile(*words: str | Path, stdin: str | None = None) -> Result:
    """Run the command line; `result.output` holds both of its streams."""
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)
