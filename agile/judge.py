"""A language model that says whether an answer means the same as the gold one. What it says is taken as yes, no, or
neither: a verdict that cannot be read is counted and shown, never scored.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agile.config import PromptedConfig
from agile.prompted import open_endpoint, spent
from agile.rollout import run_loop
from agile.types import Item, Session

if TYPE_CHECKING:  # the client takes a second to import, and most runs need none
    from agile.policies.endpoint import Endpoint

PROMPT = (
    "Question: {question}\nTrue answer: {gold}\nGiven answer: {answer}\n\n"
    "Does the given answer say the same as the true one, as an answer to the question? It may be worded otherwise or "
    "be more or less detailed, but it must not contradict it. Reply with one word, yes or no."
)
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said of one answer; `right` is None where it said neither yes nor no, or nothing at all."""

    right: bool | None
    said: str


async def judge(
    endpoint: Endpoint, cases: Sequence[tuple[str, str, str]], temperature: float | None = 0.0
) -> list[Verdict]:
    """Verdicts on `(question, gold, answer)`, in their order; equal cases are asked about once.

    Args:
        temperature: Of sampling; None sends none.

    Raises:
        AgileError: No request would fare better: key, model, address, quota or disk.
    """
    from agile.policies.endpoint import Rejected

    async def ask(case: tuple[str, str, str]) -> Verdict:
        question, gold, answer = case
        content = PROMPT.format(question=question, gold=gold, answer=answer)
        options = {} if temperature is None else {"temperature": temperature}
        try:
            async with endpoint.first_alone():
                reply = await endpoint.ask({"messages": [{"role": "user", "content": content}], **options})
        except (Rejected, RuntimeError, TimeoutError) as error:
            return Verdict(None, f"{type(error).__name__}: {error}")
        said = str(reply.message.get("content") or reply.message.get("refusal") or "").strip()
        found = _VERDICT.match(said)
        return Verdict(None if found is None else found[1].lower() == "yes", said)

    return list(await asyncio.gather(*map(ask, cases)))


NUM_SHOWN = 3  # of what the judge said instead of a verdict


def judged(config: PromptedConfig, folder: Path, played: Sequence[tuple[Item, Session]]) -> dict[str, Any]:
    """What a judge makes of sessions: which share is right, and how often it said nothing that can be read.

    It is asked about answers that the task calls wrong; what is right word by word, what an expert answered and what
    failed needs no judge. Sessions without a verdict are left out of the share.

    Raises:
        AgileError: See `judge`.
    """
    right = [bool(s.correct) for _, s in played]
    open_cases = {
        i: (item.question, str(item.answer), s.answer)
        for i, (item, s) in enumerate(played)
        if not right[i] and not s.failed and not s.advised and s.answer is not None
    }
    endpoint = open_endpoint(config, folder, "task.judge")

    async def run() -> list[Verdict]:
        try:
            return await judge(endpoint, list(open_cases.values()), config.temperature)
        finally:
            await endpoint.close()

    verdicts = dict(zip(open_cases, run_loop(run()), strict=True))
    unread = [v.said for v in verdicts.values() if v.right is None]
    num_right = sum(right) + sum(v.right is True for v in verdicts.values())
    return {
        "judge": config.model,
        "judged right": num_right / max(1, len(played) - len(unread)),
        "answers judged": len(verdicts),
        "verdicts that could not be read": len(unread),
        **({"said instead": " | ".join(text[:100] for text in unread[:NUM_SHOWN])} if unread else {}),
        "judge asked": spent(endpoint),
    }
