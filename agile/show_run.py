"""`agile show`: the sessions of a run to read, in the terminal or as a page."""

from __future__ import annotations

from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agile.copies import original_id
from agile.credit import Estimator
from agile.engine import Engine
from agile.errors import AgileError
from agile.learner import learner_format
from agile.replay import RunParts
from agile.report import write_page
from agile.run_folder import checkpoints
from agile.session_log import Logged, last_step, logged_sessions
from agile.show import View, describe, print_view, render_page
from agile.stages.ppo import ppo_engine
from agile.stages.rewards import discounts, terminal_rewards
from agile.train.ppo import advantages, credited, score_rows
from agile.types import Session, Trajectory

NUM_LISTED = 20


def show(
    run: Path,
    console: Console,
    session_id: str | None,
    step: int | None,
    *,
    logprobs: bool = False,
    values: bool = False,
    html: Path | None = None,
) -> None:
    """Print a session, or list those of a step; the newest of each where none is named.

    Raises:
        AgileError: No such run, session, step or critic, or the page cannot be written.
    """
    if session_id is None:
        if html is not None or values or logprobs:
            raise AgileError("--html, --values and --logprobs show one session: name it by --session ID.")
        list_sessions(run, console, last_step(run) if step is None else step)
        return
    codec = learner_format(run) if (run / "config.yaml").exists() else None
    if codec is not None and values:
        raise AgileError(f"{run} is of agile.Learner, whose critic is not asked here. Leave --values out.")
    parts = RunParts(run) if codec is None else None
    places: list[str] = []
    newest: deque[Logged] = deque(maxlen=1)
    for logged in logged_sessions(run, session_id, step):
        places.append(logged.place)
        newest.append(logged)
    shown = newest[0]
    if parts is not None:
        view = _view(parts, shown, values)
    else:
        assert codec is not None
        view = describe(shown.session, codec, title=str(shown))
    if html is None:
        print_view(view, console, figures=logprobs or values)
    else:
        write_page(html, render_page(view))
        console.print(f"Page: {html}", soft_wrap=True)
    if len(places) > 1:
        console.print(
            f"\nThe newest of {len(places)} of this id ({', '.join(places[:8])}{', ...' * (len(places) > 8)}); "
            "--step N picks one.",
            soft_wrap=True,
        )


def list_sessions(run: Path, console: Console, step: int | None) -> None:
    """Print the first sessions of a step (of tests, if None) as a table."""
    table = Table(box=box.SIMPLE_HEAD, title=f"step {step}" if step is not None else "tests", title_justify="left")
    for column in ("session", "kind", "status", "asked"):
        table.add_column(column, no_wrap=column == "session")
    table.add_column("reward", justify="right")
    sessions = logged_sessions(run, step=step)
    first = ""
    for logged in islice(sessions, NUM_LISTED):
        s = logged.session
        first = first or s.id
        asked = "yes" if s.advised else "" if s.advice is None else str(s.advice.status)
        reward = "" if s.reward is None else f"{s.reward.total:g}"
        table.add_row(*map(Text, (s.id, s.kind, str(s.status), asked, reward)))
    console.print(table)
    more = sum(1 for _ in sessions)
    at = "" if step is None else f" --step {step}"
    console.print(
        f"{f'And {more:,} more. ' if more else ''}Read one: agile show {run} --session {first}{at}", soft_wrap=True
    )


def _view(parts: RunParts, logged: Logged, values: bool) -> View:
    codec = parts.executor(logged).codec
    if not values:
        return describe(logged.session, codec, title=str(logged))
    found, gained, checkpoint = critic_of(parts, logged)
    title = f"{logged}, critic of {checkpoint}, advantages whitened over the stream"
    return describe(logged.session, codec, title=title, values=found, advantages=gained)


def critic_of(parts: RunParts, logged: Logged) -> tuple[list[float], list[float], str]:
    """What the run's newest critic says of each sampled token of a session: values and advantages.

    The advantages are those of the stream that the session was part of, played in the same step.

    Returns:
        Values and advantages in order, and the name of the checkpoint.

    Raises:
        AgileError: The run has no critic, or the session is none that training would learn from.
    """
    config = parts.config
    found = [path for path in checkpoints(parts.run) if path.name.startswith("ppo")]
    if not found or logged.step is None:
        raise AgileError(
            f"--values needs a critic and a session of training, and {logged} "
            + ("is a test's." if found else f"has none: {parts.run} has no checkpoint of PPO.")
            + " Leave --values out."
        )
    played = (other.session for other in logged_sessions(parts.run, step=logged.step))
    stream_id = logged.session.stream_id
    streams: dict[str, list[Session]] = {stream_id: []}
    for session in played:
        if original_id(session.stream_id) == original_id(stream_id):
            streams.setdefault(session.stream_id, []).append(session)
    trajectories = [Trajectory(name, tuple(sorted(s, key=lambda s: s.index))) for name, s in streams.items()]
    engine = _engine(parts, logged, found[-1])
    similarities = parts.setup.question_similarities()
    rewards = terminal_rewards(config, similarities, trajectories, np.random.default_rng(config.seed))
    ppo, flow = config.ppo, discounts(config.ppo)
    rows, plan, _ = credited(
        engine,
        trajectories,
        rewards,
        flow,
        micro_batch_tokens=ppo.micro_batch_tokens,
        share_prefixes=ppo.share_prefixes,
        masked=config.rollout.masked,
    )
    scored = score_rows(
        engine,
        None,
        rows,
        micro_batch_tokens=ppo.micro_batch_tokens,
        share_prefixes=ppo.share_prefixes,
        temperature=config.rollout.temperature,
    )
    gained, _, _ = advantages(plan, rows, scored, flow, Estimator(ppo.estimator))
    engine.close()
    index = logged.session.index
    numbers = next((played.rows for played in plan[0] if played.question[1] == index), range(0))
    return (
        [float(v) for i in numbers for v in scored[i].values],
        [float(v) for i in numbers for v in gained[i]],
        found[-1].name,
    )


def _engine(parts: RunParts, logged: Logged, checkpoint: Path) -> Engine:
    engine = ppo_engine(parts.config, parts.setup, parts.executor(logged).codec.tokenizer, parts.run / "sft")
    engine.load(checkpoint, "engine")
    return engine
