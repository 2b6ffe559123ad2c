"""Token ids back to what happened: the steps of a context, what each brought back, and what may come next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from agile.prompts import choices
from agile.tokens import ActionCodec
from agile.types import Fn

# What the executor says of an action that it did not take (`ActionCodec.parse`).
_ERROR = re.compile(
    r"error : (expected one of( \w+)*|\w+ (takes no argument|did not end|holds another action))\Z", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Step:
    """One action of a context.

    Attributes:
        name: The action; empty if the LLM wrote something that is none, which is then the argument.
        argument: The text after the name, stripped.
        observation: What was shown then.
        legal: The actions that were legal; one alone was named by the executor.
    """

    name: str
    argument: str
    observation: str
    legal: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A context as an LLM meets it.

    Attributes:
        opening: Text before the first action; empty in contexts that the executor wrote.
        steps: What happened, in order.
        legal: What may come next.
        forced: The action whose name stands there already, so that only its argument is missing.
    """

    opening: str
    steps: tuple[Step, ...]
    legal: tuple[str, ...]
    forced: str | None


@dataclass(slots=True)
class _Piece:
    name: str
    open: bool  # its argument has not ended
    ended: bool
    argument: list[int] = field(default_factory=list)
    observation: list[int] = field(default_factory=list)


def read_context(codec: ActionCodec, token_ids: Sequence[int], none_id: int) -> Transcript:
    """The steps in a context of one session.

    Args:
        codec: Of the executor that wrote it; its tokenizer has a token for every text.
        none_id: The token that stands before text of the LLM that is no action, up to the end token.
    """
    opening: list[int] = []
    pieces: list[_Piece] = []
    for token in token_ids:
        last = pieces[-1] if pieces else None
        name = codec.name_of(token)
        if name is not None:
            takes = codec.spec[name].takes_argument
            pieces.append(_Piece(name, open=takes, ended=not takes))
        elif token == none_id:
            pieces.append(_Piece("", open=True, ended=False))
        elif token == codec.end_id:
            if last is not None:
                last.open, last.ended = False, True
        elif last is None:
            opening.append(token)
        else:
            (last.argument if last.open else last.observation).append(token)
    waiting = bool(pieces) and bool(pieces[-1].name) and pieces[-1].open and not pieces[-1].argument
    forced = pieces.pop().name if waiting else None
    steps, legal = _steps(codec, pieces)
    return Transcript(codec.decode(opening), steps, legal if forced is None else (forced,), forced)


def _steps(codec: ActionCodec, pieces: Sequence[_Piece]) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Steps, and what is legal after the last."""
    steps: list[Step] = []
    legal, advised = (pieces[0].name,) if pieces else choices(codec.spec), False
    for piece in pieces:
        argument, observation = codec.decode(piece.argument), codec.decode(piece.observation)
        if not piece.ended and (error := _ERROR.search(argument)):
            argument, observation = argument[: error.start()], error[0]
        steps.append(Step(piece.name, argument.strip(), observation, legal))
        if piece.ended and piece.name in legal:
            advised = advised or piece.name == Fn.SEEK_ADVICE
            legal = codec.spec.legal_after(piece.name, advised=advised)
    return tuple(steps), legal
