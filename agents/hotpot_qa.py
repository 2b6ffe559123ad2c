"""The agent that answers questions of several hops (HotPotQA): a thought, then a search, advice or the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agile.agents.corpus import words_of_all
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory
from agile.tokens import ActionCodec
from agile.tools.passages import MAX_SEARCHES, PASSAGES, embedded_texts
from agile.types import Action, ActionSpec, Advice, AgentSpec, Fn, Item, MemoryItem, Retrieved

SEARCH = "Search"
_DECISIONS = (SEARCH, Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER)

SPEC = AgentSpec(
    "hotpot_qa",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the question.", (Fn.REFLECTION,)),
        ActionSpec(
            Fn.REFLECTION,
            "Think in one or two sentences: what is known by now, what is missing, what to do next.",
            _DECISIONS,
            takes_argument=True,
        ),
        ActionSpec(
            SEARCH,
            "Find one more paragraph, `Title : text`, by a name or by words that it should hold; it is the best one "
            f"that is not yet shown. At most {MAX_SEARCHES} searches.",
            (Fn.REFLECTION,),
            takes_argument=True,
        ),
        ActionSpec(Fn.SEEK_ADVICE, "Ask a human expert, at a price.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(
            Fn.PREDICT_ANSWER,
            "Give the short answer, which is compared word by word: `yes`, `no`, or a name, date or few words without "
            "a sentence around them; after advice the expert's answer.",
            (Fn.SUBMIT_ANSWER,),
            takes_argument=True,
        ),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand the answer to the user.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Start an empty context.", (Fn.GET_QUESTION,)),
    ),
)
MISSING, KNOWN, UNKNOWN = "I need", "I can answer .", "I can not tell ."


@dataclass(frozen=True, slots=True)
class HotPotQAAgent:
    """Shows the question alone; thoughts are `[Reflection]`. It has no memory: no question helps with another.

    Attributes:
        show_price: Whether the price of advice stands above the question.
        dense: Whether the search embeds paragraphs.
    """

    show_price: bool = False
    dense: bool = True
    spec: AgentSpec = SPEC

    def question(self, item: Item, progress: float, price: float) -> str:
        cost = f"advice costs {price:.2f}\n" if self.show_price else ""
        return f"{cost}question: {item.question}\n"

    def embedded_texts(self, item: Item) -> list[str]:
        """Paragraphs and titles, for the dense search, and the question, for the baseline `recall`."""
        return [item.question, *(embedded_texts(item.context[PASSAGES]) if self.dense else ())]

    def corpus(self, items: Sequence[Item]) -> list[str]:
        """Texts that hold every word that sessions about `items` can show or should say, to train a tokenizer on."""
        texts = [f"{MISSING} {KNOWN} {UNKNOWN}", "expert: answer: none error : all 5 searches are used up"]
        texts += words_of_all(self.spec, show_price=self.show_price)
        for item in items:
            texts += [self.question(item, 0.0, 1.0), item.answer, *item.context[PASSAGES], *item.context["supporting"]]
        return texts

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        return [], ""

    def advice(self, advice: Advice) -> str:
        if not advice.answered:
            return f"no advice ( {advice.status} )\n"
        return f"expert: {advice.explanation or advice.answer}\nanswer: {advice.answer}\n"

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        return []

    def lessons(self, item: Item) -> list[MemoryItem]:
        return []

    def initial_memory(self, item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
        return []

    def teacher(self, codec: ActionCodec, judge_yes: float) -> HotPotQATeacher:
        return HotPotQATeacher(codec, judge_yes)


class HotPotQATeacher:
    """Plays by the gold supporting facts: searches for the title of each, then answers or asks.

    It answers what the paragraphs in sight spell out. Whether the rest (yes, no, a comparison) can be answered says a
    judge, who stands for the paper's stronger model; where he says no, and where a paragraph was not found, it asks.

    Args:
        codec: Of the executor that writes the sessions.
        judge_yes: How often the judge calls a question answerable that the paragraphs do not spell out.
    """

    def __init__(self, codec: ActionCodec, judge_yes: float):
        self.codec = codec
        self.judge_yes = judge_yes

    def policy(self, item: Item, memory: Memory, price: float, rng: np.random.Generator) -> ScriptedPolicy:
        judged = bool(rng.random() < self.judge_yes)
        supporting = {title: _fold(passage) for title, passage in item.context["supporting"].items()}
        spelled_out = any(f" {_words(item.answer)} " in f" {_words(passage)} " for passage in supporting.values())

        def decide(context: str) -> Action:
            missing = [title for title, passage in supporting.items() if passage not in _fold(context)]
            searching = bool(missing) and context.count(f"[{SEARCH}]") < MAX_SEARCHES
            answerable = not missing and (spelled_out or judged)
            if context.rstrip().endswith(f"[{Fn.REFLECTION}]"):
                thought = f"{MISSING} {missing[0]} ." if searching else KNOWN if answerable else UNKNOWN
                return Action(Fn.REFLECTION, thought)
            if searching:
                return Action(SEARCH, missing[0])
            if answerable or f"[{Fn.SEEK_ADVICE}]" in context:
                return Action(Fn.PREDICT_ANSWER, item.answer)
            return Action(Fn.SEEK_ADVICE)

        return ScriptedPolicy(self.codec, decide)


def _fold(text: str) -> str:
    return " ".join(text.split())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
