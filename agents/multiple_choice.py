"""The agent that answers multiple-choice questions by memory and advice, without a tool (paper, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agile.agents.corpus import words_of_all
from agile.conversation import in_full, shown_turns
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory
from agile.tasks.choices import read_choice
from agile.tokens import ActionCodec
from agile.types import Action, ActionSpec, Advice, AgentSpec, Fn, Item, MemoryItem, MemoryKind, Retrieved, Scope

NO_LESSON = "none"
MAX_LESSON = 240  # letters of a reflection that the teacher makes of an explanation
MAX_INITIAL = 64  # entries that an imitation session starts with

SPEC = AgentSpec(
    "multiple_choice",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the question and its options.", (Fn.RETRIEVE_MEMORY,)),
        ActionSpec(
            Fn.RETRIEVE_MEMORY,
            "Look up similar questions: `history 0.85 question -> answer ( what it taught )`. The number is a "
            "similarity, at most 1; the answer is in words, for letters mean other options in other questions.",
            (Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER),
        ),
        ActionSpec(Fn.SEEK_ADVICE, "Ask a human expert, at a price.", (Fn.REFLECTION,)),
        ActionSpec(
            Fn.REFLECTION,
            f"Say in one sentence what the advice teaches beyond this question; `{NO_LESSON}` if it teaches nothing.",
            (Fn.UPDATE_MEMORY,),
            takes_argument=True,
        ),
        ActionSpec(Fn.UPDATE_MEMORY, "Remember question, answer and reflection.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(
            Fn.PREDICT_ANSWER,
            "Give the letter of one option; after advice the expert's.",
            (Fn.SUBMIT_ANSWER,),
            takes_argument=True,
        ),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand the answer to the user.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Start an empty context.", (Fn.GET_QUESTION,)),
    ),
)


@dataclass(frozen=True, slots=True)
class MultipleChoiceAgent:
    """Shows question, options and similar earlier questions.

    Similarities are shown to the nearest 0.05, so that a small vocabulary covers them.

    Attributes:
        product_k: Entries of the same subject's history to show.
        group_k: Entries of the whole history to show (paper: 5).
        knowledge_k: Reflections to show by themselves; where it is 0 they stand in the history alone.
        show_price: Whether the price of advice stands in the prompt, so that one policy can serve every price.
        show_turns: Earlier turns of the conversation to show; with them memory is searched by the questions of all.
    """

    product_k: int = 0
    group_k: int = 5
    knowledge_k: int = 0
    show_price: bool = False
    show_turns: int = 0
    spec: AgentSpec = SPEC

    def question(self, item: Item, progress: float, price: float) -> str:
        lines = [f"round {int(progress * 10)}"]
        if self.show_price:
            lines.append(f"advice costs {price:.2f}")
        lines += shown_turns(item, self.show_turns)
        lines.append(f"question: {item.question}")
        lines += [f"{letter}: {words}" for letter, words in item.context["options"].items()]
        return "\n".join(lines) + "\n"

    def embedded_texts(self, item: Item) -> list[str]:
        """All texts that a session about `item` may embed, as far as they are known before it is played."""
        return [item.question, *([lesson_of(item)] if self.knowledge_k else [])]

    def corpus(self, items: Sequence[Item]) -> list[str]:
        """Texts that hold every word that sessions about `items` can show or should say, to train a tokenizer on."""
        texts = [f"round {i}" for i in range(10)]
        texts += [f"history {i / 20:.2f} knowledge {-i / 20:.2f}" for i in range(21)]
        texts += ["-> ( ) expert: answer: A: B: C: D: E: none A B C D E"]
        texts += words_of_all(self.spec, show_price=self.show_price)
        for item in items:
            texts += [self.question(item, 0.0, 1.0), lesson_of(item), item.context["long_answer"]]
        return texts

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        asked = in_full(item.question, item.context) if self.show_turns else item.question
        of_subject = Scope(MemoryKind.HISTORY, item.group, item.product)
        entries = memory.retrieve(asked, self.product_k, of_subject) if self.product_k else []
        if self.group_k:
            shown = {e.item.id for e in entries}
            num_found = self.group_k + self.product_k
            others = memory.retrieve(asked, num_found, Scope(MemoryKind.HISTORY, item.group))
            entries += [e for e in others if e.item.id not in shown][: self.group_k]
        if self.knowledge_k:
            entries += memory.retrieve(asked, self.knowledge_k, Scope(MemoryKind.KNOWLEDGE, item.group))
        lines = [f"{e.item.kind} {round(e.similarity * 20) / 20:.2f} {e.item.text}\n" for e in entries]
        return entries, "".join(lines)

    def advice(self, advice: Advice) -> str:
        if not advice.answered:
            return f"no advice ( {advice.status} )\n"
        return (f"expert: {advice.explanation}\n" if advice.explanation else "") + f"answer: {advice.answer}\n"

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        """Nothing of advice that cannot be read as an option: what it says may mean anything."""
        choice = read_choice(advice.answer, item.context["options"]) if advice is not None and advice.answered else None
        return [] if choice is None else self._entries(item, session_id, choice, reflection, origin="advice")

    def lessons(self, item: Item) -> list[MemoryItem]:
        return self._entries(item, "", item.answer, lesson_of(item), origin="initial")

    def teacher(self, codec: ActionCodec, judge_yes: float) -> MultipleChoiceTeacher:
        return MultipleChoiceTeacher(codec, self, judge_yes)

    def initial_memory(self, item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
        """Some other questions of the stream; how many is drawn too."""
        rest = [other for other in others if other is not item]
        chosen = rng.permutation(len(rest))[: rng.integers(min(MAX_INITIAL, len(rest)) + 1)]
        return [entry for i in sorted(chosen) for entry in self.lessons(rest[i])]

    def _entries(self, item: Item, session_id: str, choice: str, lesson: str, origin: str) -> list[MemoryItem]:
        """The history entry, with what it taught, and a knowledge entry where those are shown."""
        words, asked = item.context["options"][choice], in_full(item.question, item.context)
        lesson = "" if lesson.strip() == NO_LESSON else lesson.strip()
        told = f" ( {lesson} )" if lesson else ""
        entries = [
            MemoryItem(
                MemoryKind.HISTORY,
                key=asked,
                text=f"{asked} -> {words}{told}",
                answer=words,
                group=item.group,
                product=item.product,
                session_id=session_id,
                origin=origin,
            )
        ]
        if lesson and self.knowledge_k:
            of_reflection = "reflection" if origin == "advice" else origin
            entries.append(
                MemoryItem(
                    MemoryKind.KNOWLEDGE,
                    key=lesson,
                    text=lesson,
                    group=item.group,
                    session_id=session_id,
                    origin=of_reflection,
                )
            )
        return entries


class MultipleChoiceTeacher:
    """Labels sessions by the paper's rule: a question that a stronger model answers right is answered, with the gold
    answer; one that it answers wrong is asked about, and the answer's explanation makes the reflection.

    Args:
        codec: Of the executor that writes the sessions.
        agent: Tells what is in sight.
        judge_yes: How often a question is answered where no answer of a stronger model is recorded (`predicted` in the
            item's context). A question that memory holds is always answered.
    """

    def __init__(self, codec: ActionCodec, agent: MultipleChoiceAgent, judge_yes: float):
        self.codec = codec
        self.agent = agent
        self.judge_yes = judge_yes

    def policy(self, item: Item, memory: Memory, price: float, rng: np.random.Generator) -> ScriptedPolicy:
        """A policy for one session about `item` with this memory; the stronger model knows nothing of the price."""
        entries, _ = self.agent.recall(item, memory)
        words = item.context["options"][item.answer]
        drawn = bool(rng.random() < self.judge_yes)
        known = item.context["predicted"] == item.answer if "predicted" in item.context else drawn
        answers = known or any(e.item.key == item.question and e.item.answer == words for e in entries)
        return ScriptedPolicy(self.codec, lambda context: self._decide(context, item, answers))

    def _decide(self, context: str, item: Item, answers: bool) -> Action:
        if context.rstrip().endswith(f"[{Fn.REFLECTION}]"):
            return Action(Fn.REFLECTION, lesson_of(item))
        if answers or f"[{Fn.SEEK_ADVICE}]" in context:
            return Action(Fn.PREDICT_ANSWER, item.answer)
        return Action(Fn.SEEK_ADVICE)


def lesson_of(item: Item) -> str:
    """What a question teaches: its reflection, else the first sentence of its explanation, else `none`."""
    text = " ".join((item.context["reflection"] or item.context["long_answer"]).split())
    if len(text) > MAX_LESSON:
        sentence = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0]
        text = sentence if len(sentence) <= MAX_LESSON else text[:MAX_LESSON].rpartition(" ")[0]
    return text or NO_LESSON
