"""The agent `prompted` of a config: which endpoint it asks, and what that takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agile.config import PromptedConfig
from agile.tokens import ActionCodec

if TYPE_CHECKING:  # the client takes a second to import, and most runs need none
    from agile.policies.endpoint import Endpoint
    from agile.policies.openai import OpenAIPolicy

CACHE = "answers.sqlite"


def check_key(config: PromptedConfig, section: str = "evaluate.prompted") -> None:
    """Raise `AgileError` if the key that the endpoint needs is not there."""
    from agile.policies.endpoint import read_key

    read_key(config.base_url, config.api_key_env, section)


def open_endpoint(config: PromptedConfig, folder: Path, section: str = "evaluate.prompted") -> Endpoint:
    """The endpoint of a section of the config; its answers are kept in `folder`, or where the config says."""
    from agile.policies.endpoint import Endpoint, Prices

    return Endpoint(
        config.base_url,
        config.model or "",
        api_key_env=config.api_key_env,
        max_concurrent=config.max_concurrent,
        requests_per_minute=config.requests_per_minute,
        timeout_s=config.timeout_s,
        prices=Prices(**config.prices.model_dump()),
        cache=config.cache or folder / CACHE,
        section=section,
    )


def prompted_policy(
    config: PromptedConfig, codec: ActionCodec, price: float, folder: Path, section: str = "evaluate.prompted"
) -> OpenAIPolicy:
    """The policy of a section of the config."""
    from agile.policies.openai import OpenAIPolicy

    return OpenAIPolicy(
        codec,
        price,
        open_endpoint(config, folder, section),
        tools=config.tools,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
    )


def spent(endpoint: Endpoint) -> str:
    """What the requests of this process took, in a few words."""
    usage = endpoint.spent
    money = f", {usage.cost:,.4f} paid" if usage.cost else ""
    return f"{endpoint.num_requests:,} requests, {usage.prompt_tokens + usage.completion_tokens:,} tokens{money}"


def cost_of(advisor: object) -> float:
    """Money that the requests of an expert took in this process; 0 if no model behind an endpoint answers."""
    endpoint: Endpoint | None = getattr(advisor, "endpoint", None)
    return 0.0 if endpoint is None else endpoint.spent.cost
