"""`Gateway`: an OpenAI-compatible endpoint over a model in training, which records whatever agents say through it."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from agile.advice import AdviceDesk
from agile.chat_format import Answer, ChatFormat, Message, as_message, parsed_arguments, same, tool_call
from agile.copies import original_id
from agile.errors import AgileError
from agile.extras import needs
from agile.gateway.recording import Recording, Window
from agile.gateway.trajectory import OpenTrajectory, Reply, State
from agile.learner import Learner
from agile.protocols import Advisor
from agile.seeding import derive_seed
from agile.types import Advice, Completion, Item, Reward, Session, SessionStatus, Source, Trajectory, Usage

logger = logging.getLogger(__name__)

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
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the gateway has none: a client need not load all authorities' keys
MAX_ADVICE = 4  # of one call: a policy that asks without end must end


class Gateway:
    """Serves the model of a `Learner` to agents, records their calls token by token, and trains on them.

    A call whose prompt extends an earlier call's exact tokens joins its segment; `agile.gateway.recording` says what
    becomes of the others. A turn that was sampled is never tokenised again: where a conversation goes on from an answer
    of the gateway's, the prompt is that answer's own tokens and what the chat template puts behind them.

    Args:
        learner: Samples, and learns in `train_step`.
        advisor: Who answers the tool `seek_advice`, which every conversation then has: the gateway calls it itself, so
            that clients need not know of it. Without one there is no such tool.
        advice_price: Taken from the reward for each answer.
        advice_budget, advice_timeout_s: As of `agile.advice.AdviceDesk`.
        failure_reward: Reward of trajectories that failed; None leaves them out of the loss.
        max_tokens: Most tokens of an answer, where the client does not say.
        idle_s: Seconds without a call after which a trajectory that was opened over HTTP has failed.
        host, port: Where to listen; port 0 takes a free one.
        api_key: Opens trajectories over HTTP; calls with it are answered and not recorded. A random one by default.
        name: Of the model, for clients.
        template_options: Further variables of the chat template, such as `enable_thinking`.

    Attributes:
        counts: `calls`, `joined` to an earlier call's segment, `opened` a segment behind the first of a trajectory,
            `rerendered` (the template changed earlier turns, so that no token could be joined), `unanswered` (the
            client hung up, or there was no answer), `corrected` requests.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        advisor: Advisor | None = None,
        advice_price: float = 0.3,
        advice_budget: int | None = None,
        advice_timeout_s: float | None = None,
        failure_reward: float | None = None,
        max_tokens: int = 256,
        idle_s: float = 600,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        name: str = "agile",
        template_options: dict[str, Any] | None = None,
    ):
        self.learner = learner
        self.format = ChatFormat(learner.tokenizer, template_options)
        self.desk = None if advisor is None else AdviceDesk(advisor, advice_price, advice_budget, advice_timeout_s)
        self.failure_reward = failure_reward
        self.max_tokens = max_tokens
        self.idle_s = idle_s
        self.name = name
        self.api_key = api_key or f"agile-{secrets.token_urlsafe(24)}"
        self.counts: Counter[str] = Counter()
        self.max_context: int = learner.policy.max_context
        self._address = host, port
        self._base_url = ""
        self._open: dict[str, OpenTrajectory] = {}  # by api key
        self._ended: list[Session] = []
        self._names: Counter[str] = Counter()
        self._ids: set[str] = set()
        self._samples = asyncio.Event()  # cleared while the weights change
        self._samples.set()
        self._still = asyncio.Event()  # set while nothing is being sampled
        self._still.set()
        self._sampling = 0
        self._unrecorded = 0

    @property
    def base_url(self) -> str:
        """For any client: `OpenAI(base_url=..., api_key=...)`."""
        if not self._base_url:
            raise AgileError("The gateway is not running; use it within `async with Gateway(...) as gateway:`.")
        return self._base_url

    # ------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Gateway:
        with needs("serve"):
            from agile.gateway.api import listening
        sock = socket.create_server(self._address, backlog=1024)
        host, port = sock.getsockname()[:2]
        self._serving = listening(self, sock)
        await self._serving.__aenter__()
        self._sweeper = asyncio.create_task(self._sweep())
        self._base_url = f"http://{host}:{port}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._base_url = ""
        self._sweeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._sweeper
        for t in list(self._open.values()):
            self.fail(t, "the gateway was closed")
        await self._serving.__aexit__(None, None, None)

    @asynccontextmanager
    async def trajectory(self, *, group: str | None = None, id: str | None = None) -> AsyncIterator[OpenTrajectory]:
        """One run of an agent: its calls through `client`, and its `reward`, which the block has to set.

        An exception in the block makes it a failed trajectory, and goes on to the caller.

        Raises:
            AgileError: The name is taken, or the reward is missing or no finite number.
        """
        t = self.open(group=group, id=id)
        try:
            yield t
            self.end(t, t.reward)
        except BaseException as error:
            if t.api_key in self._open:
                self.fail(t, f"{type(error).__name__}: {error}")
            raise
        finally:
            await t.client.close()

    def open(self, *, group: str | None = None, id: str | None = None, remote: bool = False) -> OpenTrajectory:
        """Begin a trajectory; `end` or `fail` must follow.

        Raises:
            AgileError: The name is taken, or is one that copies have.
        """
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        if group is not None and id is not None:
            raise AgileError(f"trajectory(group={group!r}, id={id!r}): give one; those of a group are numbered.")
        for name in (group, id):
            if name is not None and (not name or original_id(name) != name or "/" in name):
                raise AgileError(
                    f"The name {name!r} is empty, holds a slash or ends in # and a number; choose another."
                )
        if group is not None:
            id = f"{group}#{self._names[group]}"
            self._names[group] += 1
        elif id is None:
            id = f"trajectory-{len(self._ids):06d}"
        if id in self._ids:
            raise AgileError(f"There is a trajectory {id!r} already; each needs an id of its own, or share a group.")
        self._ids.add(id)
        key = f"agile-{secrets.token_urlsafe(24)}"
        client = AsyncOpenAI(
            base_url=self.base_url,
            api_key=key,
            max_retries=0,
            timeout=None,
            http_client=DefaultAsyncHttpxClient(verify=NO_TLS),
        )
        t = OpenTrajectory(id, id if group is None else group, key, client, self, remote=remote)
        self._open[key] = t
        return t

    def end(self, t: OpenTrajectory, reward: object) -> None:
        """End a trajectory with its reward; one without any call is left out, and said so.

        Raises:
            AgileError: It has ended before, or the reward is no finite number.
        """
        if t.api_key not in self._open:
            raise AgileError(f"The trajectory {t.id} has ended before.")
        if isinstance(reward, bool) or not isinstance(reward, Real) or not math.isfinite(reward):
            what = "no reward" if reward is None else f"the reward {reward!r}"
            raise AgileError(
                f"The trajectory {t.id} has {what}, expected a finite number: set t.reward before it ends."
            )
        if not t.num_calls:
            self.fail(t, "it made no call; agents must use the trajectory's client, or its api_key")
            return
        self._close(t, SessionStatus.COMPLETED, "", float(reward))

    def fail(self, t: OpenTrajectory, error: str) -> None:
        """End a trajectory that came to nothing."""
        logger.warning("Trajectory %s failed: %s", t.id, error)
        counted = self.failure_reward is not None and t.num_calls > 0
        status = SessionStatus.TRUNCATED if counted else SessionStatus.FAILED
        self._close(t, status, error, self.failure_reward if counted else None)

    def discard(self, t: OpenTrajectory) -> None:
        """End a trajectory from which nothing is to be learned, a test's for instance."""
        self._open.pop(t.api_key, None)

    def _close(self, t: OpenTrajectory, status: SessionStatus, error: str, reward: float | None) -> None:
        del self._open[t.api_key]
        paid = sum(a.price for a in t.advice)
        components = {} if reward is None else {"reward": reward, **({"advice": -paid} if paid else {})}
        self._ended.append(
            Session(
                id=t.session_id,
                stream_id=t.id,
                index=0,
                item_id=t.group,
                kind="gateway",
                seed=self._seed(t.id, 0),
                segments=t.recording.segments(),
                steps=(),
                retrieved=(),
                written=(),
                advice=t.advice[-1] if t.advice else None,
                answer=None,
                status=status,
                error=error,
                reward=None if reward is None else Reward(components),
                usage=t.usage,
                price=0.0 if self.desk is None else self.desk.price,
            )
        )

    async def train_step(self) -> dict[str, float]:
        """Learn from all trajectories that ended since the last step; the next call has the new weights.

        Calls wait meanwhile. A trajectory that is still open goes on with the new weights; its tokens know by which
        they were sampled.

        Returns:
            As `Learner.step`.

        Raises:
            AgileError: There is nothing to learn from.
        """
        self._samples.clear()
        try:
            await self._still.wait()
            sessions, self._ended = self._ended, []
            if not sessions:
                raise AgileError("There is nothing to learn from: no trajectory has ended since the last step.")
            trajectories = [Trajectory(s.stream_id, (s,)) for s in sessions]
            return await asyncio.to_thread(self.learner.step, trajectories)
        finally:
            self._samples.set()

    @property
    def ended(self) -> Sequence[Session]:
        """The trajectories that ended since the last step, as sessions."""
        return tuple(self._ended)

    # ------------------------------------------------------------------------------------------------------------------

    def by_key(self, key: str) -> OpenTrajectory | None:
        """The trajectory that is open under a key."""
        return self._open.get(key)

    def by_id(self, id: str) -> OpenTrajectory | None:
        return next((t for t in self._open.values() if t.id == id), None)

    async def chat(
        self, t: OpenTrajectory | None, messages: Sequence[Message], tools: Sequence[Any] | None, max_tokens: int | None
    ) -> Reply:
        """Answer a conversation.

        Args:
            t: Whose call it is; None for one that is not recorded.
            messages: As `agile.chat_format.for_template` gives them.

        Raises:
            AgileError: The template does not take the messages, or they are longer than the model's context.
        """
        if self.desk is not None:
            tools = [*(tools or ()), ADVICE_TOOL]
        source = Source.TOOL if messages[-1]["role"] == "tool" else Source.TASK
        prompt = self._prompt(t, messages, tools)
        async with self._call(t, prompt, source) as call:
            while True:
                completion = await call.sample(max_tokens)
                answer = self.format.answer(call.prompt, completion.token_ids, tools=bool(tools))
                asked = next((c for c in answer.tool_calls if c[0] == SEEK_ADVICE), None) if self.desk else None
                if asked is None or len(answer.tool_calls) > 1 or len(call.advice) >= MAX_ADVICE:
                    break
                await call.advise(asked, messages, tools)
            ended = completion.finish_reason == "stop"
            if t is not None:
                said = (*messages, as_message(answer))
                t.states.append(State(said, tools, tuple(call.token_ids), ended))
        reason = "length" if not ended else "tool_calls" if answer.tool_calls else "stop"
        return Reply(answer, completion, reason, call.usage, call.opened)

    async def complete(self, t: OpenTrajectory | None, prompt: Sequence[int], max_tokens: int | None) -> Reply:
        """Continue a prompt of token ids.

        Raises:
            AgileError: It is longer than the model's context.
        """
        async with self._call(t, prompt, Source.TASK) as call:
            completion = await call.sample(max_tokens)
        ended = completion.finish_reason == "stop"
        text = self.learner.tokenizer.decode(list(completion.token_ids[: -1 if ended else None]))
        return Reply(Answer(str(text)), completion, completion.finish_reason, call.usage, call.opened)

    def _prompt(self, t: OpenTrajectory | None, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        """The ids of a conversation: the tokens of the longest earlier one that it goes on from, and what is new."""
        for state in sorted(t.states if t else (), key=lambda s: len(s.messages), reverse=True):
            num = len(state.messages)
            if num < len(messages) and state.tools == tools and same(state.messages, messages[:num]):
                more = self.format.continuation(messages, num, tools, ended=state.ended)
                if more is not None:
                    return [*state.token_ids, *more]
                self.counts["rerendered"] += 1
                break
        return list(self.format.prompt(messages, tools))

    @asynccontextmanager
    async def _call(self, t: OpenTrajectory | None, prompt: Sequence[int], source: Source) -> AsyncIterator[_Call]:
        recording = Recording() if t is None else t.recording
        before = recording.num_windows
        window = recording.begin(prompt, source)
        call = _Call(self, t, window, opened=recording.num_windows > before)
        self.counts["calls"] += 1
        self.counts["joined"] += not call.opened
        self.counts["opened"] += call.opened and before > 0
        if t is not None:
            t.running += 1
        try:
            yield call
            recording.end(window)
        except BaseException:
            recording.abandon(window)
            self.counts["unanswered"] += 1
            raise
        finally:
            if t is not None:
                t.running -= 1
                t.touched = time.monotonic()
        if t is not None:
            t.num_calls += 1
            t.usage += call.usage
            t.advice += call.advice

    async def sample(self, prompt: Sequence[int], max_tokens: int | None, seed: int) -> Completion:
        """Sample from the policy, not while its weights change."""
        room = self.max_context - len(prompt)
        if room < 1:
            raise AgileError(
                f"The prompt has {len(prompt)} tokens; the model reads {self.max_context}, and an answer must fit too."
            )
        while not self._samples.is_set():
            await self._samples.wait()
        self._sampling += 1
        self._still.clear()
        try:
            return await self.learner.policy.complete(
                prompt, max_tokens=min(room, max_tokens or self.max_tokens), stop={self.format.end_id}, seed=seed
            )
        finally:
            self._sampling -= 1
            if not self._sampling:
                self._still.set()

    def seed_of_next(self, t: OpenTrajectory | None, num: int) -> int:
        """A seed that depends on the trajectory and the number of the sample in it."""
        if t is None:
            self._unrecorded += 1
            return self._seed("", self._unrecorded)
        return self._seed(t.id, num)

    def _seed(self, id: str, num: int) -> int:
        return derive_seed(self.learner.config.seed, "gateway", self.learner.steps, id, num)

    async def _sweep(self) -> None:
        """Fail trajectories of other processes that went silent."""
        while True:
            await asyncio.sleep(max(0.05, self.idle_s / 10))
            for t in list(self._open.values()):
                if t.remote and not t.running and time.monotonic() - t.touched > self.idle_s:
                    self.fail(t, f"no call and no end for {self.idle_s:g} s (idle_s)")


@dataclass(slots=True)
class _Call:
    """One call under way: what it has sampled so far, the expert's answers in between included."""

    gateway: Gateway
    trajectory: OpenTrajectory | None
    window: Window
    opened: bool
    usage: Usage = field(default_factory=Usage)
    advice: list[Advice] = field(default_factory=list)
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
        question = question_of(asked[1])
        name = "unrecorded" if t is None else t.id
        last = next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")
        item = Item(name, last, None, "gateway", group="" if t is None else t.group)
        advice = await desk.seek(f"{name}/0", item, question)
        self.advice.append(advice)
        told = list(messages)
        told.append({"role": "assistant", "content": "", "tool_calls": [tool_call(*asked)]})
        told.append({"role": "tool", "name": SEEK_ADVICE, "content": advice_text(advice)})
        more = self.gateway.format.continuation(told, len(told) - 1, tools, ended=True)
        if more is None:
            raise AgileError(
                "The chat template changes earlier turns when a tool has answered; advice cannot be shown."
            )
        self.window.observe(Source.ADVISOR, more)


def question_of(arguments: str) -> str:
    found = parsed_arguments(arguments)
    return str(found.get("question", "")) if isinstance(found, dict) else str(found)


def advice_text(advice: Advice) -> str:
    """What the LLM is shown."""
    if not advice.answered:
        return f"No advice: {advice.explanation or 'the expert does not know'}."
    return f"{advice.answer}. {advice.explanation}" if advice.explanation else advice.answer
