"""What experts are worth to agents, from outcomes on the same questions. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from agile.evaluate import Outcome, rates

Key = tuple[str, str]  # stream and item


@dataclass(frozen=True, slots=True)
class Asked:
    """One expert, who was asked about every test question.

    Attributes:
        num_asked: Number of those questions.
        answered: Which of them got an answer.
        right: Which of them got a right one, whatever the task counts an advised session as.
        num_unreadable: Answers that could not be read as one.
        price: Of one answer, in units of a right answer.
        latency_s: Seconds until an answer, None if nobody knows.
    """

    num_asked: int
    answered: frozenset[Key]
    right: frozenset[Key]
    num_unreadable: int
    price: float
    latency_s: float | None


def experts_table(experts: Mapping[str, Asked]) -> list[dict[str, Any]]:
    """One row for each expert, best first.

    Returns:
        `expert`, `accuracy` (right answers), `answered` and `unreadable`, as shares of all questions; `price`,
        `latency_s`.
    """
    ranked = sorted(experts.items(), key=lambda entry: -len(entry[1].right) / entry[1].num_asked)
    return [
        {
            "expert": name,
            "accuracy": len(asked.right) / asked.num_asked,
            "answered": len(asked.answered) / asked.num_asked,
            "unreadable": asked.num_unreadable / asked.num_asked,
            "price": asked.price,
            "latency_s": asked.latency_s,
        }
        for name, asked in ranked
    ]


@dataclass(frozen=True, slots=True)
class Gain:
    """What one expert is worth to one agent.

    Attributes:
        accuracy: Of the agent, with the expert where it asks.
        advice_rate: How often it asks.
        price: Of the expert's answer.
        score: `accuracy - price * advice_rate`.
        gain: `score` less that of the agent by itself; None where that is not known.
        worth_below: The price of one answer below which asking gains; None likewise.
    """

    agent: str
    expert: str
    accuracy: float
    advice_rate: float
    price: float
    score: float
    gain: float | None
    worth_below: float | None


def gains(
    agents: Mapping[str, Sequence[Outcome]],
    experts: Mapping[str, Asked],
    *,
    own: Mapping[str, Mapping[Key, bool]] = MappingProxyType({}),
    macro: bool = False,
) -> list[dict[str, Any]]:
    """Every agent with every expert, best score first; keys as in `Gain`. Advice is right if the expert was.

    An agent that never asks is compared with one that asks about everything. One that asks sometimes keeps its own
    answers and has the expert's where it asked: what it then remembers, and later does with that, stays as it was
    played. Gain and worth are over what it would have answered itself there; None where that is not known.

    Args:
        agents: Outcomes of agents on the same questions.
        own: Whether the own answer is right where an agent asked, by agent; a question that is not there has none.
        macro: Whether every stream weighs alike, as in `agile.evaluate.summarise`.
    """
    found = []
    for agent, results in agents.items():
        never = not any(o.advised for o in results)
        mine = [_alone(o, own.get(agent, {})) for o in results]
        alone = float(rates(mine, 0.0, macro)["accuracy"]) if never or agent in own else None
        for name, asked in experts.items():
            if name == agent:  # who would ask oneself
                continue
            with_it = [_asking(o, m, asked) if never or o.advised else o for o, m in zip(results, mine, strict=True)]
            reached = rates(with_it, asked.price, macro)
            accuracy, rate, score = (float(reached[key]) for key in ("accuracy", "advice_rate", "score"))
            gain = None if alone is None else score - alone
            worth = None if alone is None or not rate else (accuracy - alone) / rate
            found.append(Gain(agent, name, accuracy, rate, asked.price, score, gain, worth))
    found.sort(key=lambda g: (g.agent, -g.score))
    return [asdict(g) for g in found]


def _alone(outcome: Outcome, own: Mapping[Key, bool]) -> Outcome:
    """The same question without an expert."""
    if not outcome.advised:
        return outcome
    return replace(outcome, correct=own.get((outcome.stream_id, outcome.item_id), False), advised=False)


def _asking(outcome: Outcome, alone: Outcome, expert: Asked) -> Outcome:
    """The same question with this expert, who may have no answer."""
    key = (outcome.stream_id, outcome.item_id)
    if outcome.failed:
        return outcome
    return replace(outcome, correct=key in expert.right, advised=True) if key in expert.answered else alone
