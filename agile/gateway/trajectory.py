"""`OpenTrajectory`: one run of an agent that talks to a gateway."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agile.chat_format import Answer, Message, as_message, for_template
from agile.errors import AgileError
from agile.gateway.recording import Recording
from agile.types import Advice, Completion, Usage

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from agile.gateway.gateway import Gateway


@dataclass(frozen=True, slots=True)
class State:
    """A conversation after one of its calls: as the client has it, and as the LLM saw it."""

    messages: tuple[Message, ...]
    tools: Any
    token_ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client's call gets.

    Attributes:
        message_ids: All that was sampled last, for log-probabilities.
        finish_reason: `stop`, `length` or `tool_calls`.
        opened: Whether the call opened a segment of its own, which the first one of a trajectory does.
    """

    answer: Answer
    completion: Completion
    finish_reason: str
    usage: Usage
    opened: bool


@dataclass(slots=True, eq=False)
class OpenTrajectory:
    """What one run of an agent says through the gateway, from its first call to its reward.

    Attributes:
        id: Its name in logs.
        group: Trajectories of one group are compared by the estimator `group`.
        reward: Of the whole trajectory; to be set before it ends.
        api_key: Calls with this key belong to it.
        client: An `openai.AsyncOpenAI` that makes such calls.
        num_calls: How many were answered.
    """

    id: str
    group: str
    api_key: str
    client: AsyncOpenAI
    gateway: Gateway = field(repr=False)
    reward: float | None = None
    num_calls: int = 0
    remote: bool = False
    touched: float = field(default_factory=time.monotonic)
    running: int = 0
    recording: Recording = field(default_factory=Recording)
    states: list[State] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    @property
    def session_id(self) -> str:
        return f"{self.id}/0"

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        max_tokens: int | None = None,
    ) -> Message:
        """A call as one through `client`, in this process: without the cost of HTTP.

        Args:
            messages, tools: As OpenAI's API has them.

        Returns:
            The assistant's message, ready to be appended; the arguments of its tool calls are objects.

        Raises:
            AgileError: The trajectory has ended, the template does not take the messages, or they are too long.
        """
        if self.gateway.by_key(self.api_key) is not self:
            raise AgileError(f"The trajectory {self.id} has ended; open another.")
        reply = await self.gateway.chat(self, [for_template(m) for m in messages], tools, max_tokens)
        return as_message(reply.answer)
