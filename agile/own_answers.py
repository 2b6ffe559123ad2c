"""What the policy thinks of its own answers, read from the tokens of its sessions.

**Confidence** is the probability that the policy gives to the tokens of its answer: of the argument of
`[PredictAnswer]`, its end included, under the policy itself (temperature 1; greedy play logs that too). Where a session
asked, the answer is the one that the policy gives if it is made to answer at that very place, found by one further
completion: so every question has a confidence and an answer that was right or wrong.

**Readiness** is the probability of not asking at the first decision: of the action that it chose there, or one less
that of `[SeekAdvice]` if it chose to ask. It is exact where the policy doubts between asking and one other action.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from agile.calibration import Belief
from agile.executor import Executor
from agile.protocols import AnswerKey, Policy
from agile.rollout import run_loop
from agile.seeding import derive_seed
from agile.tokens import ActionCodec
from agile.types import Action, Fn, Item, Session, Source, Trajectory


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """An answer that the policy was made to give, and the probability of its tokens."""

    text: str
    confidence: float


@dataclass(frozen=True, slots=True)
class _Said:
    """One valid action that was sampled.

    Attributes:
        context: Ids before it.
        name: Of the action.
        forced: Whether the executor wrote the name.
        name_probability: Of the tokens of the name; 1 if it was forced.
        probability: Of all tokens behind the name.
    """

    context: tuple[int, ...]
    name: str
    forced: bool
    name_probability: float
    probability: float


def own_answers(policy: Policy, executor: Executor, trajectories: Iterable[Trajectory]) -> dict[str, OwnAnswer]:
    """What the policy answers where its sessions asked, by session id; without those that end in no answer."""
    codec, limits = executor.codec, executor.limits

    async def answer(session: Session, context: tuple[int, ...]) -> tuple[str, OwnAnswer] | None:
        prompt = (*context, *codec.turns.end_thinking, *codec.name_ids(Fn.PREDICT_ANSWER))
        room = min(limits.max_action_tokens, limits.max_context_tokens - len(prompt))
        if room < 1:
            return None
        completion = await policy.complete(
            prompt,
            max_tokens=room,
            stop=codec.stop_ids((), Fn.PREDICT_ANSWER),
            seed=derive_seed(session.seed, "own answer"),
        )
        action = codec.parse(completion.token_ids, (), Fn.PREDICT_ANSWER)
        if not isinstance(action, Action):
            return None
        return session.id, OwnAnswer(action.argument, math.exp(sum(completion.logprobs)))

    async def run() -> list[tuple[str, OwnAnswer] | None]:
        asked = [
            (session, said.context)
            for session in (s for t in trajectories for s in t.sessions if s.advised)
            for said in _sampled(session, codec)
            if said.name == Fn.SEEK_ADVICE
        ]
        return list(await asyncio.gather(*(answer(session, context) for session, context in asked)))

    return dict(found for found in run_loop(run()) if found is not None)


def beliefs(
    sessions: Iterable[Session],
    items: Mapping[tuple[str, str], Item],
    codec: ActionCodec,
    answers: Mapping[str, OwnAnswer],
    task: AnswerKey,
) -> list[Belief]:
    """One belief for each session that came to an answer, of its own or, where it asked, one of `answers`.

    Args:
        items: Questions by stream and id, see `Session.key`.
    """
    found = []
    for session in sessions:
        said = list(_sampled(session, codec))
        first = next((s for s in said if not s.forced), None)
        if session.failed or first is None or session.reward is None:
            continue
        if session.advised:
            if session.id not in answers:
                continue
            text, confidence = answers[session.id].text, answers[session.id].confidence
            before = [step.action.name for step in session.steps]
            used_tool = any(name not in Fn.ALL for name in before[: before.index(Fn.SEEK_ADVICE)])
            right = task.is_correct(items[session.key], text, used_tool)
        else:
            predicted = [s.probability for s in said if s.name == Fn.PREDICT_ANSWER]
            if not predicted:
                continue
            confidence, right = predicted[-1], bool(session.correct)
        chosen = first.name_probability
        readiness = 1 - chosen if first.name == Fn.SEEK_ADVICE else chosen
        if not math.isnan(confidence):
            found.append(Belief(session.id, session.kind, session.advised, readiness, confidence, right))
    return found


def confidence(session: Session, codec: ActionCodec) -> float | None:
    """The probability that the policy gave to the tokens of its answer; None if it gave none, or none is logged."""
    predicted = [said.probability for said in _sampled(session, codec) if said.name == Fn.PREDICT_ANSWER]
    return predicted[-1] if predicted and math.isfinite(predicted[-1]) else None


def _sampled(session: Session, codec: ActionCodec) -> Iterator[_Said]:
    """The valid actions of a session in order."""
    names = [action.name for action in codec.spec.actions]
    for segment in session.segments:
        context: list[int] = []
        for span in segment.spans:
            if span.source is Source.LLM:
                forced = codec.awaited(context) if context else None
                thinking = codec.num_thinking(span.token_ids)
                ids, logprobs = span.token_ids[thinking:], span.logprobs[thinking:]
                action = codec.parse(span.token_ids, names, forced)
                if isinstance(action, Action):
                    lengths = range(1, len(ids) + 1)  # of the name: up to its closing bracket
                    head = 0 if forced else next(n for n in lengths if "]" in codec.decode(ids[:n]))
                    yield _Said(
                        tuple(context),
                        action.name,
                        forced is not None,
                        math.exp(sum(logprobs[:head])),
                        math.exp(sum(logprobs[head:])),
                    )
            context += span.token_ids
