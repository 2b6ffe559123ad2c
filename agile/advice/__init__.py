"""Experts that the agent can ask, and the desk that charges, limits and outlives them."""

from agile.advice.advisors import (
    NOTHING_READABLE,
    CallbackAdvisor,
    DatasetAdvisor,
    NoisyAdvisor,
    RecordedAdvisor,
    gold_answer,
    gold_explanation,
    wrong_answer,
)
from agile.advice.desk import AdviceDesk
from agile.advice.terminal import TerminalAdvisor

__all__ = [
    "NOTHING_READABLE",
    "AdviceDesk",
    "CallbackAdvisor",
    "DatasetAdvisor",
    "NoisyAdvisor",
    "RecordedAdvisor",
    "TerminalAdvisor",
    "gold_answer",
    "gold_explanation",
    "wrong_answer",
]
