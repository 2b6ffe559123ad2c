"""The section about serving an agent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agile.config.hours import HoursConfig
from agile.config.section import Count, Section, Share, UserPath, UserText


class ServeConfig(Section):
    """What `agile serve` is told."""

    run: UserPath | None = Field(None, description="Run folder with the trained agent; its config holds too.")
    agent: Literal["sft", "ppo", "dpo"] | None = Field(None, description="Which of its agents; the newest by default.")
    model: str = Field("agile", min_length=1, description="Name of the model in the API.")
    database: UserText | None = Field(
        None, description="URL of the desk's database; by default desk.sqlite in the folder of the server."
    )
    wait_s: float = Field(60, ge=0, description="Seconds that a client which does not stream waits for an answer.")
    keep_alive_s: float = Field(10, gt=0, description="Seconds between signs of life to a client that streams.")
    advice_timeout_s: float | None = Field(
        None, gt=0, description="Seconds that a question waits for an expert; null for as long as it takes."
    )
    hours: HoursConfig | None = Field(None, description="When experts are at the desk; at any time by default.")
    agree: Count = Field(1, description="How many experts must give the same answer.")
    fallback: str | None = Field(None, description="Which of experts is asked where the desk has no answer.")
    webhook_hosts: tuple[str, ...] = Field(
        (), description="Hosts of the own network that webhooks may reach; by default those of the whole network alone."
    )
    claim_s: float = Field(900, gt=0, description="Seconds after which another expert may take a claimed question.")
    join_similarity: Share = Field(
        0.97,
        description="Cosine from which questions that wait about one product are answered together; 1 for same words.",
    )
    max_question_chars: Count = Field(4000, description="Longest question.")
    max_body_bytes: Count = Field(262_144, description="Largest body of a request.")
    requests_per_minute: Count = Field(600, description="Questions of one user in a minute.")
    login_hours: float = Field(12, gt=0, description="How long a login at the desk lasts.")
