"""Experts that the agent can ask, and the desk that charges, limits and outlives them."""

from agile.advice.advisors import CallbackAdvisor, DatasetAdvisor, NoisyAdvisor, gold_answer, gold_explanation
from agile.advice.desk import AdviceDesk
from agile.advice.terminal import TerminalAdvisor

__all__ = [
    "AdviceDesk",
    "CallbackAdvisor",
    "DatasetAdvisor",
    "NoisyAdvisor",
    "TerminalAdvisor",
    "gold_answer",
    "gold_explanation",
]
