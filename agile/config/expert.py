"""The section about one expert."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agile.config.evaluate import PromptedConfig
from agile.config.hours import HoursConfig
from agile.config.section import Count, Price, Section, Share, UserPath, UserText

GOLD = "gold"  # always there, under this name


class ExpertConfig(Section):
    """Somebody to ask, by what is known of them."""

    kind: Literal["gold", "noisy", "recorded", "model", "desk"] = Field(
        "gold",
        description="Who knows the gold answers, or who errs; recorded answers, a model behind an endpoint, or the "
        "people at the desk of agile serve.",
    )
    price: Price | None = Field(None, description="Of one answer; task.advice_price by default.")
    latency_s: float | None = Field(
        None, ge=0, description="Seconds until an answer, for the report: nobody waits for them. model: as measured."
    )
    error_rate: Share = Field(0.1, description="noisy: share of the answers that are wrong.")
    answers: UserPath | None = Field(
        None, description="recorded: JSON lines of id, model and choice or answer, by their path or that in task.data."
    )
    model: str | None = Field(None, description="recorded: whose answers in that file.")
    endpoint: PromptedConfig | None = Field(None, description="model: its endpoint; keys as in evaluate.prompted.")

    database: UserText | None = Field(None, description="desk: URL of its database, as serve.database.")
    scope: str = Field("training", min_length=1, description="desk: name of the run, which experts see.")
    timeout_s: float | None = Field(None, gt=0, description="desk: seconds to wait; null for as long as it takes.")
    hours: HoursConfig | None = Field(None, description="desk: when people are there; at any time by default.")
    agree: Count = Field(1, description="desk: how many experts must give the same answer.")
    fallback: str | None = Field(None, description="desk: which other expert is asked where the desk has no answer.")

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> ExpertConfig:
        if self.kind == "recorded" and self.answers is None:
            raise ValueError("kind is recorded, but answers is missing; name the file of recorded answers")
        if self.kind == "model" and (self.endpoint is None or not self.endpoint.model):
            raise ValueError("kind is model, but endpoint.model is missing; name the model that is to be asked")
        if self.kind == "desk" and self.database is None:
            raise ValueError("kind is desk, but database is missing; give the URL of the desk, sqlite:///FILE")
        if self.kind == "desk" and self.scope == "served":
            raise ValueError("scope is 'served', which is the server's own; choose another name")
        return self
