"""What a chat model is told of an agent: a system prompt and tools, made from the agent's table of actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agile.types import AgentSpec, Fn

ARGUMENT = "argument"  # the one property of every tool


def choices(spec: AgentSpec) -> tuple[str, ...]:
    """Names of the actions that an LLM chooses among, wherever several may follow."""
    free = {name for action in spec.actions if len(action.followed_by) > 1 for name in action.followed_by}
    return tuple(action.name for action in spec.actions if action.name in free)


def instructions(spec: AgentSpec, price: float | None, *, native: bool = False, hints: bool = False) -> str:
    """The system prompt of an agent: its actions, the scoring rule and the format.

    Args:
        price: What one piece of advice costs, in units of a right answer; None if each question says so.
        native: Actions are called as tools of the API; otherwise they are written as `[Action] argument`.
        hints: Every observation ends with `next_line`.
    """
    free = choices(spec)
    asked = [a.name for a in spec.actions if a.name not in free and a.takes_argument]
    others = [a.name for a in spec.actions if a.name not in free and not a.takes_argument]
    parts = [
        f"You are the agent {spec.name}. A session goes step by step: you choose an action, and what it brings back is "
        "shown to you before you choose the next.",
        "Actions that you choose:\n" + "\n".join(_line(spec, name) for name in free),
    ]
    if asked:
        parts.append("Actions whose argument you are asked for:\n" + "\n".join(_line(spec, name) for name in asked))
    if others:
        parts.append("Actions that happen by themselves:\n" + "\n".join(_line(spec, name) for name in others))
    parts += [_scoring(spec, price), _format(spec, free, native, hints)]
    return "\n\n".join(parts)


def next_line(spec: AgentSpec, legal: Sequence[str]) -> str:
    """What the model may write now, `Next: [Search] argument, or [Ask]`."""
    return "Next: " + ", or ".join(_form(spec, name) for name in legal)


def tool(spec: AgentSpec, name: str) -> dict[str, Any]:
    """An action as a tool of chat APIs, with a JSON schema."""
    properties = {ARGUMENT: {"type": "string", "description": "The text that the action takes."}}
    given = properties if spec[name].takes_argument else {}
    schema = {"type": "object", "properties": given, "required": [*given], "additionalProperties": False}
    return {
        "type": "function",
        "function": {"name": name, "description": spec[name].description, "parameters": schema},
    }


def _form(spec: AgentSpec, name: str) -> str:
    return f"[{name}] argument" if spec[name].takes_argument else f"[{name}]"


def _line(spec: AgentSpec, name: str) -> str:
    followers = spec.legal_after(name)
    line = f"- {_form(spec, name)}: {spec[name].description}"
    return f"{line} Then: {' or '.join(f'[{n}]' for n in followers)}." if followers else line


def _scoring(spec: AgentSpec, price: float | None) -> str:
    names = {a.name for a in spec.actions}
    lines = ["Score of a session: 1 if the answer is right, 0 if it is wrong."]
    if Fn.SEEK_ADVICE in names:
        if price is None:
            lines.append(
                "Advice costs what stands above the question. An expert's answer counts as right, so a session with "
                "advice scores 1 less that: ask only if you are less sure than that of your own answer."
            )
        else:
            lines.append(
                f"Advice costs {price:g}. An expert's answer counts as right, so a session with advice scores "
                f"{1 - price:g}: ask only if you are less than {100 * (1 - price):g} % sure of your own answer."
            )
        lines[-1] += " An expert is asked at most once a session."
        if Fn.UPDATE_MEMORY in names:
            lines.append("What is written to memory after advice is shown in later sessions, which then need not ask.")
    return " ".join(lines)


def _format(spec: AgentSpec, free: Sequence[str], native: bool, hints: bool) -> str:
    if native:
        return "Format: every turn is exactly one call of one of the tools that are offered, without other text."
    example = next((_form(spec, name) for name in free if spec[name].takes_argument), "[Action] argument")
    return (
        "Format: every turn is exactly one action: its name in brackets and, if it takes one, its argument on the same "
        f"line, such as `{example}`. Write nothing before or after it."
        + (" The last line that you are shown says which actions may come next." if hints else "")
    )
