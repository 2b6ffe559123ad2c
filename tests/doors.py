"""A world for tests of training: behind one of two doors is a reward, and before it comes, the context is cleared.

Sessions take two decisions in two segments. A model of random weights plays some of them to the end, gets lost in
others and is cut off by a limit in a few, so that its rollouts hold every kind of segment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from agile.advice import AdviceDesk, DatasetAdvisor
from agile.batching import Row
from agile.engine import Engine
from agile.executor import Executor, Limits
from agile.model import ActorCritic, small_llama
from agile.policies import HFPolicy
from agile.protocols import Memory
from agile.rollout import collect
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import (
    ActionSpec,
    Advice,
    AgentSpec,
    Fn,
    Item,
    MemoryItem,
    Observation,
    Retrieved,
    Reward,
    Segment,
    SegmentEnd,
    Session,
    SessionStatus,
    Source,
    Span,
    Stream,
    ToolResult,
    Trajectory,
)
from tests.worlds import ListMemory

SPEC = AgentSpec(
    "doors",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the sign.", ("Left", "Right")),
        ActionSpec("Left", "Go left.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec("Right", "Go right.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Forget the sign.", (Fn.RETRIEVE_MEMORY,)),
        ActionSpec(Fn.RETRIEVE_MEMORY, "Look around.", ("Stay", "Leave")),
        ActionSpec("Stay", "Stay there.", (Fn.SUBMIT_ANSWER,)),
        ActionSpec("Leave", "Go out.", (Fn.SUBMIT_ANSWER,)),
        ActionSpec(Fn.SUBMIT_ANSWER, "Done.", ()),
    ),
)
SIGNS = {"red": "Left", "blue": "Right"}


@dataclass(frozen=True, slots=True)
class DoorAgent:
    spec: AgentSpec = SPEC

    def question(self, item: Item, progress: float, price: float) -> str:
        return f"sign {item.question}"

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        return [], "room"

    def advice(self, advice: Advice) -> str:
        return ""

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        return []


@dataclass(frozen=True, slots=True)
class Door:
    name: str
    description: str = "Says nothing."

    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult:
        return ToolResult("")


@cache
def codec() -> ActionCodec:
    return ActionCodec(build_tokenizer("word", ["sign red blue room"], SPEC, 64), SPEC)


def llama(seed: int = 0, *, hidden_size: int = 16, num_layers: int = 1, scale: float = 10.0) -> LlamaForCausalLM:
    """Random weights; `scale` on the head makes its distributions uneven."""
    lm = small_llama(
        codec().tokenizer, num_layers=num_layers, hidden_size=hidden_size, num_heads=2, max_tokens=128, seed=seed
    )
    with torch.no_grad():
        lm.lm_head.weight.mul_(scale)
    return lm


def right_door(item: Item, session: Session) -> Reward:
    return Reward({"correct": float(session.called(SIGNS[item.question]) and not session.failed)})


def streams(num_streams: int, num_items: int) -> list[Stream]:
    signs = list(SIGNS)
    return [
        Stream(f"s{i}", tuple(Item(f"s{i}/{j}", signs[(i + j) % 2], "", "door") for j in range(num_items)))
        for i in range(num_streams)
    ]


def make_executor(max_turns: int = 3) -> Executor:
    """With three turns some sessions are cut off; with eight they go on until they are done or lost."""
    doors = {name: Door(name) for name in ("Left", "Right", "Stay", "Leave")}
    limits = Limits(max_turns=max_turns, max_context_tokens=60, max_session_tokens=60, max_action_tokens=3)
    return Executor(DoorAgent(), codec(), doors, AdviceDesk(DatasetAdvisor(), 0.3), right_door, limits)


def rollouts(
    lm: LlamaForCausalLM,
    *,
    num_streams: int = 8,
    num_items: int = 4,
    temperature: float = 1.0,
    max_turns: int = 3,
    seed: int = 0,
) -> list[Trajectory]:
    policy = HFPolicy(lm, temperature=temperature)
    return asyncio.run(
        collect(
            make_executor(max_turns),
            policy,
            streams(num_streams, num_items),
            lambda stream: ListMemory(),
            seed=seed,
            max_failed=1.0,
        )
    )


def totals(trajectories: Sequence[Trajectory]) -> list[list[float]]:
    return [[s.reward.total for s in t.sessions if s.reward] for t in trajectories]


# --------------------------------------------------------------------------------------------------------------------
# By hand


def segment(token_ids: Sequence[int], action_mask: Sequence[bool], end: SegmentEnd) -> Segment:
    """One span a token; the log-probability of a sampled token is minus its id over a hundred."""
    spans = [
        Span(Source.LLM, (token,), (-token / 100,)) if action else Span(Source.TASK, (token,))
        for token, action in zip(token_ids, action_mask, strict=True)
    ]
    return Segment(tuple(spans), end)


def session(
    *segments: Segment,
    status: SessionStatus = SessionStatus.COMPLETED,
    stream_id: str = "s",
    index: int = 0,
    **changes: Any,
) -> Session:
    fixed: dict[str, Any] = {"item_id": "i", "kind": "door", "seed": 0, "steps": (), "retrieved": (), "written": ()}
    parts = {**fixed, "advice": None, "answer": None, **changes}
    return Session(f"{stream_id}/{index}", stream_id, index, segments=segments, status=status, **parts)


def random_rows(count: int, seed: int = 0, *, max_length: int = 14) -> list[Row]:
    """Rows of random tokens, lengths and numbers of actions."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(3, max_length))
        mask = rng.random(length) < rng.uniform(0.1, 0.9)
        mask[0], mask[-1] = False, True
        ids = rng.integers(3, len(codec().tokenizer), length)
        rows.append(Row(ids, mask, np.zeros(int(mask.sum()), np.float32), SegmentEnd.TERMINATED))
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Engines


class Gradients(Engine):
    """An engine in plain torch that keeps the gradients of every step and changes nothing."""

    def __init__(self, module: nn.Module):
        self.plain = module
        self.steps: list[dict[str, Tensor]] = []

    @property
    def module(self) -> Any:
        return self.plain

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, *args: Any) -> Any:
        return self.plain(*args)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        grads = {name: p.grad for name, p in self.plain.named_parameters() if p.grad is not None}
        self.steps.append(grads)
        self.plain.zero_grad(set_to_none=True)
        return float(torch.nn.utils.get_total_norm(grads.values()))

    @property
    def skipped(self) -> bool:
        return False


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def actor_critic(seed: int = 0, **changes: Any) -> ActorCritic:
    """A tiny one whose values are not 0."""
    model = ActorCritic(llama(seed, **changes))
    torch.manual_seed(seed)
    for parameter in model.value_head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model
