"""A run of seconds, for tests of what works on runs, and the command line in this process."""

from __future__ import annotations

import asyncio
import json
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


def make_run(path: Path) -> None:
    """A run folder without training: step 1 by the teacher, step 2 by a model of random weights, which is `sft`."""
    import numpy as np

    from agile.build import Setup
    from agile.config import load_config
    from agile.policies import HFPolicy
    from agile.rollout import collect
    from agile.session_log import JsonLines, append_sessions
    from tests.worlds import ListMemory

    path.mkdir()
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", [*TINY, "rollout.max_action_tokens=6"])
    (path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    setup = Setup(config, path)
    tokenizer = setup.tokenizer()
    executor, lm = setup.executor(tokenizer), setup.language_model(tokenizer)
    teacher, rng = setup.agent.teacher(executor.codec, 0.5), np.random.default_rng(0)
    model = HFPolicy(lm, temperature=config.rollout.temperature)
    log = JsonLines(path / "sessions-0.jsonl")
    for step in (1, 2):
        played = asyncio.run(
            collect(
                executor,
                model,
                setup.task.streams("train")[:2],
                lambda stream: ListMemory(),
                seed=step,
                policy_for=(lambda question, memory: teacher.policy(question, memory, 0.3, rng)) if step == 1 else None,
                max_failed=1.0,
            )
        )
        append_sessions(log, [s for t in played for s in t.sessions], stage="ppo", step=step)
    log.close()
    lm.save_pretrained(path / "sft")
    tokenizer.save_pretrained(path / "sft")
