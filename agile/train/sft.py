"""Imitation: maximise the likelihood of the action tokens of a teacher's sessions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from agile import ranks
from agile.batching import Row, make_batch, micro_batches, minibatches
from agile.engine import Engine
from agile.losses import sft_loss, token_logprobs


def sft_schedule(num_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to a tenth."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        share = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor


def train_sft(
    engine: Engine,
    rows: Sequence[Row],
    *,
    batch_size: int,
    micro_batch_tokens: int,
    share_prefixes: bool = False,
    num_steps: int,
    seed: int,
    first_step: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train for `num_steps` optimizer steps, of which `first_step` are done.

    Batches of a step depend on `seed` and the step alone, so that a resumed run sees what the uninterrupted one saw.

    Args:
        on_step: Called after each step with its number (from 1) and its loss in nats per action token.
    """
    per_epoch = math.ceil(sum(row.num_actions > 0 for row in rows) / batch_size)
    step = first_step
    while step < num_steps:
        epoch, done = divmod(step, per_epoch)
        batches = list(minibatches(rows, batch_size, np.random.default_rng([seed, epoch])))
        for batch in batches[done : done + num_steps - step]:
            num_tokens = sum(rows[i].num_actions for i in batch)
            total = 0.0
            micros = micro_batches(
                rows, batch, micro_batch_tokens, share_prefixes=share_prefixes, num_ranks=ranks.world_size()
            )[ranks.rank()]
            for micro in micros:
                data = make_batch([rows[i] for i in micro], engine.device, share_prefixes=share_prefixes)
                logits, _, _ = engine.forward(data)
                logprobs = token_logprobs(logits, data.action_ids)
                loss = sft_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=num_tokens)
                engine.backward(loss, last=micro is micros[-1])
                total += loss.item()
            engine.step()
            step += 1
            on_step(step, ranks.total({"loss": total})["loss"])
