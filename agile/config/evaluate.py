"""Sections about `agile bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from agile.config.section import Count, Price, Section, UserPath

Agent = Literal["sft", "ppo", "dpo", "prompted"]
Baseline = Literal["always_ask", "never_ask", "router", "recall", "calibrated_recall", "oracle"]
AGENTS, BASELINES = get_args(Agent), get_args(Baseline)


class TokenPrices(Section):
    """Money for a million tokens, in any currency."""

    input: float = Field(0.0, ge=0)
    cached_input: float | None = Field(None, ge=0, description="Input that the endpoint had cached; None: as input.")
    output: float = Field(0.0, ge=0)


class PromptedConfig(Section):
    """The agent `prompted`: a model behind an OpenAI-compatible endpoint that is told the rules and not trained."""

    base_url: str = Field("https://api.openai.com/v1", description="Address of the endpoint, most end in /v1.")
    model: str | None = Field(None, description="As the endpoint names it.")
    api_key_env: str | None = Field("OPENAI_API_KEY", description="Variable that holds the key; null for no key.")
    tools: Literal["auto", "native", "text"] = Field(
        "auto", description="Whether actions are tools of the API or text; auto tries tools, then text."
    )
    temperature: float | None = Field(0.0, ge=0, description="Of sampling; null sends none.")
    max_tokens: Count = Field(512, description="Most tokens of one answer, in the model's own tokens.")
    max_concurrent: Count = Field(8, description="Most requests under way at once.")
    requests_per_minute: float | None = Field(None, gt=0, description="Spaces the requests; null for no limit.")
    timeout_s: float = Field(120.0, gt=0, description="Of one request.")
    prices: TokenPrices = TokenPrices()
    cache: UserPath | None = Field(None, description="SQLite file that keeps answers; by default in the run folder.")


class EvaluateConfig(Section):
    baselines: tuple[Baseline, ...] = BASELINES
    agents: tuple[Agent, ...] = ("sft", "ppo", "dpo")
    checkpoint: tuple[UserPath, ...] = Field(
        (), description="Run folder whose agents `agile bench` scores; several, of different seeds, are pooled."
    )
    ablations: tuple[
        Literal["memory", "reflection", "advice", "tools", "rl", "random_advice", "poisoned_memory"], ...
    ] = Field((), description="What is taken from the trained agent, one at a time; see docs/benchmark.md.")
    experts: tuple[str, ...] = Field(
        (),
        description="Names of experts that are each asked about every test question, and what they are worth; who has "
        "recorded answers also plays alone and never asks.",
    )
    prompted: PromptedConfig = PromptedConfig()
    prices: tuple[Price, ...] = Field(
        (), description="Further prices at which agents and baselines are scored; agents that see the price play anew."
    )
    notes: tuple[str, ...] = Field((), description="Sentences that the report carries.")

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _model_is_named(self) -> EvaluateConfig:
        if "prompted" in self.agents and not self.prompted.model:
            raise ValueError(
                "agents has prompted, but prompted.model is missing; name a model: evaluate.prompted.model=NAME"
            )
        return self
