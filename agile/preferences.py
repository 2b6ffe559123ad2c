"""`agile preferences`: pairs of a right and a wrong answer, from experts' corrections, in TRL's own format.

A pair comes about where the agent answered wrong without an expert's answer and an expert answered the same question
of the same stream in another session. The prompt is what the agent saw when it decided, up to its last token; chosen is
the expert's answer, written as the action that the agent should have emitted there; rejected is what it emitted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agile.advice import gold_answer
from agile.errors import AgileError
from agile.from_desk import SESSIONS, judged
from agile.replay import RunParts
from agile.run_folder import write_atomically, writing
from agile.session_log import Logged, logged_sessions
from agile.tokens import ActionCodec
from agile.types import Action, Fn, Item, Session, Source, to_json

Question = tuple[str, str]  # ids of the stream and of the item

# How the counts of `find_preferences` are named in a sentence.
COUNTS = {
    "sessions": "sessions of training",
    "wrong": "with a wrong answer of the agent's own",
    "uncorrected": "without an expert's answer",
    "disputed": "on which experts disagree",
    "searched": "after a tool, where the query was at fault",
    "same": "where the expert is wrong in the same way",
    "undecided": "without an answer that the LLM wrote",
    "not_exact": "whose text does not give its tokens back",
    "repeated": "that another session holds as well",
}


@dataclass(frozen=True, slots=True)
class Preference:
    """One line of the file: TRL's explicit-prompt preference format, and where it comes from (which TRL ignores)."""

    prompt: str
    chosen: str
    rejected: str
    session: str
    source: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What the LLM saw and what it then wrote, as token ids.

    Attributes:
        named: Whether the name of the action stands at the end of the context, so that only its argument was written.
    """

    context: tuple[int, ...]
    written: tuple[int, ...]
    named: bool


def answer_decision(session: Session, codec: ActionCodec) -> Decision | None:
    """The decision by which a session came to its answer; its thinking counts as seen. None if there is none."""
    found: Decision | None = None
    for segment in session.segments:
        before: list[int] = []
        for span in segment.spans:
            if span.source is Source.LLM:
                thought = codec.num_thinking(span.token_ids)
                context = (*before, *span.token_ids[:thought])
                named = bool(before) and codec.awaited(before) == Fn.PREDICT_ANSWER
                forced = Fn.PREDICT_ANSWER if named else None
                if isinstance(codec.parse(span.token_ids, (Fn.PREDICT_ANSWER,), forced), Action):
                    found = Decision(context, span.token_ids[thought:], named)
            before += span.token_ids
    return found if session.answer is not None else None


def preference(codec: ActionCodec, decision: Decision, answer: str, session_id: str, source: str) -> Preference | None:
    """The pair that corrects a decision to answer.

    Args:
        decision: The agent's, see `answer_decision`.
        answer: The right answer.
        source: Who said so.

    Returns:
        None if TRL, which reads text and tokenises it again, would not get these tokens back.
    """
    action = Action(Fn.PREDICT_ANSWER, answer)
    if decision.named:
        right = codec.encode_argument(action)
    else:
        right = codec.encode_action(action)[len(codec.turns.end_thinking) :]
    texts = _exact_texts(codec, decision.context, right, decision.written)
    return None if texts is None else Preference(*texts, session_id, source)


def _exact_texts(
    codec: ActionCodec, context: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]
) -> tuple[str, str, str] | None:
    """Texts from which TRL makes these ids, if there are any.

    TRL encodes the prompt, and the prompt with each answer and the end token behind it, with the tokenizer's own
    special tokens in front.
    """
    tokenizer = codec.tokenizer

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text=text)["input_ids"])

    added = encode("")
    shown = context[len(added) :] if context[: len(added)] == added else context
    prompt = codec.decode(shown)
    if encode(prompt) != context:
        return None
    answers = []
    for ids in (chosen, rejected):
        whole = codec.decode((*shown, *ids))
        answers.append(whole.removeprefix(prompt))
        closed = whole if whole.endswith(tokenizer.eos_token) else whole + tokenizer.eos_token
        if not whole.startswith(prompt) or encode(closed) != context + ids:
            return None
    return prompt, answers[0], answers[1]


# --------------------------------------------------------------------------------------------------------------------
# A run


def find_preferences(
    sessions: Callable[[], Iterable[Session]],
    codec: ActionCodec,
    gold: Callable[[Session], str | None] = lambda session: None,
    told: Iterable[tuple[Question, str]] = (),
) -> tuple[list[Preference], dict[str, int]]:
    """Pairs from sessions, and how many sessions were left out for what reason.

    Args:
        sessions: Gives all sessions; called twice.
        gold: The task's answer to a session's question, for those that no expert answered.
        told: What people said is right, who are experts too.

    Returns:
        The pairs in the order of the sessions, each once; and counts by the keys of `COUNTS`.
    """
    said: dict[Question, set[str]] = {question: {answer} for question, answer in told}
    for session in sessions():
        if session.advised and session.advice is not None:
            said.setdefault(session.key, set()).add(session.advice.answer)
    counts = Counter(dict.fromkeys(COUNTS, 0))
    pairs: dict[tuple[str, str, str], Preference] = {}
    for session in sessions():
        counts["sessions"] += 1
        if session.correct is not False or session.failed or session.advised:
            continue
        counts["wrong"] += 1
        found = _corrected(session, codec, said, gold)
        if isinstance(found, str):
            counts[found] += 1
            continue
        key = found.prompt, found.chosen, found.rejected
        counts["repeated"] += key in pairs
        pairs.setdefault(key, found)
    return list(pairs.values()), dict(counts)


def _corrected(
    session: Session, codec: ActionCodec, said: Mapping[Question, set[str]], gold: Callable[[Session], str | None]
) -> Preference | str:
    """The pair of a session that answered wrong, or the key of `COUNTS` that says why there is none."""
    if any(step.source is Source.TOOL for step in session.steps):
        return "searched"
    answers = said.get(session.key, set())
    if len(answers) > 1:
        return "disputed"
    source, answer = "expert", next(iter(answers), None)
    if answer is None:
        source, answer = "gold", gold(session)
    if answer is None:
        return "uncorrected"
    if session.answer is not None and session.answer.split() == answer.split():
        return "same"
    decision = answer_decision(session, codec)
    if decision is None:
        return "undecided"
    return preference(codec, decision, answer, session.id, source) or "not_exact"


def run_preferences(run: Path, *, gold: bool = False) -> tuple[list[Preference], dict[str, int]]:
    """`find_preferences` of what a run played in training; its tests are no training data.

    A run from the desk also has the sessions that people asked for, and what they said is right.

    Args:
        gold: Whether the task's own answers correct what no expert was asked.

    Raises:
        AgileError: The folder is no run, or trained nothing.
    """
    parts = RunParts(run)

    def logged() -> Iterable[Logged]:
        return (found for found in logged_sessions(run) if not found.agent)

    served = [] if parts.config.task.desk is None else list(judged(run / SESSIONS))
    first = next(iter(logged()), None)
    if first is None:
        raise AgileError(f"{run} played no session in training. Name a run of `agile train` or `agile demo`.")
    items: dict[Question, Item] = {}
    if gold:
        items = {(s.id, item.id): item for s in parts.setup.task.streams("train") for item in s.items}

    def answer(session: Session) -> str | None:
        item = items.get(session.key)
        return None if item is None or isinstance(item.answer, list | tuple) else gold_answer(item)

    def sessions() -> Iterable[Session]:
        yield from (session for session, _ in served)
        yield from (found.session for found in logged())

    told = [(session.key, right) for session, right in served]
    return find_preferences(sessions, parts.executor(first).codec, answer, told)


def export_preferences(run: Path, out: Path, console: Console, *, gold: bool = False) -> int:
    """Write the pairs of a run as JSON lines; returns how many.

    Raises:
        AgileError: See `run_preferences`; or the file cannot be written.
    """
    pairs, counts = run_preferences(run, gold=gold)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, "".join(json.dumps(to_json(pair), ensure_ascii=False) + "\n" for pair in pairs))
    console.print(f"{len(pairs):,} pairs: {out}", markup=False, soft_wrap=True)
    for key, text in COUNTS.items():
        if counts[key] or key in ("sessions", "wrong"):
            console.print(f"  {counts[key]:,} {text}", markup=False)
    return len(pairs)
