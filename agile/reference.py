"""The reference policy, to which the KL term holds the trained one: a frozen copy, or the model without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agile.batching import Batch
from agile.engine import Engine
from agile.lora import adapter_off


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores and never learns.

    Attributes:
        forward: Takes what `ActorCritic.forward` takes and returns what it returns; without gradients.
        scoring: What must be around a round of calls of it.
    """

    forward: Callable[..., Any]
    scoring: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        return self.forward(batch)


def adapter_free(engine: Engine) -> Reference:
    """The engine's own model with its adapter off: no second copy of the weights."""

    def forward(batch: Batch) -> Any:
        with adapter_off(engine.module.lm):
            return engine.forward(batch)

    return Reference(forward)


def frozen(model: nn.Module, engine: Engine, *, offload: bool) -> Reference:
    """A model of its own.

    Under ZeRO 3 it is sharded as the trained one is, so that each process holds its share; otherwise each holds all of
    it, on its device or, offloaded, in the memory of the CPU but for the time of scoring.

    Args:
        model: What is to be kept as it is now, such as an `ActorCritic`; it is moved.
        engine: Trains the other one.
    """
    model.requires_grad_(False)
    if engine.zero_stage == 3:
        import deepspeed

        zero: dict[str, Any] = {"stage": 3}
        if offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        half = {"enabled": engine.dtype == "bfloat16"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": half,
            "steps_per_print": 10**9,
        }
        sharded = deepspeed.initialize(model=model, config=config)[0]
        return Reference(sharded)
    model.to("cpu" if offload else engine.device)

    @contextmanager
    def moved() -> Iterator[None]:
        model.to(engine.device)
        try:
            yield
        finally:
            model.to("cpu")

    return Reference(model, moved if offload else nullcontext)
