"""A language model that says whether an answer means the same as the gold one. What it says is taken as yes, no, or
neither: an answer that cannot be read is counted and shown, never scored.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
