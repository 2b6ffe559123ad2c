"""The section about one expert."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agile.config.evaluate import PromptedConfig
from agile.config.section import Price, Section, Share, UserPath

GOLD = "gold"  # always there, under this name


class ExpertConfig(Section):
    """Somebody to ask, by what is known of them."""

    kind: Literal["gold", "noisy", "recorded", "model"] = Field(
        "gold", description="Who knows the gold answers, or who errs; recorded answers, or a model behind an endpoint."
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

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> ExpertConfig:
        if self.kind == "recorded" and self.answers is None:
            raise ValueError("kind is recorded, but answers is missing; name the file of recorded answers")
        if self.kind == "model" and (self.endpoint is None or not self.endpoint.model):
            raise ValueError("kind is model, but endpoint.model is missing; name the model that is to be asked")
        return self
