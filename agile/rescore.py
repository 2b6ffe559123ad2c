"""`agile replay --rescore`: what a model says today of the tokens that were sampled, against what was logged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agile.batching import Row, make_batch, micro_batches, session_rows
from agile.errors import AgileError
from agile.losses import token_logprobs
from agile.model import ActorCritic
from agile.replay import RunParts
from agile.session_log import Logged, logged_sessions
from agile.types import Session, Source

AGREES = 1e-4  # nats: what float32 and another order of sums leave
CHUNK = 256  # sessions that are sorted by length together


@dataclass(slots=True)
class Drift:
    """How far logprobs lie from the logged ones, over the tokens of one policy version."""

    num_tokens: int = 0
    max_difference: float = 0.0
    sum_difference: float = 0.0
    sum_ratio: float = 0.0
    num_outside: int = 0

    def add(self, logged: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        difference = found.astype(np.float64) - logged
        ratio = np.exp(difference)
        self.num_tokens += difference.size
        self.max_difference = max(self.max_difference, float(np.abs(difference).max(initial=0.0)))
        self.sum_difference += float(np.abs(difference).sum())
        self.sum_ratio += float(ratio.sum())
        self.num_outside += int(((ratio < 0.9) | (ratio > 1.1)).sum())

    @property
    def mean_difference(self) -> float:
        return self.sum_difference / self.num_tokens

    @property
    def mean_ratio(self) -> float:
        return self.sum_ratio / self.num_tokens

    @property
    def outside(self) -> float:
        """Share of tokens whose ratio is outside [0.9, 1.1]."""
        return self.num_outside / self.num_tokens


@torch.no_grad()
def score(
    model: ActorCritic, rows: Sequence[Row], *, micro_batch_tokens: int, temperature: float
) -> list[NDArray[np.float32]]:
    """Logprobs of the action tokens of each row, arrays (A,)."""
    device = next(model.parameters()).device
    found: dict[int, NDArray[np.float32]] = {}
    (micros,) = micro_batches(rows, np.arange(len(rows)), micro_batch_tokens)
    for chosen in micros:
        data = make_batch([rows[i] for i in chosen], device)
        logprobs = token_logprobs(model(data)[0], data.action_ids, temperature).cpu().numpy()
        ends = np.cumsum([rows[i].num_actions for i in chosen])[:-1]
        found |= dict(zip(chosen.tolist(), np.split(logprobs, ends), strict=True))
    return [found[i] for i in range(len(rows))]


def rescore(
    model: ActorCritic, sessions: Iterable[Logged], micro_batch_tokens: int, temperature: float
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """For each session and version of the policy that played it: its name, logged and found logprobs, arrays (A,)."""
    rest = iter(sessions)
    while chunk := list(islice(rest, CHUNK)):
        rows = [session_rows(logged.session) for logged in chunk]
        flat = [row for part in rows for row in part]
        scores = iter(score(model, flat, micro_batch_tokens=micro_batch_tokens, temperature=temperature))
        for logged, part in zip(chunk, rows, strict=True):
            empty = np.zeros(0, np.float32)
            was = np.concatenate([empty, *(row.logprobs for row in part)])
            now = np.concatenate([empty, *(next(scores) for _ in part)])
            versions = np.array(_versions(logged.session))
            for version in sorted(set(versions.tolist())):
                name = f"version {version}" if not logged.agent else f"test of {logged.agent}"
                yield name, was[versions == version], now[versions == version]


def _versions(session: Session) -> list[int]:
    """The policy's version at each action token."""
    spans = [span for segment in session.segments for span in segment.spans if span.source is Source.LLM]
    return [span.policy_version or 0 for span in spans for _ in span.token_ids]


def rescore_run(
    run: Path, checkpoint: Path, console: Console, *, session_id: str | None = None, step: int | None = None
) -> dict[str, Drift]:
    """Score the logged tokens of a run with the model of a Hugging Face folder; a drift for each policy version.

    Raises:
        AgileError: No such run, session, step or model, or nothing was sampled.
    """
    if not (checkpoint / "config.json").exists():
        raise AgileError(
            f"{checkpoint} is no model (it has no config.json). Name a Hugging Face folder, such as {run / 'sft'}."
        )
    parts = RunParts(run)
    config, setup = parts.config, parts.setup
    model = ActorCritic(setup.language_model(setup.tokenizer(checkpoint), checkpoint))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = model.lm.get_input_embeddings().num_embeddings
    found: dict[str, Drift] = {}
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rescore", total=None)
        for agent, sessions in groupby(logged_sessions(run, session_id, step), lambda logged: logged.agent):
            if agent == "prompted":  # its ids are those of a carrier, no model's
                continue
            checked = (_fitting(logged, size, checkpoint) for logged in sessions)
            # tests are greedy, and log what temperature 1 says
            temperature = 1.0 if agent else config.rollout.temperature
            for name, was, now in rescore(model, checked, config.ppo.micro_batch_tokens, temperature):
                found.setdefault(name, Drift()).add(was, now)
                progress.advance(bar)
    if not found:
        raise AgileError(f"{run}: no token of these sessions was sampled; there is nothing to score.")
    return found


def _fitting(logged: Logged, size: int, checkpoint: Path) -> Logged:
    ids = [i for segment in logged.session.segments for i in segment.token_ids]
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise AgileError(
            f"{logged} holds the token {max(ids)}, but {checkpoint} knows {size:,}. Name a model with the run's "
            "tokenizer."
        )
    return logged


def print_drifts(drifts: Mapping[str, Drift], console: Console) -> None:
    """Print a table, a row for each version."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("played by", no_wrap=True)
    for column in ("tokens", "max difference", "mean", "mean ratio", "outside 0.9-1.1"):
        table.add_column(column, justify="right")
    for name, drift in drifts.items():
        agrees = drift.max_difference <= AGREES
        table.add_row(
            name,
            f"{drift.num_tokens:,}",
            f"{drift.max_difference:.1e}",
            f"{drift.mean_difference:.1e}",
            f"{drift.mean_ratio:.4f}",
            f"{drift.outside:.1%}",
            style="bold" if agrees else "",
        )
    console.print(table)
    same = [name for name, drift in drifts.items() if drift.max_difference <= AGREES]
    whose = ", ".join(same) if same else "none"
    console.print(f"Logprobs agree to {AGREES:g} nats: {whose}.", soft_wrap=True)
