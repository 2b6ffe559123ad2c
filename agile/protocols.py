"""What is plugged in: policies, memories, tools, experts, agents and tasks. One method each, or a few."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from agile.tokens import ActionCodec
from agile.types import (
    Advice,
    AdviceRequest,
    AgentSpec,
    Completion,
    Item,
    MemoryItem,
    Observation,
    Retrieved,
    Reward,
    Scope,
    Session,
    Stream,
    ToolResult,
)


class Policy(Protocol):
    """Something that continues token ids: a model, or a script."""

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        """Sample until a token of `stop` (kept) or `max_tokens`; the same seed gives the same sample."""
        ...


class TrainablePolicy(Policy, Protocol):
    """A policy whose weights the trainer replaces between collections.

    Attributes:
        temperature: Of sampling from the next request on; 0 is greedy.
        forbidden: Ids that are not sampled from the next request on, as the names of actions that were taken away.
    """

    temperature: float
    forbidden: Collection[int]

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Take over the weights, forget whatever was cached under the old ones, and stamp `version` from now on.

        Args:
            weights: `(name, tensor)` of every parameter by its name in the Hugging Face model, tied ones included, each
                tensor valid only until the next is asked for.

        Raises:
            AgileError: The engine did not take them.
        """
        ...

    def close(self) -> None:
        """Give back memory, processes and connections."""
        ...


class Agent(Protocol):
    """How one kind of agent talks: its actions and the text of everything it is shown."""

    @property
    def spec(self) -> AgentSpec: ...

    def question(self, item: Item, progress: float, price: float) -> str:
        """The opening text.

        Args:
            progress: Share of the stream that lies behind, in [0, 1).
            price: What advice costs in this session.
        """
        ...

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        """Read memory for this question: the entries, and the text that shows them."""
        ...

    def advice(self, advice: Advice) -> str:
        """The text that shows advice, or that there was none."""
        ...

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        """What `[UpdateMemory]` writes."""
        ...


class Teacher(Protocol):
    """Says what the agent should do: what imitation learns."""

    def policy(self, item: Item, memory: Memory, price: float, rng: np.random.Generator) -> Policy:
        """A policy for one session about `item` with this memory, at this price of advice."""
        ...


class TeachableAgent(Agent, Protocol):
    """An agent that `agile train` can teach and `agile bench` can play.

    Attributes:
        show_price: Whether the opening text says what advice costs.
    """

    @property
    def show_price(self) -> bool: ...

    def embedded_texts(self, item: Item) -> list[str]:
        """All texts that a session about `item` may embed, as far as they are known before it is played."""
        ...

    def corpus(self, items: Sequence[Item]) -> list[str]:
        """Texts that hold every word that sessions about `items` can show or should say."""
        ...

    def teacher(self, codec: ActionCodec, judge_yes: float) -> Teacher: ...

    def lessons(self, item: Item) -> list[MemoryItem]:
        """What memory holds of a question whose answer was known before the stream began."""
        ...

    def initial_memory(self, item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
        """What an imitation session about `item` starts with.

        Args:
            others: The questions of its stream.
        """
        ...


class AnswerKey(Protocol):
    """What is right, and what a perfect use of tools reaches; baselines need no more of a task."""

    def tool_answer(self, item: Item) -> str | None:
        """What the task's tool answers if it is called as it should be; None if no tool helps."""
        ...

    def is_correct(self, item: Item, answer: str | None, used_search: bool) -> bool: ...


class Task(AnswerKey, Protocol):
    """Where questions and rewards come from.

    Attributes:
        tools: What the agent can call, by the names of its actions.
        macro: Whether a report weighs every stream alike, not every question.
        skipped: What is wrong with each row of the files that was left out.
    """

    @property
    def tools(self) -> Mapping[str, Tool]: ...
    @property
    def macro(self) -> bool: ...
    @property
    def skipped(self) -> Sequence[str]: ...

    def streams(self, split: str) -> Sequence[Stream]: ...

    def score(self, item: Item, session: Session) -> Reward | Awaitable[Reward]:
        """The reward; its component `correct` is what reports call right, an advised session or not.

        Where answers are graded, the component `grade` stands in its place.
        """
        ...


class Memory(Protocol):
    """What the agent remembers."""

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        """Store items durably and return their ids."""
        ...

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        """At most `k` items of the scope, most similar first, ties by lower id."""
        ...

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        """How many items of the scope have at least this similarity."""
        ...

    def __len__(self) -> int: ...


class Tool(Protocol):
    """Something the agent can call. It answers every argument with a result and never raises for a bad one.

    `earlier` holds what the session has done so far, for tools that do not show the same thing twice.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    async def __call__(self, argument: str, item: Item, earlier: Sequence[Observation] = ()) -> ToolResult: ...


class Advisor(Protocol):
    """A human or other expert. May raise or take forever: `agile.advice.AdviceDesk` handles both."""

    async def advise(self, request: AdviceRequest) -> Advice: ...


Score = Callable[[Item, Session], Reward | Awaitable[Reward]]
