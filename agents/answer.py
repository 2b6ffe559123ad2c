"""The agent that answers at once: reinforcement fine-tuning of rows of messages, without memory, tools or advice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory
from agile.tokens import ActionCodec
from agile.types import Action, ActionSpec, Advice, AgentSpec, Fn, Item, MemoryItem, Retrieved

SPEC = AgentSpec(
    "answer",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the messages.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(Fn.PREDICT_ANSWER, "Answer the last message.", (Fn.SUBMIT_ANSWER,), takes_argument=True),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand the answer to the grader.", ()),
    ),
)


@dataclass(frozen=True, slots=True)
class AnswerAgent:
    """Shows a row's messages as they are; what it shows as tokens is for `agile.messages.MessagesCodec` to say."""

    show_price: bool = False
    spec: AgentSpec = SPEC

    def question(self, item: Item, progress: float, price: float) -> str:
        return item.question

    def embedded_texts(self, item: Item) -> list[str]:
        return []

    def corpus(self, items: Sequence[Item]) -> list[str]:
        """Messages, answers, and what the rows hold for the grader."""
        texts = []
        for item in items:
            texts += [message["content"] for message in item.context["messages"]]
            texts += [item.answer or "", json.dumps(item.context["item"], ensure_ascii=False)]
        return texts

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        return [], ""

    def advice(self, advice: Advice) -> str:
        return ""

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        return []

    def lessons(self, item: Item) -> list[MemoryItem]:
        return []

    def teacher(self, codec: ActionCodec, judge_yes: float) -> AnswerTeacher:
        return AnswerTeacher(codec)

    def initial_memory(self, item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
        return []


@dataclass(frozen=True, slots=True)
class AnswerTeacher:
    """Gives the answer that stands in the row."""

    codec: ActionCodec

    def policy(self, item: Item, memory: Memory, price: float, rng: np.random.Generator) -> ScriptedPolicy:
        return ScriptedPolicy(self.codec, lambda context: Action(Fn.PREDICT_ANSWER, item.answer))
