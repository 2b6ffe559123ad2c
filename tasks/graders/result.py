"""What grading a sample gives, in the shape of the hosted API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from agile.types import to_json

DETAIL_LENGTH = 2000  # characters of an error's text that are kept


@dataclass(frozen=True, slots=True)
class GraderErrors:
    """What went wrong; several may be true. docs/graders.md says when each is.

    Attributes:
        details: One line for each error, `NAME OF THE GRADER: what`; not in the hosted API.
    """

    formula_parse_error: bool = False
    invalid_variable_error: bool = False
    sample_parse_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_server_error: bool = False
    model_grader_server_error_details: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    other_error: bool = False
    details: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[str]:
        """Names of the booleans that are true."""
        return [f.name for f in fields(self) if getattr(self, f.name) is True]

    def __or__(self, other: GraderErrors) -> GraderErrors:
        """Both: the first text of each kind, all details."""
        own = {f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)}
        return GraderErrors(**(own | {"details": self.details + other.details}))


def error(kind: str, detail: str) -> GraderErrors:
    """An error of one kind, with its text in the field that the hosted API has for it, if it has one."""
    detail = detail[:DETAIL_LENGTH]
    texts = {f"{kind}_details", f"{kind}_type"} & {f.name for f in fields(GraderErrors)}
    given: dict[str, Any] = {kind: True, "details": (detail,), **dict.fromkeys(texts, detail)}
    return GraderErrors(**given)


@dataclass(frozen=True, slots=True)
class Grade:
    """A reward and how it came about.

    Attributes:
        reward: Finite; 0 where the grader failed.
        sub_rewards: Of the graders of a `multi`, or of the fields of a `structured`.
        scores: What else the grader has to say.
        execution_time_s: Seconds, waiting for a free process or connection included.
        token_usage: Tokens read and written by each model that graded.
    """

    reward: float
    name: str
    type: str
    errors: GraderErrors = GraderErrors()
    sub_rewards: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    execution_time_s: float = 0.0
    token_usage: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As the hosted API answers."""
        return {
            "reward": self.reward,
            "sub_rewards": to_json(self.sub_rewards),
            "metadata": {
                "name": self.name,
                "type": self.type,
                "errors": to_json(self.errors),
                "execution_time": self.execution_time_s,
                "scores": to_json(self.scores),
                "token_usage": sum(u["total_tokens"] for u in self.token_usage.values()) if self.token_usage else None,
                "sampled_model_name": ", ".join(self.token_usage) or None,
            },
            "model_grader_token_usage_per_model": to_json(self.token_usage),
        }


def failed(name: str, kind: str, errors: GraderErrors) -> Grade:
    """No reward, and why: each detail is preceded by the grader's name."""
    return Grade(0.0, name, kind, replace(errors, details=tuple(f"{name}: {d}" for d in errors.details)))
