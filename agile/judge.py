"""A language model that says whether an answer means the same as the gold one, or whether a question can be answered
without an expert. What it says is taken as yes, no, or neither: what cannot be read is counted and shown, never scored.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agile.config import PromptedConfig
from agile.prompted import open_endpoint, spent
from agile.protocols import AnswerKey
from agile.rollout import run_loop
from agile.types import AdviceRequest, Item, Session

if TYPE_CHECKING:  # the client takes a second to import, and most runs need none
    from agile.advice.model import ModelAdvisor
    from agile.policies.endpoint import Endpoint

PROMPT = (
    "Question: {question}\nTrue answer: {gold}\nGiven answer: {answer}\n\n"
    "Does the given answer say the same as the true one, as an answer to the question? It may be worded otherwise or "
    "be more or less detailed, but it must not contradict it. Reply with one word, yes or no."
)
ANSWERABLE = (
    "An assistant with general knowledge is asked this question and sees no more than what stands here:\n\n{shown}\n\n"
    "Can it be expected to answer correctly without asking an expert? Reply with one word, yes or no."
)
_VERDICT = re.compile(r"\W*(yes|no)\b(?![ \t]*[\w/])", re.IGNORECASE)  # neither `No idea` nor `yes or no`


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said; `right` is whether that was yes, None where it was neither yes nor no, or nothing at all."""

    right: bool | None
    said: str


async def ask_all(endpoint: Endpoint, prompts: Sequence[str], temperature: float | None = 0.0) -> list[Verdict]:
    """Verdicts on prompts, in their order; equal ones are sent once.

    Args:
        temperature: Of sampling; None sends none.

    Raises:
        AgileError: No request would fare better: key, model, address, quota or disk.
    """
    from agile.policies.endpoint import Rejected

    async def ask(prompt: str) -> Verdict:
        options = {} if temperature is None else {"temperature": temperature}
        try:
            async with endpoint.first_alone():
                reply = await endpoint.ask({"messages": [{"role": "user", "content": prompt}], **options})
        except (Rejected, RuntimeError, TimeoutError) as error:
            return Verdict(None, f"{type(error).__name__}: {error}")
        said = str(reply.message.get("content") or reply.message.get("refusal") or "").strip()
        found = _VERDICT.match(said)
        return Verdict(None if found is None else found[1].lower() == "yes", said)

    return list(await asyncio.gather(*map(ask, prompts)))


def _asked(
    config: PromptedConfig, folder: Path, section: str, prompts: Sequence[str]
) -> tuple[list[Verdict], dict[str, Any]]:
    """Verdicts, and what is to be said of how they came."""
    endpoint = open_endpoint(config, folder, section)

    async def run() -> list[Verdict]:
        try:
            return await ask_all(endpoint, prompts, config.temperature)
        finally:
            await endpoint.close()

    verdicts = run_loop(run())
    unread = [v.said for v in verdicts if v.right is None]
    return verdicts, {
        "verdicts that could not be read": len(unread),
        **({"said instead": " | ".join(text[:100] for text in unread[:NUM_SHOWN])} if unread else {}),
        "judge asked": spent(endpoint),
        **({"judge cost": endpoint.spent.cost} if endpoint.spent.cost else {}),
    }


NUM_SHOWN = 3  # of what the judge said instead of a verdict


def judged(config: PromptedConfig, folder: Path, played: Sequence[tuple[Item, Session]]) -> dict[str, Any]:
    """What a judge makes of sessions: which share is right, and how often it said nothing that can be read.

    It is asked about answers that the task calls wrong; what is right word by word, what an expert answered and what
    failed needs no judge. Sessions without a verdict are left out of the share.

    Raises:
        AgileError: See `ask_all`.
    """
    right = [bool(s.correct) for _, s in played]
    cases = {
        i: PROMPT.format(question=item.question, gold=item.answer, answer=s.answer)
        for i, (item, s) in enumerate(played)
        if not right[i] and not s.failed and not s.advised and s.answer is not None
    }
    verdicts, told = _asked(config, folder, "task.judge", list(cases.values()))
    num_right = sum(right) + sum(v.right is True for v in verdicts)
    return {
        "judge": config.model,
        "judged right": num_right / max(1, len(played) - sum(v.right is None for v in verdicts)),
        "answers judged": len(verdicts),
        **told,
    }


def answerable(
    config: PromptedConfig, folder: Path, questions: Mapping[str, str]
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Which questions a judge of answerability would answer without an expert: the paper's, for imitation.

    Args:
        questions: What it is shown of each, by id.

    Returns:
        A verdict for each id, one that could not be read as no; and what a summary says of them.

    Raises:
        AgileError: See `ask_all`.
    """
    prompts = [ANSWERABLE.format(shown=text) for text in questions.values()]
    verdicts, told = _asked(config, folder, "sft.judge", prompts)
    found = {question: v.right is True for question, v in zip(questions, verdicts, strict=True)}
    return found, {"judge": config.model, "questions": len(found), "answerable": sum(found.values()), **told}


def answered_right(
    model: ModelAdvisor, questions: Mapping[str, Item], task: AnswerKey
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Which questions a stronger model answers right: the paper's rule for MedMCQA, for imitation.

    Args:
        questions: By id.

    Returns:
        A verdict for each id, of a question that it did not answer as no; and what a summary says of them.

    Raises:
        AgileError: See `ask_all`.
    """
    from agile.policies.endpoint import Rejected

    async def right(question_id: str, item: Item) -> bool | None:
        try:
            advice = await model.advise(AdviceRequest(question_id, item, "", 0.0))
        except (Rejected, RuntimeError, TimeoutError):
            return None
        return task.is_correct(item, advice.answer, False) if advice.answered else None

    async def run() -> list[bool | None]:
        try:
            return list(await asyncio.gather(*(right(*question) for question in questions.items())))
        finally:
            await model.close()

    found = dict(zip(questions, run_loop(run()), strict=True))
    return {question: verdict is True for question, verdict in found.items()}, {
        "stronger model": model.endpoint.model,
        "questions": len(found),
        "answered right": sum(verdict is True for verdict in found.values()),
        "not answered": sum(verdict is None for verdict in found.values()),
        "model asked": spent(model.endpoint),
    }
