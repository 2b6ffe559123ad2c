"""What imitation and preferences learn from sessions that people asked a server for: see `agile.tasks.desk`.

A line of the file is a session, token by token, and the answer that people gave or confirmed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from agile.session_log import read_lines, session_from_json
from agile.tasks.scoring import fold
from agile.tokens import ActionCodec
from agile.types import Action, Fn, Reward, Segment, Session, Source, Span

SESSIONS = "desk-sessions.jsonl"


def read_sessions(path: Path) -> Iterator[tuple[Session, str]]:
    """The sessions of a file, each with the answer that people call right."""
    for record in read_lines(path):
        yield session_from_json(record["session"]), str(record["answer"])


def judged(path: Path) -> Iterator[tuple[Session, str]]:
    """`read_sessions`, with rewards that say whether the answer is the one that people call right."""
    for session, answer in read_sessions(path):
        right = session.answer is not None and fold(session.answer) == fold(answer)
        yield replace(session, reward=Reward({"correct": float(right)})), answer


def imitated(path: Path, codec: ActionCodec) -> tuple[list[Session], Counter[str]]:
    """Sessions to imitate, in order, and how many were right, corrected, or left out for what reason."""
    kept, counts = [], Counter[str]()
    for session, answer in read_sessions(path):
        found = example(session, answer, codec)
        if isinstance(found, str):
            counts[found] += 1
        else:
            counts["right" if found is session else "corrected"] += 1
            kept.append(found)
    return kept, counts


def example(session: Session, answer: str, codec: ActionCodec) -> Session | str:
    """The session as it should have been, token by token, or why there is none.

    Args:
        answer: What people say is right. A session that came to it is as it should be. In one that answered otherwise
            without asking, the right answer takes the place of the wrong one.
    """
    if session.failed or session.answer is None:
        return "failed"
    if not _is_of(codec, session):
        return "of another tokenizer"
    if fold(session.answer) == fold(answer):
        return session
    if session.advised:
        return "advised otherwise"
    if any(step.source is Source.TOOL for step in session.steps):
        return "searched"  # the query was at fault
    return corrected(session, answer, codec) or "undecided"


def corrected(session: Session, answer: str, codec: ActionCodec) -> Session | None:
    """The session with another answer in place of its own; None if it wrote none, or thought before it did.

    The new tokens have no logprobs of any policy: they are 0.
    """
    place: tuple[int, int] | None = None
    named = False
    for s, segment in enumerate(session.segments):
        before: list[int] = []
        for n, span in enumerate(segment.spans):
            if span.source is Source.LLM:
                awaited = codec.awaited(before) if before else None
                action = codec.parse(span.token_ids, (Fn.PREDICT_ANSWER,), awaited)
                if isinstance(action, Action) and action.name == Fn.PREDICT_ANSWER:
                    place, named = (s, n), awaited is not None
            before += span.token_ids
    if place is None or codec.num_thinking(session.segments[place[0]].spans[place[1]].token_ids):
        return None
    action = Action(Fn.PREDICT_ANSWER, answer)
    ids = codec.encode_argument(action) if named else codec.encode_action(action)
    new = Span(Source.LLM, ids, (0.0,) * len(ids))
    segments = list(session.segments)
    old = segments[place[0]]
    segments[place[0]] = Segment((*old.spans[: place[1]], new, *old.spans[place[1] + 1 :]), old.end)
    return replace(session, segments=tuple(segments), answer=answer)


def _is_of(codec: ActionCodec, session: Session) -> bool:
    """Whether the session was written with this tokenizer, as far as the question tells."""
    texts = [step.text for step in session.steps if step.source is Source.TASK]
    spans = [span.token_ids for segment in session.segments for span in segment.spans if span.source is Source.TASK]
    return [codec.encode(text) for text in texts] == spans
