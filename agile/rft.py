"""`agile rft`: files of hosted reinforcement fine-tuning, trained here by the same PPO as everything else."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from agile.build import Setup
from agile.config import RunConfig
from agile.errors import AgileError
from agile.messages import MessagesCodec
from agile.rft_report import draw, read_course, write_rft_report
from agile.rollout import collect, run_loop
from agile.seeding import derive_seed
from agile.stages.guard import VALIDATION_SCORE
from agile.tasks.rft_rows import raise_all
from agile.training import train
from agile.types import Session, Stream

PLOT_EVERY_S = 30.0


def check_prompts(setup: Setup, tokenizer: PreTrainedTokenizerFast) -> None:
    """Whether the model can be shown every row.

    Raises:
        AgileError: A line for each row whose prompt, or prompt and answer, is too long or cannot be rendered.
    """
    codec, rollout, task = setup.codec(tokenizer), setup.config.rollout, setup.config.task
    assert isinstance(codec, MessagesCodec)
    paths = {"train": task.data, "validation": task.validation_data, "imitation": task.imitation_data}
    problems: list[str] = []
    for split, path in paths.items():
        for stream in setup.task.streams(split) if path is not None else ():
            (item,) = stream.items
            where = f"{path}, line {item.id}"
            try:
                length = len(codec.question_ids(item, ""))
            except AgileError as error:
                problems.append(f"{where}: {error}")
                continue
            answer = 1 if item.answer is None else len(codec.encode(item.answer)) + 1
            if length + answer > rollout.max_context_tokens:
                problems.append(
                    f"{where}: {length} tokens of messages and {answer} to answer, more than "
                    f"rollout.max_context_tokens={rollout.max_context_tokens}. Raise it, or shorten the row."
                )
            elif item.answer is not None and answer > rollout.max_action_tokens:
                problems.append(
                    f"{where}: an answer of {answer} tokens, more than rollout.max_action_tokens="
                    f"{rollout.max_action_tokens}. Raise it."
                )
    raise_all(problems)


# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """What is seen while it trains: a line for each validation, and `rewards.png` now and then."""

    console: Console
    out: Path
    best: float = -math.inf
    drawn: float = field(default_factory=time.monotonic)

    def __call__(self, iteration: int, figures: Mapping[str, Any]) -> None:
        score = figures.get(VALIDATION_SCORE)
        if self.best == -math.inf:
            self.console.print(_LINE.format(*_HEADINGS), style="bold", highlight=False)
        if score is None:
            return
        mark = "*" if score > self.best else " "
        self.best = max(self.best, score)
        errors = sum(n for name, n in figures.items() if name.startswith("grading/"))
        unfinished = figures.get("status/invalid_action", 0)
        cells = [figures.get(name) for name in ("score", "kl", "entropy")]
        train, kl, entropy = ("" if c is None or math.isnan(c) else f"{c:.3f}" for c in cells)
        seconds = f"{figures['seconds']:.1f}" if "seconds" in figures else ""
        counts = str(errors), str(unfinished), seconds
        line = _LINE.format(str(iteration), train, f"{score:.3f}{mark}", kl, entropy, *counts)
        self.console.print(line, highlight=False, markup=False)
        if time.monotonic() - self.drawn > PLOT_EVERY_S:
            draw(read_course(self.out), self.out)
            self.drawn = time.monotonic()


_HEADINGS = ("iteration", "train", "validation", "KL", "entropy", "errors", "unfinished", "s")
_LINE = "{:>9}  {:>7}  {:>10}  {:>6}  {:>7}  {:>6}  {:>10}  {:>6}"


def run_rft(config: RunConfig, out: Path, console: Console, *, resume: bool) -> dict[str, Any]:
    """Train, and report before and after on the validation rows.

    Returns:
        The report, see `agile.rft_report`.

    Raises:
        AgileError: Whatever a user can mend.
    """
    if config.model.path is None and not config.sft.num_steps:
        raise AgileError(
            "There is neither a model nor anything to imitate: a model from scratch answers with noise, from which no "
            "grader teaches. Give --model DIR, or --imitate FILE with rows that end in an answer."
        )
    setup = Setup(config, out)
    train_rows, validation = setup.train_streams, setup.task.streams("validation")
    check_prompts(setup, setup.tokenizer())
    ppo = config.ppo
    console.print(
        f"{len(train_rows)} rows to learn from, {len(validation)} to validate on; {ppo.num_iterations} iterations of "
        f"{ppo.streams_per_iteration} rows, {ppo.rollouts_per_stream} answers each. Everything goes to {out}; stopped, "
        "--resume goes on. * is the best so far.",
        soft_wrap=True,
        highlight=False,
    )
    train(config, out, resume=resume, watch=Course(rich.get_console(), out))
    return report_rft(config, out)


def report_rft(config: RunConfig, out: Path) -> dict[str, Any]:
    """Let the agents `sft` and `ppo` of a run answer all validation rows greedily, and write the report.

    Raises:
        AgileError: Nearly all answers failed, or the folder cannot be written.
    """
    setup = Setup(config, out)
    rows = setup.task.streams("validation")
    sessions = {name: _play(setup, out / name, rows) for name in ("sft", "ppo")}
    return write_rft_report(config.task.model_dump(mode="json"), rows, sessions["sft"], sessions["ppo"], out)


def _play(setup: Setup, agent: Path, rows: Sequence[Stream]) -> list[Session]:
    tokenizer = setup.tokenizer(agent)
    policy = setup.greedy(tokenizer, agent)
    played = collect(
        setup.executor(tokenizer),
        policy,
        rows,
        setup.memory,
        seed=derive_seed(setup.config.seed, "validation"),
        max_failed=setup.config.rollout.max_failed,
        max_concurrent=setup.config.rollout.concurrency,
    )
    try:
        return [session for trajectory in run_loop(played) for session in trajectory.sessions]
    finally:
        policy.close()
