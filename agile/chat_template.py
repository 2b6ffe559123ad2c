"""Chat templates token by token: what a model's own template puts around turns, found by rendering it once.

A template is a program that renders a whole conversation to text. Tokenising that text again at each turn gives ids
other than those that were sampled. So the template is rendered here once, around marks; what stands between the marks
is kept as token ids, and a context is built by appending those, what is observed, and what was sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from agile.errors import AgileError
from agile.tokens import THINK_END, Turns

_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


def chat_turns(
    tokenizer: PreTrainedTokenizerFast,
    *,
    instructions: str = "",
    role: Literal["system", "user"] = "system",
    keep_thinking: bool = True,
    options: Mapping[str, Any] | None = None,
) -> tuple[Turns, int]:
    """The turns of a tokenizer's chat template, and the token that ends the LLM's.

    Args:
        instructions: What opens every context window: in a turn of its own (`system`) or at the start of the user's.
        keep_thinking: Whether thinking stays in the context, see `Turns`.
        options: Further variables of the template, such as `enable_thinking` or `date_string`.

    Raises:
        AgileError: There is no template, or it renders the same conversation differently as it grows, so that no
            sequence of tokens could be extended turn by turn.
    """
    if tokenizer.chat_template is None:
        raise AgileError(
            "The tokenizer has no chat template (tokenizer.chat_template). Set prompt.format=plain, or take the "
            "instruction-tuned model of the family."
        )
    render = _Renderer(tokenizer, instructions, role, dict(options or {}))
    parts = [_split(render(n), n) for n in (1, 2, 3)]
    _check_growth(parts, role, instructions)
    if instructions.strip() not in parts[0][0]:
        raise AgileError(
            "The chat template leaves the system turn out, so that the LLM would never see its instructions. Set "
            "prompt.instructions=user."
        )
    opening, *middle, to_llm = parts[2]
    before, after = middle[0], middle[1]  # user to LLM and LLM to user, in turns that lie behind
    if _THINKING.sub("", to_llm).rstrip() != _THINKING.sub("", before).rstrip():
        raise AgileError(
            f"The chat template opens the turn to sample with {to_llm!r}, but shows earlier ones with {before!r}: what "
            "was sampled would stand elsewhere afterwards. Set prompt.template_options so that both agree, or "
            "prompt.format=plain."
        )
    end, *to_user = _ids(tokenizer, after.lstrip()) or (None,)  # white space before the end is the LLM's to write
    if end is None or end not in tokenizer.added_tokens_decoder:
        raise AgileError(
            f"The chat template ends the LLM's turn with {after!r}, which does not start with a special token; an "
            "action's end could not be told from text. Set prompt.format=plain."
        )
    # Without thinking, both differ in white space at most, which the sampled text may bring itself.
    thinks = _THINKING.search(to_llm)
    start, head = bos_ids(tokenizer), _ids(tokenizer, opening)
    turns = Turns(
        opening=head if head[: len(start)] == start else start + head,
        to_llm=_ids(tokenizer, to_llm),
        to_llm_before=_ids(tokenizer, before if thinks else to_llm),
        to_user=tuple(to_user),
        end_thinking=_ids(tokenizer, f"{THINK_END}\n\n") if thinks and not thinks[1] else (),
        keep_thinking=keep_thinking,
    )
    return turns, end


class _Renderer:
    """Renders a conversation of `n` questions, the last one open, with marks in place of all texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, instructions: str, role: str, options: dict[str, Any]):
        self.tokenizer = tokenizer
        self.instructions = instructions
        self.role = role
        self.options = options
        # A macro, since variables of a template cannot be functions.
        clock = "{%% macro strftime_now(form) %%}%s{%% endmacro %%}"
        template = tokenizer.get_chat_template()
        today, other = (self(1, chat_template=clock % day + template) for day in ("1999", "2001"))
        if today != other:
            raise AgileError(
                "The chat template writes today's date into the prompt, so that a run resumed tomorrow would be "
                "another run. Fix it in the config: prompt.template_options={date_string: 26 Jul 2024} for Llama."
            )

    def __call__(self, num_questions: int, **variables: Any) -> str:
        messages = []
        if self.instructions and self.role == "system":
            messages.append({"role": "system", "content": self.instructions})
        for i in range(num_questions):
            head = f"{self.instructions}\n\n" if self.instructions and self.role == "user" and i == 0 else ""
            messages.append({"role": "user", "content": head + _mark("question", i)})
            if i < num_questions - 1:
                messages.append({"role": "assistant", "content": _mark("answer", i)})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **{**self.options, **variables}
                )
            )
        except Exception as error:  # templates raise errors of their own, and jinja its
            system = messages[0]["role"] == "system"
            remedy = " It may know no system turn: set prompt.instructions=user." if system else ""
            reason = str(error).rstrip(".")
            raise AgileError(f"The chat template cannot render a conversation: {reason}.{remedy}") from error


def _mark(kind: str, i: int) -> str:
    return f"{kind.upper()}{i}MARK"


def _split(text: str, num_questions: int) -> list[str]:
    """What stands before, between and after the marks."""
    marks = [_mark(kind, i) for i in range(num_questions) for kind in ("question", "answer")][:-1]
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise AgileError(
                f"The chat template shows a message {text.count(mark)} times, expected once: it is not "
                "prefix-preserving. Take a template that shows every turn, or set prompt.format=plain."
            )
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _check_growth(parts: Sequence[Sequence[str]], role: str, instructions: str) -> None:
    """Whether each conversation starts as the shorter one did, but for the thinking of the turn to sample."""
    one, two, three = parts
    longer = [two[0], *two[1:3], *two[1:3], two[3]]
    if one == [two[0], two[3]] and three == longer:
        return
    if role == "system" and instructions.strip() in one[0] and instructions.strip() not in three[0]:
        remedy = "It moves the system turn; set prompt.instructions=user."
    else:
        remedy = "Take a template that only appends, or set prompt.format=plain."
    raise AgileError(
        "The chat template is not prefix-preserving: with one question more it renders the earlier turns differently, "
        f"{[*one[:1], *longer[1:]]} became {list(three)}. {remedy}"
    )


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text, such as `<s>`; models were trained to see it."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    return tuple(whole[: next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)])


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Ids of a piece of the template, whose special tokens are special.

    A space at its end is left to what follows, where the tokenizer starts every text with one.
    """
    if tokenizer.tokenize("x")[0].startswith("\N{LOWER ONE EIGHTH BLOCK}"):
        text = text.removesuffix(" ")
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
