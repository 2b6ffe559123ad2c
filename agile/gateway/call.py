"""One call under way: what it samples, and the expert's answers in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agile.chat_format import Answer, Message, parsed_arguments
from agile.errors import AgileError
from agile.gateway.recording import Window
from agile.types import Advice, Completion, Item, Source, Usage

if TYPE_CHECKING:
    from agile.gateway.gateway import Gateway, OpenTrajectory

SEEK_ADVICE = "seek_advice"
ADVICE_TOOL = {
    "type": "function",
    "function": {
        "name": SEEK_ADVICE,
        "description": "Ask a human expert. Each answer has a price.",
        "parameters": {
            "type": "object",
            "properties": {"question": {"type": "string", "description": "What to ask."}},
            "required": ["question"],
        },
    },
}


@dataclass(slots=True)
class Call:
    """One call under way: what it has sampled so far, the expert's answers in between included."""

    gateway: Gateway
    trajectory: OpenTrajectory | None
    window: Window
    opened: bool
    usage: Usage = field(default_factory=Usage)
    num_advice: int = 0
    prompt: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return self.window.token_ids

    async def sample(self, max_tokens: int | None) -> Completion:
        t = self.trajectory
        num = 0 if t is None else t.recording.next_sample()
        self.prompt = tuple(self.window.token_ids)
        completion = await self.gateway.sample(self.prompt, max_tokens, self.gateway.seed_of_next(t, num))
        self.window.sampled(completion)
        self.usage += completion.usage
        return completion

    async def advise(self, asked: tuple[str, str], messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Ask the expert, and show the LLM the answer."""
        desk, t = self.gateway.desk, self.trajectory
        assert desk is not None
        self.num_advice += 1
        question = question_of(asked[1])
        name = "unrecorded" if t is None else t.id
        last = next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")
        item = Item(name, last, None, "gateway", group="" if t is None else t.group)
        advice = await desk.seek(f"{name}/0", item, question)
        if t is not None:
            t.advice.append(advice)
        told = list(messages)
        told.append({"role": "assistant", "content": "", "tool_calls": [_tool_call(*asked)]})
        told.append({"role": "tool", "name": SEEK_ADVICE, "content": advice_text(advice)})
        more = self.gateway.format.continuation(told, len(told) - 1, tools, ended=True)
        if more is None:
            raise AgileError(
                "The chat template changes earlier turns when a tool has answered; advice cannot be shown."
            )
        self.window.observe(Source.ADVISOR, more)


def as_message(answer: Answer) -> Message:
    """An answer as chat templates take it."""
    message: Message = {"role": "assistant", "content": answer.content}
    if answer.tool_calls:
        message["tool_calls"] = [_tool_call(*call) for call in answer.tool_calls]
    return message


def _tool_call(name: str, arguments: str) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": parsed_arguments(arguments)}}


def question_of(arguments: str) -> str:
    found = parsed_arguments(arguments)
    return str(found.get("question", "")) if isinstance(found, dict) else str(found)


def advice_text(advice: Advice) -> str:
    """What the LLM is shown."""
    if not advice.answered:
        return f"No advice: {advice.explanation or 'the expert does not know'}."
    return f"{advice.answer}. {advice.explanation}" if advice.explanation else advice.answer
