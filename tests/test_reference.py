"""The reference policy stays what it was, wherever it lies."""

from __future__ import annotations

import pytest
import torch

from agile.batching import make_batch
from agile.engine import Engine
from agile.model import ActorCritic
from agile.reference import frozen
from tests.doors import actor_critic, llama, random_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (0, True), (3, False), (3, True)])
def test_a_frozen_reference_stays_what_it_was(stage: int, offload: bool) -> None:
    batch = make_batch(random_rows(4), CPU)
    model = actor_critic()
    with torch.no_grad():
        expected = model(batch)[0]
    engine = Engine(model, lr=0.1, zero_stage=stage)
    reference = frozen(ActorCritic(llama()), engine, offload=offload)
    for _ in range(2):
        with reference.scoring():
            logits = reference(batch)[0]
        assert not logits.requires_grad
        torch.testing.assert_close(logits, expected)
        engine.backward(engine.forward(batch)[0].square().sum(), last=True)
        engine.step()
    with torch.no_grad():
        assert not torch.allclose(engine.forward(batch)[0], expected), "the engine must have learned something"
    engine.close()
