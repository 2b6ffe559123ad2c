"""What an agent is worth without one of its abilities: the same policy, in an executor that takes the ability away.

Nothing is said to the policy. An action that is taken away can no longer be chosen, a memory that is taken away gives
nothing back, as at the start of a stream; so every prompt is of a kind that the policy was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from agile.errors import AgileError
from agile.protocols import Agent, Memory, Policy
from agile.seeding import derive_seed
from agile.tokens import ActionCodec
from agile.types import (
    Action,
    Advice,
    AgentSpec,
    Completion,
    Fn,
    Item,
    MemoryItem,
    Retrieved,
    Scope,
)

POISONED = 0.1  # share of reflections that are made false
NOTHING = ("", "none")  # reflections that teach nothing


# --------------------------------------------------------------------------------------------------------------------
# What an agent may do


def without_actions(spec: AgentSpec, names: Collection[str]) -> AgentSpec:
    """The table without these actions; what could follow them only can no longer be reached.

    Raises:
        AgileError: After some action nothing else could follow.
    """
    kept = []
    for action in spec.actions:
        if action.name in names:
            continue
        followed_by = tuple(name for name in action.followed_by if name not in names)
        if not followed_by:
            raise AgileError(
                f"Agent {spec.name} cannot do without [{action.followed_by[0]}]: nothing else may follow "
                f"[{action.name}]. Leave this ablation out."
            )
        kept.append(replace(action, followed_by=followed_by))
    return AgentSpec(spec.name, tuple(kept))


@dataclass(frozen=True, slots=True)
class AblatedAgent:
    """An agent with another table of actions, whose reflections may change on their way to memory.

    Attributes:
        kept: What reaches memory of a reflection of a session, given the session's id.
    """

    agent: Agent
    spec: AgentSpec
    kept: Callable[[str, str], str]

    def question(self, item: Item, progress: float, price: float) -> str:
        return self.agent.question(item, progress, price)

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        return self.agent.recall(item, memory)

    def advice(self, advice: Advice) -> str:
        return self.agent.advice(advice)

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        return self.agent.remember(item, session_id, advice, self.kept(session_id, reflection))


def removed_actions(ablations: Collection[str], tools: Collection[str]) -> frozenset[str]:
    """Names of the actions that an agent without these abilities cannot take."""
    names = set(tools) if "tools" in ablations else set()
    if {"advice", "random_advice"} & set(ablations):
        names.add(Fn.SEEK_ADVICE)
    return frozenset(names)


def ablated(agent: Agent, ablations: Collection[str], tools: Collection[str], seed: int = 0) -> Agent:
    """The agent without these abilities; memory and chance have wrappers of their own.

    Args:
        ablations: Of `memory`, `reflection`, `advice`, `tools`, `random_advice` and `poisoned_memory`.
        tools: Names of the task's tools.
        seed: Draws which reflections are poisoned.

    Raises:
        AgileError: The agent has nothing left to choose.
    """
    # chance asks: the table keeps the action, and the policy is kept from choosing it
    removed = removed_actions(set(ablations) - {"random_advice"}, tools)
    spec = without_actions(agent.spec, removed)
    if "reflection" in ablations:
        return AblatedAgent(agent, spec, lambda session_id, reflection: "")
    if "poisoned_memory" in ablations:
        return AblatedAgent(agent, spec, partial(poisoned, seed=seed))
    return AblatedAgent(agent, spec, lambda session_id, reflection: reflection) if removed else agent


class RandomAdvice:
    """A policy that asks by chance: its first decision of a session is to ask with a fixed probability.

    Wraps a policy that never asks by itself; the paper's non-adaptive advice. One is made for each session.

    Args:
        rate: Probability of asking.
    """

    def __init__(self, policy: Policy, codec: ActionCodec, rate: float) -> None:
        self._policy = policy
        self._codec = codec
        self._rate = rate
        self._decided = False

    async def complete(
        self, prompt_ids: Sequence[int], *, max_tokens: int, stop: Collection[int], seed: int
    ) -> Completion:
        if not self._decided and self._codec.awaited(prompt_ids) is None:
            self._decided = True
            if derive_seed(seed, "ask") / 2**63 < self._rate:
                ids = self._codec.encode_action(Action(Fn.SEEK_ADVICE))
                return Completion(ids, (0.0,) * len(ids), "stop")
        return await self._policy.complete(prompt_ids, max_tokens=max_tokens, stop=stop, seed=seed)


# --------------------------------------------------------------------------------------------------------------------
# What memory gives back, and what reaches it


class NoMemory:
    """A memory that forgets at once."""

    def write(self, items: Sequence[MemoryItem]) -> list[int]:
        return []

    def retrieve(self, query: str, k: int, scope: Scope) -> list[Retrieved]:
        return []

    def count_similar(self, query: str, threshold: float, scope: Scope) -> int:
        return 0

    def __len__(self) -> int:
        return 0


def poisoned(session_id: str, reflection: str, seed: int, share: float = POISONED) -> str:
    """The reflection, made false for a share of the sessions; one that says nothing stays as it is.

    Which depends on the seed, the session and the text, so that every agent suffers alike.
    """
    text = reflection.strip()
    if text.lower() in NOTHING or derive_seed(seed, session_id, text) / 2**63 >= share:
        return reflection
    return falsified(text)


_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def falsified(text: str) -> str:
    """A false sentence for a true one: its yes and no, true and false swapped, else a denial of the whole.

    >>> falsified("steel for camping : yes")
    'steel for camping : no'
    >>> falsified("Leather lasts long.")
    'It is not true that Leather lasts long.'
    """
    words = r"\b(yes|no|true|false)\b"
    swapped = re.sub(words, lambda m: _OPPOSITE[m[0].lower()], text, flags=re.IGNORECASE)
    return swapped if swapped != text else f"It is not true that {text}"
