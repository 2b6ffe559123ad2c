"""The tables of the desk. A change here needs a step in `agile.serve.migrations`; times are seconds since 1970."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite counts up by itself only where the type is INTEGER
Number = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    type_annotation_map = {str: Text}  # noqa: RUF012  (SQLAlchemy's own way to say it)


class User(Base):
    """An account. `epoch` is part of each cookie: raising it ends all of the user's sessions in browsers."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    password_hash: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    epoch: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]


class ApiKey(Base):
    """What a program shows instead of a password; only a digest of it is kept."""

    __tablename__ = "api_keys"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    digest: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]
    revoked: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]


class Question(Base):
    """What somebody asked the agent, and how far it is.

    Attributes:
        number: Counts from 1; the session is `served/<number>`.
        id: Under which the answer can be fetched.
        status: `working`, `waiting` (for an expert), `answered` or `failed`.
        session: The finished session as JSON, token by token.
        advised: Whether an expert answered; None until it is finished.
        confidence: The probability that the agent gave to the tokens of its own answer; None where that is not known.
        deployment: Which agent it was asked of, and which therefore ends it.
        price: At which advice is offered in it; None for that of the config.
        context: JSON of what is known of this question alone: `turns` before it, `options` to choose from.
    """

    __tablename__ = "questions"
    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    text: Mapped[str]
    product: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    answer: Mapped[str | None]
    error: Mapped[str] = mapped_column(default="")
    session: Mapped[str | None]
    advised: Mapped[bool | None]
    confidence: Mapped[float | None]
    deployment: Mapped[int | None]
    price: Mapped[float | None]
    context: Mapped[str] = mapped_column(default="{}", server_default="{}")
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class Review(Base):
    """What a person said of an answer that the agent gave on its own; of several the newest holds.

    Attributes:
        verdict: `right`, `wrong` or `corrected`.
        answer: The right one, where it is corrected.
        sampled: Whether the answer was drawn at random, not picked because the agent was unsure of it.
        key: Names the review, so that sending it twice is saying it once.
    """

    __tablename__ = "reviews"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    question: Mapped[int] = mapped_column(ForeignKey("questions.number"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    verdict: Mapped[str]
    answer: Mapped[str | None]
    explanation: Mapped[str]
    sampled: Mapped[bool]
    key: Mapped[str] = mapped_column(unique=True)
    at: Mapped[float]


class Deployment(Base):
    """That an agent is to be served: `agent` of the folder `run`.

    Attributes:
        by: `config`, or who swapped it in.
        state: `wanted` until a server has taken it, then `served`, or `failed` with an error.
    """

    __tablename__ = "deployments"
    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[str]
    agent: Mapped[str]
    by: Mapped[str]
    at: Mapped[float]
    state: Mapped[str]
    error: Mapped[str] = mapped_column(default="")


class Webhook(Base):
    """An address at which an answer is told, once the question is finished.

    Attributes:
        late: What an expert said when nobody waited any more; None for the answer itself.
        state: `due`, `delivered` or `failed`.
        attempts: How often it was tried; `error` says why the last one did not work.
    """

    __tablename__ = "webhooks"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    question: Mapped[int] = mapped_column(ForeignKey("questions.number"), index=True)
    url: Mapped[str]
    late: Mapped[str | None]
    state: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int]
    next_at: Mapped[float]
    error: Mapped[str] = mapped_column(default="")


class JournalEntry(Base):
    """One thing that a session under way was given: a completion, a read, a result. It is never asked for again."""

    __tablename__ = "journal"
    question: Mapped[int] = mapped_column(ForeignKey("questions.number"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    payload: Mapped[str]


class Request(Base):
    """A question to the experts, answered once for all who ask it.

    Attributes:
        scope: Who asks: `served`, or the name of a run.
        matched: The question as it is compared with others.
        detail: JSON of what else an expert should see.
        status: `open`, `claimed`, `answered`, `unknown` (no expert knows) or `withdrawn` (nobody waits any more).
        answer_key: Names the answer, so that sending it twice is answering once.
        agree: How many experts must give the same answer.
    """

    __tablename__ = "requests"
    id: Mapped[str] = mapped_column(primary_key=True)
    scope: Mapped[str]
    question: Mapped[str]
    matched: Mapped[str]
    group: Mapped[str]
    product: Mapped[str]
    detail: Mapped[str]
    price: Mapped[float]
    status: Mapped[str] = mapped_column(index=True)
    claimed_by: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    claimed_at: Mapped[float | None]
    answer: Mapped[str | None]
    explanation: Mapped[str] = mapped_column(default="")
    answered_by: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    answered_at: Mapped[float | None]
    answer_key: Mapped[str | None]
    agree: Mapped[int] = mapped_column(default=1, server_default="1")
    created_at: Mapped[float]
    __table_args__ = (Index("ix_requests_matched", "scope", "group", "product", "matched"),)


class Asker(Base):
    """A session that waits for a request.

    Attributes:
        session_key: Of a session that may ask again after a restart; None where sessions have no lasting names.
        question: In its own words; the request has those of the first.
        status: `waiting`, `told` or `expired`.
    """

    __tablename__ = "askers"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"), index=True)
    session_id: Mapped[str]
    session_key: Mapped[str | None] = mapped_column(unique=True)
    question: Mapped[str]
    status: Mapped[str]
    created_at: Mapped[float]


class Claim(Base):
    """That an expert took a request, and what came of it: `claimed`, `answered`, `unknown`, `skipped` or `lapsed`."""

    __tablename__ = "claims"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"), index=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    outcome: Mapped[str]
    at: Mapped[float]


class Opinion(Base):
    """An expert's answer to a request to which several must give the same."""

    __tablename__ = "opinions"
    request_id: Mapped[str] = mapped_column(ForeignKey("requests.id"), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    answer: Mapped[str]
    explanation: Mapped[str]
    key: Mapped[str]
    at: Mapped[float]


class MemoryEntry(Base):
    """One thing that the agent remembers; `vector` is the embedded key, float32."""

    __tablename__ = "memory"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    kind: Mapped[str]
    key: Mapped[str]
    text: Mapped[str]
    answer: Mapped[str]
    group: Mapped[str]
    product: Mapped[str]
    session_id: Mapped[str]
    origin: Mapped[str]
    retired: Mapped[bool] = mapped_column(default=False)
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class MemoryRead(Base):
    """That a finished session was shown an entry."""

    __tablename__ = "memory_reads"
    entry_id: Mapped[int] = mapped_column(ForeignKey("memory.id"), primary_key=True)
    question: Mapped[int] = mapped_column(ForeignKey("questions.number"), primary_key=True)


class MemoryChange(Base):
    """What happened to an entry, and what it was before, so that it can be undone; `user_id` is None for the agent."""

    __tablename__ = "memory_changes"
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("memory.id"), index=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    action: Mapped[str]
    before: Mapped[str | None]
    after: Mapped[str]
    at: Mapped[float]


class Terms(Base):
    """What advice costs from then on, and what may be spent on it in a day, None for any sum; the newest holds."""

    __tablename__ = "terms"
    id: Mapped[int] = mapped_column(primary_key=True)
    advice_price: Mapped[float]
    daily_budget: Mapped[float | None]
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    at: Mapped[float]


class Setting(Base):
    """What the database must know of itself, such as the encoder of its vectors."""

    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
