"""The agent that answers questions about products (paper, section 4.1): actions, and how its prompts are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agile.agents.corpus import words_of_all
from agile.conversation import in_full, shown_turns
from agile.memory_use import settles
from agile.policies.scripted import ScriptedPolicy
from agile.protocols import Memory
from agile.tokens import ActionCodec
from agile.types import Action, ActionSpec, Advice, AgentSpec, Fn, Item, MemoryItem, MemoryKind, Retrieved, Scope

SEARCH = "SearchProduct"
NO_KNOWLEDGE = "none"
MAX_CORRECTED = 0.3  # of questions that no expert is asked: largest share that a randomised memory holds
_DECISIONS = (SEARCH, Fn.SEEK_ADVICE, Fn.PREDICT_ANSWER)

SPEC = AgentSpec(
    "product_qa",
    (
        ActionSpec(Fn.GET_QUESTION, "Read the question, and what is known of the product.", (Fn.RETRIEVE_MEMORY,)),
        ActionSpec(
            Fn.RETRIEVE_MEMORY,
            "Look up similar questions and knowledge. `history 0.85 same Q -> A` is an earlier question with its true "
            "answer, about the same product or an other one of the group; `knowledge 0.70 TEXT` holds for the group; "
            "the numbers are similarities, at most 1. `similar 3` counts earlier questions that are alike.",
            _DECISIONS,
        ),
        ActionSpec(
            SEARCH,
            "Find products by one SQLite SELECT on the table `products`, whose rows are the products of the group and "
            "whose key is `asin`, such as SELECT asin FROM products WHERE price < 20 ORDER BY price LIMIT 1. Only for "
            "a question that asks for a product: after a search, an answer to any other question counts as wrong.",
            (Fn.PREDICT_ANSWER, Fn.SEEK_ADVICE, SEARCH),
            takes_argument=True,
        ),
        ActionSpec(Fn.SEEK_ADVICE, "Ask a human expert, at a price.", (Fn.REFLECTION,)),
        ActionSpec(
            Fn.REFLECTION,
            "Say in one sentence what the advice teaches about the whole group of products, in words that help with "
            f"later questions about other products; `{NO_KNOWLEDGE}` if it teaches nothing.",
            (Fn.UPDATE_MEMORY,),
            takes_argument=True,
        ),
        ActionSpec(Fn.UPDATE_MEMORY, "Remember the answer and the knowledge.", (Fn.PREDICT_ANSWER,)),
        ActionSpec(
            Fn.PREDICT_ANSWER,
            "Give the short answer, which is compared word by word: `yes`, `no` or a few words without a sentence "
            "around them; after a search the asin it found, or `none`; after advice the expert's answer.",
            (Fn.SUBMIT_ANSWER,),
            takes_argument=True,
        ),
        ActionSpec(Fn.SUBMIT_ANSWER, "Hand the answer to the user.", (Fn.CLEAR_CONTEXT,)),
        ActionSpec(Fn.CLEAR_CONTEXT, "Start an empty context.", (Fn.GET_QUESTION,)),
    ),
)


@dataclass(frozen=True, slots=True)
class ProductQAAgent:
    """Shows metadata, memory with similarities, and counts of similar questions.

    Similarities are shown to the nearest 0.05, so that a small vocabulary covers them.

    Attributes:
        product_k: Entries of this product's history to show.
        group_k: Entries of the whole group's history to show, with a mark whether they are of this product.
        knowledge_k: Entries of the group's knowledge to show.
        show_schema: Whether the table's columns stand in the prompt.
        show_price: Whether the price of advice does, so that one policy can serve every price.
        show_turns: Earlier turns of the conversation to show; with them memory is searched by the questions of all.
        similar: Cosine from which a question counts as similar (paper: 0.46).
    """

    product_k: int = 1
    group_k: int = 0
    knowledge_k: int = 1
    show_schema: bool = True
    show_price: bool = False
    show_turns: int = 0
    similar: float = 0.46
    spec: AgentSpec = SPEC

    def question(self, item: Item, progress: float, price: float) -> str:
        lines = [f"round {int(progress * 10)}"]
        if self.show_price:
            lines.append(f"advice costs {price:.2f}")
        if self.show_schema:
            lines.append(f"table {item.group} columns: " + " , ".join(item.context["columns"]))
        lines += [f"{name}: {value}" for name, value in item.context["metadata"].items() if value is not None]
        lines += shown_turns(item, self.show_turns)
        lines.append(f"question: {item.question}")
        return "\n".join(lines) + "\n"

    def _asked(self, item: Item) -> str:
        """What earlier questions are looked up by."""
        return in_full(item.question, item.context) if self.show_turns else item.question

    def query(self, item: Item) -> str:
        """What knowledge is looked up by: the question and what is known of the product."""
        values = [str(v) for k, v in item.context["metadata"].items() if v is not None and k != "title"]
        return " ".join([self._asked(item), *values])

    def embedded_texts(self, item: Item) -> list[str]:
        """All texts that a session about `item` may embed, as far as they are known before it is played."""
        return [
            self._asked(item),
            self.query(item),
            *([item.context["knowledge"]] if item.context["knowledge"] else []),
        ]

    def corpus(self, items: Sequence[Item]) -> list[str]:
        """Texts that hold every word that sessions about `items` can show or should say, to train a tokenizer on."""
        texts = [f"round {i} similar {i}" for i in range(10)]
        texts += [f"history {i / 20:.2f} knowledge {-i / 20:.2f}" for i in range(21)]
        texts += ["same other -> expert: answer: columns: none , |"]
        texts += words_of_all(self.spec, show_price=self.show_price)
        for item in items:
            texts.append(self.question(item, 0.0, 1.0))
            texts += [str(item.context[key]) for key in ("sql", "knowledge", "long_answer")]
            texts += item.answer if isinstance(item.answer, list) else [str(item.answer)]
        return texts

    def recall(self, item: Item, memory: Memory) -> tuple[list[Retrieved], str]:
        of_product = Scope(MemoryKind.HISTORY, item.group, item.product)
        of_group = Scope(MemoryKind.HISTORY, item.group)
        knowledge = Scope(MemoryKind.KNOWLEDGE, item.group)
        asked = self._asked(item)
        entries = memory.retrieve(asked, self.product_k, of_product)
        if self.group_k:
            shown = {e.item.id for e in entries}
            others = memory.retrieve(asked, self.group_k + self.product_k, of_group)
            entries += [e for e in others if e.item.id not in shown][: self.group_k]
        entries += memory.retrieve(self.query(item), self.knowledge_k, knowledge)
        lines = [self._entry(e, item) for e in entries]
        lines.append(f"similar {min(9, memory.count_similar(asked, self.similar, of_group))}")
        return entries, "\n".join(lines) + "\n"

    @staticmethod
    def _entry(entry: Retrieved, item: Item) -> str:
        similarity = f"{round(entry.similarity * 20) / 20:.2f}"
        if entry.item.kind is MemoryKind.KNOWLEDGE:
            return f"knowledge {similarity} {entry.item.text}"
        whose = "same" if entry.item.product == item.product else "other"
        return f"history {similarity} {whose} {entry.item.text}"

    def advice(self, advice: Advice) -> str:
        if not advice.answered:
            return f"no advice ( {advice.status} )\n"
        return f"expert: {advice.explanation or advice.answer}\nanswer: {advice.answer}\n"

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        if advice is None or not advice.answered:
            return []
        return self.lesson(item, session_id, advice.answer, reflection, origin="advice")

    def teacher(self, codec: ActionCodec, judge_yes: float) -> ProductQATeacher:
        return ProductQATeacher(codec, self, judge_yes)

    def lessons(self, item: Item) -> list[MemoryItem]:
        if isinstance(item.answer, list):
            return []  # search questions are for the tool
        return self.lesson(item, "", item.answer, str(item.context["knowledge"]), origin="initial")

    def initial_memory(self, item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
        return random_memory(item, others, rng)

    @staticmethod
    def lesson(item: Item, session_id: str, answer: str, knowledge: str, origin: str) -> list[MemoryItem]:
        """The history entry of an answered question, and the knowledge entry unless there is none."""
        asked = in_full(item.question, item.context)
        history = MemoryItem(
            MemoryKind.HISTORY,
            key=asked,
            text=f"{asked} -> {answer}",
            answer=answer,
            group=item.group,
            product=item.product,
            session_id=session_id,
            origin=origin,
        )
        if not knowledge or knowledge == NO_KNOWLEDGE:
            return [history]
        return [
            history,
            MemoryItem(
                MemoryKind.KNOWLEDGE,
                key=knowledge,
                text=knowledge,
                group=item.group,
                session_id=session_id,
                origin="reflection" if origin == "advice" else origin,
            ),
        ]


class ProductQATeacher:
    """Labels sessions by the paper's rule: gold SQL on search; the gold answer if what is in sight settles the
    question or a judge calls it answerable; otherwise advice, and the gold knowledge as reflection.

    Args:
        codec: Of the executor that writes the sessions.
        agent: Tells what is in sight.
        judge_yes: How often the judge, who stands for the paper's LLM, calls a question answerable that nothing in
            sight settles. Where the item tells how predictable its answer is (`prior`), in proportion to that: such a
            judge knows what is common sense. Without it imitation would leave RL nothing to explore. Where the agent
            sees the price, the judge does too: as often as this where a guess is worth more than advice, and as often
            as not this where it is worth less, so that the price means something before RL begins.
    """

    def __init__(self, codec: ActionCodec, agent: ProductQAAgent, judge_yes: float):
        self.codec = codec
        self.agent = agent
        self.judge_yes = judge_yes

    def policy(self, item: Item, memory: Memory, price: float, rng: np.random.Generator) -> ScriptedPolicy:
        """A policy for one session about `item` with this memory, at this price of advice."""
        entries, _ = self.agent.recall(item, memory)
        prior = item.context.get("prior")
        if self.agent.show_price and prior is not None:
            passes = self.judge_yes if prior > 1 - price else 1 - self.judge_yes
        else:
            passes = self.judge_yes * (1.0 if prior is None else 2 * prior - 1)  # of a yes or no
        answerable = in_sight(item, entries) or bool(rng.random() < passes)

        def decide(context: str) -> Action:
            if context.rstrip().endswith(f"[{Fn.REFLECTION}]"):
                return Action(Fn.REFLECTION, str(item.context.get("knowledge") or NO_KNOWLEDGE))
            if item.context["sql"]:
                if f"[{SEARCH}]" not in context:
                    return Action(SEARCH, item.context["sql"])
                return Action(Fn.PREDICT_ANSWER, context.rsplit(self.codec.end, 1)[-1].strip())
            if answerable or f"[{Fn.SEEK_ADVICE}]" in context:
                return Action(Fn.PREDICT_ANSWER, gold(item))
            return Action(Fn.SEEK_ADVICE)

        return ScriptedPolicy(self.codec, decide)


def gold(item: Item) -> str:
    """A right answer; of a search the first product that fits."""
    return str((item.answer or ["none"])[0] if isinstance(item.answer, list) else item.answer)


def in_sight(item: Item, entries: Sequence[Retrieved]) -> bool:
    """Whether metadata or one of the retrieved entries settles the question."""
    return _shown(item) or any(settles(item, entry) for entry in entries)


def _shown(item: Item) -> bool:
    """Whether the metadata settle the question; only MiniShop says so, by an empty `settled_by`."""
    return item.context.get("settled_by") == ""


def random_memory(item: Item, others: Sequence[Item], rng: np.random.Generator) -> list[MemoryItem]:
    """What the agent may have learned before: the paper's randomised initial memory, and corrections.

    The paper draws the question's own pair and its knowledge separately; here they go together, as in play, where the
    session that taught the one has taught the other.

    Each of the other questions of the stream was asked with a probability that is itself drawn, and those that settle
    `item` (the same question of the same product, or the same knowledge) are kept or omitted together by a coin. No
    expert is asked about what a search or the metadata settle; but people may have corrected what the agent said, here
    or at a desk, so that answers to a few of these questions are in sight too, and must not lead astray.
    """
    knowledge = item.context.get("knowledge")
    keep_matching, share, corrected = rng.random() < 0.5, rng.random(), rng.random() * MAX_CORRECTED
    items: list[MemoryItem] = []
    known: set[str] = set()
    for other in others:
        if other is item:
            continue
        if isinstance(other.answer, list) or _shown(other):
            if rng.random() < corrected:
                items += ProductQAAgent.lesson(other, "", gold(other), "", "initial")
            continue
        same = other.product == item.product and other.question == item.question
        matching = same or (bool(knowledge) and other.context.get("knowledge") == knowledge)
        if not (keep_matching if matching else rng.random() < share):
            continue
        lesson = str(other.context.get("knowledge") or "")
        items += ProductQAAgent.lesson(other, "", str(other.answer), "" if lesson in known else lesson, "initial")
        known.add(lesson)
    return items
