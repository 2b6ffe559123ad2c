"""Imitation: what a step sees, what it maximises, and that cutting a batch changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agile.batching import Row
from agile.engine import Engine
from agile.model import ActorCritic
from agile.train.sft import sft_schedule, train_sft
from agile.types import SegmentEnd
from tests.doors import Gradients, actor_critic, largest_difference, llama, random_rows, weights


def row(length: int, actions: Sequence[int]) -> Row:
    mask = np.isin(np.arange(length), actions)
    return Row(np.arange(3, 3 + length), mask, np.zeros(len(actions), np.float32), SegmentEnd.TERMINATED)


def gradients(rows: Sequence[Row], *, micro_batch_tokens: int = 1000) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step on all rows."""
    engine, losses = Gradients(actor_critic()), []
    train_sft(
        engine,
        rows,
        batch_size=100,
        micro_batch_tokens=micro_batch_tokens,
        num_steps=1,
        seed=0,
        on_step=lambda step, loss: losses.append(loss),
    )
    return losses[0], engine.steps[0]


def test_the_loss_is_the_mean_negative_log_likelihood_of_the_action_tokens() -> None:
    rows, model = random_rows(5), actor_critic()
    total = 0.0
    for r in rows:
        ids = torch.from_numpy(r.token_ids)[None]
        logprobs = model.lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total += logprobs[torch.from_numpy(r.action_mask[1:])].sum().item()
    assert gradients(rows)[0] == pytest.approx(-total / sum(r.num_actions for r in rows), rel=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1000, 30, 1])
def test_batch_one_accumulated_eight_times_is_batch_eight(micro_batch_tokens: int) -> None:
    rows = random_rows(8)
    assert len({len(r) for r in rows}) > 2 and len({r.num_actions for r in rows}) > 2

    def step(tokens: int) -> dict[str, Tensor]:
        model = actor_critic()
        train_sft(Engine(model, lr=1e-3), rows, batch_size=8, micro_batch_tokens=tokens, num_steps=1, seed=0)
        return weights(model)

    assert largest_difference(step(micro_batch_tokens), step(1000)) < 1e-6
    assert largest_difference(step(1000), weights(actor_critic())) > 1e-4


def test_order_and_rows_without_actions_change_nothing() -> None:
    rows = random_rows(6)
    loss, expected = gradients(rows)
    idle = Row(np.full(40, 5), np.zeros(40, bool), np.zeros(0, np.float32), SegmentEnd.TRUNCATED)
    for others in ([*rows[::-1]], [idle, *rows, idle]):
        other_loss, other = gradients(others)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert largest_difference(other, expected) < 1e-6
    assert gradients([*rows, row(5, [1])])[0] != pytest.approx(loss, rel=1e-3), "another row with actions does"


def test_tokens_after_the_last_action_carry_nothing() -> None:
    """A causal model cannot learn from what it had not seen."""
    rows = random_rows(6)
    longer = [
        replace(r, token_ids=np.append(r.token_ids, [4, 5]), action_mask=np.append(r.action_mask, [False, False]))
        for r in rows
    ]
    assert largest_difference(gradients(longer)[1], gradients(rows)[1]) < 1e-6


def test_only_the_language_model_learns() -> None:
    _, grads = gradients(random_rows(4))
    assert {name.split(".")[0] for name in grads} == {"lm"}


class Watched(Gradients):
    """Notes the rows of each forward."""

    def __init__(self, module: ActorCritic):
        super().__init__(module)
        self.seen: list[list[list[int]]] = []

    def forward(self, *args: Any) -> Any:
        (batch,) = args
        ends = torch.where(batch.position_ids == 0)[0].tolist()[1:]
        self.seen.append([ids.tolist() for ids in batch.input_ids.tensor_split(ends)])
        return self.plain(batch)


def seen(first_step: int, num_steps: int, seed: int = 3) -> list[list[list[int]]]:
    """What each step from `first_step` on sees of 10 rows, 3 steps an epoch."""
    engine = Watched(ActorCritic(llama()))
    numbers: list[int] = []
    train_sft(
        engine,
        random_rows(10),
        batch_size=4,
        micro_batch_tokens=1000,
        num_steps=num_steps,
        seed=seed,
        first_step=first_step,
        on_step=lambda step, loss: numbers.append(step),
    )
    assert numbers == list(range(first_step + 1, num_steps + 1))
    return engine.seen


@pytest.mark.parametrize("first_step", [1, 3, 4, 7, 8])
def test_what_a_step_sees_depends_on_the_seed_and_the_step_alone(first_step: int) -> None:
    steps = seen(0, 8)
    assert seen(first_step, 8) == steps[first_step:]
    assert seen(0, 8, seed=4) != steps
    assert steps[:3] != steps[3:6], "every epoch has an order of its own"
    first_epoch = sorted(ids for step in steps[:3] for ids in step)
    assert first_epoch == sorted(r.token_ids.tolist() for r in random_rows(10)), "and sees every row once"


def test_schedule_by_hand() -> None:
    factor = sft_schedule(10, 2)
    assert [factor(i) for i in range(3)] == [0.5, 1.0, 1.0]
    assert factor(6) == pytest.approx(0.55)
    assert factor(10) == pytest.approx(0.1) == factor(99)
    assert factor(4) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert sft_schedule(1, 0)(0) == 1.0


def test_imitation_is_learned() -> None:
    """Two rows by heart, within twenty steps."""
    rows, losses = [row(6, [3, 4]), row(9, [2, 8])], []
    train_sft(
        Engine(ActorCritic(llama()), lr=3e-2),
        rows,
        batch_size=2,
        micro_batch_tokens=1,
        num_steps=20,
        seed=0,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert losses[0] > 1 and losses[-1] < 0.1
