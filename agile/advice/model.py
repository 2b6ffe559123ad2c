"""An expert that is a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable

from agile.policies.endpoint import Endpoint
from agile.types import Advice, AdviceRequest, AdviceStatus, Item

SYSTEM = (
    "You are an expert who is asked for advice. Explain in one or two sentences what settles the question, then "
    "end with a line `Answer: ...` that holds the short answer alone; where options are listed, the letter of one."
)
_ANSWER = re.compile(r"^\W*answer\W*[:=]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)


class ModelAdvisor:
    """Asks the model each question once and reads the last line `Answer: ...`; text before it is the explanation.

    A text without such a line is passed on whole: the task says whether it can be read.

    Args:
        endpoint: Where the model is.
        question: The text that it is asked.
        temperature: Of sampling; None leaves it to the endpoint.
        max_tokens: Most tokens of an answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        question: Callable[[Item], str],
        *,
        temperature: float | None = 0.0,
        max_tokens: int = 512,
    ):
        self.endpoint = endpoint
        self.question = question
        self.options = {"max_tokens": max_tokens} | ({} if temperature is None else {"temperature": temperature})

    async def advise(self, request: AdviceRequest) -> Advice:
        """Raises what `Endpoint.ask` raises."""
        text = self.question(request.item)
        if request.message.strip():
            text += f"\nWho asks adds: {request.message.strip()}\n"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        async with self.endpoint.first_alone():
            answer = await self.endpoint.ask({"messages": messages, **self.options})
        said = str(answer.message.get("content") or "").strip()
        if not said:
            return Advice("", expert=self.endpoint.model, status=AdviceStatus.REFUSED)
        found = list(_ANSWER.finditer(said))
        if not found:
            return Advice(said, expert=self.endpoint.model, price=request.price)
        why = " ".join(said[: found[-1].start()].split())
        return Advice(found[-1][1].strip("*` "), why, expert=self.endpoint.model, price=request.price)

    async def close(self) -> None:
        """Wait for the answers that are under way, and keep them."""
        await self.endpoint.close()
