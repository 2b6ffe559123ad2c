"""The agent of a user's own questions: that of ProductQA, with words that suit any subject."""

from __future__ import annotations

from dataclasses import replace

from agile.agents.product_qa import NO_KNOWLEDGE, SEARCH, SPEC, ProductQAAgent
from agile.tasks.choices import read_choice
from agile.types import ActionSpec, Advice, AgentSpec, Fn, Item, MemoryItem

_TEXTS = {
    Fn.GET_QUESTION: "Read the question, and what is known about its subject.",
    Fn.RETRIEVE_MEMORY: "Look up similar questions and knowledge. `history 0.85 same Q -> A` is an earlier question "
    "with its true answer, about the same subject or another; `knowledge 0.70 TEXT` holds for all; the numbers are "
    "similarities, at most 1. `similar 3` counts earlier questions that are alike.",
    SEARCH: "Look into the table `products` by one SQLite SELECT, such as SELECT name FROM products WHERE price < 20; "
    "its columns stand above the question.",
    Fn.REFLECTION: "Say in one sentence what the advice teaches, in words that help with later questions; "
    f"`{NO_KNOWLEDGE}` if it teaches nothing.",
    Fn.PREDICT_ANSWER: "Give the short answer, which is compared word by word, without a sentence around it: one of "
    "the options where some are listed; what a search found, or `none`; after advice the expert's answer.",
}


def own_spec(*, table: bool) -> AgentSpec:
    """Actions for questions with a table to search, or without one."""

    def changed(action: ActionSpec) -> ActionSpec:
        followers = tuple(name for name in action.followed_by if table or name != SEARCH)
        return replace(action, description=_TEXTS.get(action.name, action.description), followed_by=followers)

    return AgentSpec("own_qa", tuple(changed(action) for action in SPEC.actions if table or action.name != SEARCH))


class OwnQAAgent(ProductQAAgent):
    """As that of ProductQA; what an expert says about a question with options is remembered in the option's words."""

    __slots__ = ()

    def remember(self, item: Item, session_id: str, advice: Advice | None, reflection: str) -> list[MemoryItem]:
        """Nothing of advice that cannot be read as an option: what it says may mean anything."""
        options = item.context.get("options")
        if options and advice is not None and advice.answered:
            choice = read_choice(advice.answer, options)
            if choice is None:
                return []
            advice = replace(advice, answer=options[choice])
        return super().remember(item, session_id, advice, reflection)
