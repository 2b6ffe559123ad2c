"""Every noun of AGILE in one place: frozen, slotted dataclasses.

This module imports nothing of the project and no torch, so anything may import it. Start reading here; what is plugged
in (policies, memories, tools, experts, tasks) is described by `agile.protocols`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# --------------------------------------------------------------------------------------------------------------------
# Actions


class Fn:
    """Names of the executor's functions (paper, Table 1). Any other action name is served by a `Tool` of that name."""

    GET_QUESTION = "GetQuestion"
    RETRIEVE_MEMORY = "RetrieveMemory"
    SEEK_ADVICE = "SeekAdvice"
    REFLECTION = "Reflection"
    UPDATE_MEMORY = "UpdateMemory"
    PREDICT_ANSWER = "PredictAnswer"
    SUBMIT_ANSWER = "SubmitAnswer"
    CLEAR_CONTEXT = "ClearContext"
    ALL = frozenset(
        {
            GET_QUESTION,
            RETRIEVE_MEMORY,
            SEEK_ADVICE,
            REFLECTION,
            UPDATE_MEMORY,
            PREDICT_ANSWER,
            SUBMIT_ANSWER,
            CLEAR_CONTEXT,
        }
    )


@dataclass(frozen=True, slots=True)
class Action:
    """One decision: the name without brackets, and the text that follows it (empty if it takes none)."""

    name: str
    argument: str = ""

    def __str__(self) -> str:
        return f"[{self.name}] {self.argument}".rstrip()


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """What one action does and which actions may follow it.

    Attributes:
        name: The name without brackets, `SeekAdvice`.
        description: One sentence for people and for prompted models.
        followed_by: Names of the actions legal after this one; one name means that the executor writes it itself.
        takes_argument: Whether the LLM writes text after the name.
    """

    name: str
    description: str
    followed_by: tuple[str, ...]
    takes_argument: bool = False

    @property
    def token(self) -> str:
        return f"[{self.name}]"


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """The table of an agent's actions; the first one opens every session.

    Raises:
        ValueError: An action follows that does not exist, a name stands twice, or `SubmitAnswer` is out of reach
            from an action that a session can come to.
    """

    name: str
    actions: tuple[ActionSpec, ...]

    def __post_init__(self) -> None:
        names = [a.name for a in self.actions]
        if len(set(names)) < len(names):
            raise ValueError(f"Agent {self.name}: an action is listed twice in {names}; name each once.")
        for spec in self.actions:
            for follower in spec.followed_by:
                if follower not in names:
                    raise ValueError(
                        f"Agent {self.name}: [{spec.name}] may be followed by [{follower}], which is not among its "
                        f"actions {names}; add an ActionSpec for it or remove it."
                    )
        ends: set[str] = {Fn.SUBMIT_ANSWER}
        while grown := {s.name for s in self.actions if s.name not in ends and ends & set(s.followed_by)}:
            ends |= grown
        if stuck := set(names) - ends:
            raise ValueError(f"Agent {self.name}: no way from {sorted(stuck)} to [SubmitAnswer]; extend followed_by.")

    def __getitem__(self, name: str) -> ActionSpec:
        return next(a for a in self.actions if a.name == name)

    @property
    def first(self) -> ActionSpec:
        return self.actions[0]

    def legal_after(self, name: str, *, advised: bool = False) -> tuple[str, ...]:
        """What may follow an action; an expert is asked at most once a session, unless nothing else may follow."""
        followers = self[name].followed_by
        return tuple(n for n in followers if n != Fn.SEEK_ADVICE or not advised) or followers


# --------------------------------------------------------------------------------------------------------------------
# Tokens: what the LLM sampled and what it was shown


@dataclass(frozen=True, slots=True)
class Usage:
    """What completions took: tokens read, how many of those a cache held, tokens written, and money."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy sampled for one prompt.

    Attributes:
        token_ids: Sampled ids, the stop token included if one was sampled.
        logprobs: Log-probability (nats) of each sampled id under the sampling distribution, same length.
        finish_reason: `stop` (a stop token was sampled) or `length`.
        policy_version: Number of weight updates the policy had seen.
        usage: What it took.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int = 0
    usage: Usage = Usage()

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"Completion: {len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs; a policy must return "
                "one logprob per sampled token."
            )


class Source(StrEnum):
    """Who wrote a span of tokens. Only `LLM` tokens are actions and carry loss."""

    LLM = "llm"
    EXECUTOR = "executor"
    TEMPLATE = "template"  # what a chat template puts around turns
    CARRIED = "carried"  # what an earlier window held and this one starts with
    TASK = "task"
    MEMORY = "memory"
    TOOL = "tool"
    ADVISOR = "advisor"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one writer; `logprobs` (same length) for `Source.LLM`, empty for all others."""

    source: Source
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    policy_version: int | None = None

    def __post_init__(self) -> None:
        expected = len(self.token_ids) if self.source is Source.LLM else 0
        if len(self.logprobs) != expected:
            raise ValueError(
                f"Span by {self.source}: {len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs, expected "
                f"{expected}; sampled tokens have one logprob each, observed tokens none."
            )
        if odd := [p for p in self.logprobs if not math.isfinite(p)]:
            raise ValueError(
                f"Span: a logprob is {odd[0]}, expected finite ones; the policy's weights may have diverged."
            )


class SegmentEnd(StrEnum):
    """How a context window ended. Truncation is not termination: the critic bootstraps after it."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"
    CONTEXT_CLEARED = "context_cleared"


@dataclass(frozen=True, slots=True)
class Segment:
    """One context window between two clearings. Ids, mask and logprobs derive from `spans`, so they cannot disagree."""

    spans: tuple[Span, ...]
    end: SegmentEnd

    @property
    def token_ids(self) -> list[int]:
        return [i for s in self.spans for i in s.token_ids]

    @property
    def action_mask(self) -> list[bool]:
        """True where the token was sampled by the LLM."""
        return [s.source is Source.LLM for s in self.spans for _ in s.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """Rollout log-probability of each token, 0 for observed ones."""
        return [p for s in self.spans for p in (s.logprobs or (0.0,) * len(s.token_ids))]


# --------------------------------------------------------------------------------------------------------------------
# Questions, memory, advice, tools


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a task.

    Attributes:
        id: Unique within its stream.
        question: What the user asks.
        answer: The gold answer, in whatever form the task scores.
        kind: Question type, the rows of `by_type` in reports.
        group: Scope of shared knowledge (ProductQA: the product group).
        product: Scope of history within the group; empty if there is none.
        context: What else the task knows of it (metadata, gold SQL, gold knowledge, long answer, ...).
    """

    id: str
    question: str
    answer: Any
    kind: str
    group: str = ""
    product: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """Questions in order whose sessions share one memory.

    Attributes:
        price: What advice costs in them; None for the desk's own price.
        endless: Whether more are to come, as to a server: it then always stands at its beginning.
    """

    id: str
    items: tuple[Item, ...]
    price: float | None = None
    endless: bool = False

    def progress(self, index: int) -> float:
        """Share of the stream that lies before a question, which the agent is told."""
        return 0.0 if self.endless else index / len(self.items)


class MemoryKind(StrEnum):
    HISTORY = "history"  # a question and its answer, about one product
    KNOWLEDGE = "knowledge"  # what a reflection says of the whole group


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One thing to remember.

    Attributes:
        kind: History of one product, or knowledge of a group.
        key: The text that is embedded and matched (for history: the question).
        text: The text that is shown when retrieved.
        answer: The short answer it holds; empty if none.
        group, product: Where it applies; `product` is empty for knowledge.
        session_id: The session that wrote it; empty for memory that was loaded.
        origin: From what it was written: `advice`, `reflection`, `initial`, ...
        id: Given by the memory when written.
    """

    kind: MemoryKind
    key: str
    text: str
    answer: str = ""
    group: str = ""
    product: str = ""
    session_id: str = ""
    origin: str = ""
    id: int = -1


@dataclass(frozen=True, slots=True)
class Scope:
    """Which items a read may see. `product=None` means every product of the group."""

    kind: MemoryKind
    group: str
    product: str | None = None

    def covers(self, item: MemoryItem) -> bool:
        return item.kind is self.kind and item.group == self.group and self.product in (None, item.product)


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A memory item and its cosine similarity to the query, in [-1, 1]."""

    item: MemoryItem
    similarity: float


@dataclass(frozen=True, slots=True)
class MemoryRead:
    """One read of memory: the entries that it found, or the number that it counted."""

    entries: tuple[Retrieved, ...] = ()
    count: int | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool says to the LLM; `ok` is False if `text` is an error message."""

    text: str
    ok: bool = True


@dataclass(frozen=True, slots=True)
class AdviceRequest:
    """A question to an expert: the item, the text the LLM added to `[SeekAdvice]`, and the price of an answer."""

    session_id: str
    item: Item
    message: str
    price: float


class AdviceStatus(StrEnum):
    ANSWERED = "answered"
    TIMEOUT = "timeout"
    REFUSED = "refused"  # the budget is spent, or the expert does not know
    FAILED = "failed"  # the advisor raised


@dataclass(frozen=True, slots=True)
class Advice:
    """An expert's answer. `price` is what it cost: 0 unless `status` is `ANSWERED`.

    Attributes:
        answer: The short answer.
        explanation: Why; the text that reflection can learn from. May be empty.
        expert: Who answered.
    """

    answer: str
    explanation: str = ""
    expert: str = ""
    price: float = 0.0
    status: AdviceStatus = AdviceStatus.ANSWERED

    @property
    def answered(self) -> bool:
        return self.status is AdviceStatus.ANSWERED


# --------------------------------------------------------------------------------------------------------------------
# Sessions


@dataclass(frozen=True, slots=True)
class Reward:
    """Named components; their sum is what the trainer sees."""

    components: Mapping[str, float]

    @property
    def total(self) -> float:
        return float(sum(self.components.values()))


class SessionStatus(StrEnum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"  # a limit on turns, tokens or time
    INVALID_ACTION = "invalid_action"  # too many malformed or illegal actions
    FAILED = "failed"  # policy, memory or task raised; `Session.error` says which
    POLICY_TIMEOUT = "policy_timeout"  # from here on: the stage that was still not done after its time
    TOOL_TIMEOUT = "tool_timeout"
    ADVISOR_TIMEOUT = "advisor_timeout"
    MEMORY_TIMEOUT = "memory_timeout"


# Ends that were not the policy's doing.
BLAMELESS = (
    SessionStatus.FAILED,
    SessionStatus.POLICY_TIMEOUT,
    SessionStatus.TOOL_TIMEOUT,
    SessionStatus.ADVISOR_TIMEOUT,
    SessionStatus.MEMORY_TIMEOUT,
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What an action brought back: shown to the LLM as `text`."""

    action: Action
    source: Source
    text: str
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Session:
    """One question from `[GetQuestion]` to `[SubmitAnswer]`, token by token.

    Attributes:
        id: `<stream id>/<index>`.
        index: Position in its stream, from 0.
        seed: What made its sampling reproducible.
        segments: Context windows in order.
        steps: Actions with what they brought back, in order.
        retrieved: `(memory id, similarity)` of every entry it was shown.
        reads: Every read of memory in order, in full: what a replay needs.
        written: Ids of the memory items it wrote.
        counterfactual: The context of its first decision as it would have been without any entry of memory; empty if
            that was not asked for, it retrieved nothing, or nothing was decided.
        answer: What it submitted; None if it never did.
        reward: None until scored.
        price: At which advice was offered.
    """

    id: str
    stream_id: str
    index: int
    item_id: str
    kind: str
    seed: int
    segments: tuple[Segment, ...]
    steps: tuple[Observation, ...]
    retrieved: tuple[tuple[int, float], ...]
    written: tuple[int, ...]
    advice: Advice | None
    answer: str | None
    status: SessionStatus
    error: str = ""
    reward: Reward | None = None
    reads: tuple[MemoryRead, ...] = ()
    usage: Usage = Usage()
    counterfactual: tuple[int, ...] = ()
    price: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """Stream and item: what it is about, for ids of items are unique within a stream only."""
        return self.stream_id, self.item_id

    @property
    def advised(self) -> bool:
        """Whether an expert answered (and was paid)."""
        return self.advice is not None and self.advice.answered

    @property
    def failed(self) -> bool:
        return self.status is not SessionStatus.COMPLETED

    @property
    def correct(self) -> bool | None:
        """Whether the task called it right (the component `correct` of its reward); None where that is not known."""
        found = None if self.reward is None else self.reward.components.get("correct")
        return None if found is None else found > 0.5

    def called(self, name: str) -> bool:
        return any(step.action.name == name for step in self.steps)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The sessions of one stream, in order, that shared one memory."""

    stream_id: str
    sessions: tuple[Session, ...]


def to_json(value: Any) -> Any:
    """Dataclasses, enums, tuples and mappings as plain JSON values."""
    if type(value) in (int, float, str):  # most of what there is
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    return value
