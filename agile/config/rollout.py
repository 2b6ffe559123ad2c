"""Sections about the model, and about what samples from it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from agile.config.section import Count, Section, Share, UserPath, UserText
from agile.types import BLAMELESS, SessionStatus


class ModelConfig(Section):
    """A model of one's own (`path`), or a small Llama from scratch."""

    path: UserText | None = Field(
        None, description="Hugging Face folder or name; None trains a small Llama from scratch."
    )
    tokenizer: Literal["word", "bpe"] = Field("word", description="Tokenizer to train for a model from scratch.")
    vocab_size: Count = Field(4096, description="Largest vocabulary of that tokenizer.")
    num_layers: Count = 2
    hidden_size: Count = 128
    num_heads: Count = 4
    critic: Literal["shared", "separate"] = Field(
        "shared",
        description="Whether the value head reads the policy's trunk, into which it sends no gradient, or a trunk of "
        "its own, a copy of the policy's, which learns with it.",
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 2 * num_heads = {2 * self.num_heads}; "
                "a head needs an even, whole number of dimensions"
            )
        return self


class LoRAConfig(Section):
    """Adapters by peft in place of whole weights, see docs/models.md."""

    rank: Count = Field(16, description="Of the two factors of what is added to each weight.")
    alpha: float = Field(32, gt=0, description="Their product is scaled by alpha / rank.")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",), min_length=1, description="Names, or ends of names, of the linear layers that are adapted."
    )

    @model_validator(mode="before")
    @classmethod
    def _does_not_drop(cls, values: Any) -> Any:
        if isinstance(values, dict) and "dropout" in values:
            raise ValueError(
                f"dropout is {values['dropout']!r}, but with any dropout the policy that learns is not the one that "
                "sampled: its ratio would differ from 1 before the first update; remove it"
            )
        return values


class VLLMConfig(Section):
    """vLLM in this process (`rollout.policy=vllm`) or in servers (`vllm-server`), see docs/vllm.md.

    Servers have options of their own for the cache, memory, blocks and compilation: `agile vllm-server --help`.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="auto: the saved model's.")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Size of the KV cache; vLLM's choice by default. For servers it is their --kv-cache-gib where they "
        "share the GPUs of training, and tells `agile plan` so.",
    )
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="Share of the memory that vLLM may take.")
    enforce_eager: bool = Field(False, description="Compile nothing: starts in seconds; steps are slower on a GPU.")
    block_size: Count | None = Field(None, description="Tokens per block of the prefix cache; vLLM's choice.")
    adapters: Literal["swap", "merge"] = Field(
        "swap",
        description="What vLLM is given where lora trains: the adapter alone, if it can hold all that learns "
        "(docs/models.md), or whole weights with the adapter merged.",
    )
    servers: tuple[str, ...] = Field((), description="Addresses of the servers, such as http://127.0.0.1:8000.")
    name: str = Field("agile", description="What the servers call the model.")
    weights_dir: UserPath | None = Field(
        None, description="Folder for new weights, under the same path here and on every server."
    )
    timeout_s: float = Field(300, gt=0, description="How long a request may go unanswered before the run ends.")


class RolloutConfig(Section):
    policy: Literal["hf", "vllm", "vllm-server"] = Field(
        "hf", description="What samples: transformers, vLLM in this process, or vLLM servers."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of training rollouts.")
    max_batch_size: Count = Field(
        256,
        description="Most sequences sampled at once (hf: and whose keys and values are kept); fewer take less memory.",
    )
    max_turns: Count = 8
    max_context_tokens: Count = 512
    max_session_tokens: Count = 1024
    max_action_tokens: Count = 32
    max_invalid_actions: int = Field(1, ge=0, description="Bad actions answered with an error before a session ends.")
    max_stage_s: float | None = Field(
        600, gt=0, description="Seconds after which a policy, tool, expert or memory is given up and its session ends."
    )
    max_concurrent: Count | None = Field(
        None, description="Streams under way at a time; by default max_batch_size, so that nobody waits for a place."
    )
    max_failed: Share = Field(0.5, description="Share of failed sessions above which a run stops.")
    masked: tuple[SessionStatus, ...] = Field(
        BLAMELESS, description="Sessions that end so are left out of the loss; the others have their reward."
    )
    failed_reward: float | None = Field(None, description="Reward of the failed sessions; by default the task's.")
    lag: int = Field(
        0, ge=0, description="Updates that collection may be behind training; above 0 they run at the same time."
    )
    max_difference: float = Field(
        0.01,
        gt=0,
        description="Largest difference, in nats, between the logprobs of rollout and trainer in float32 and without "
        "lag; above, the weights are not the same and the run stops.",
    )

    @property
    def concurrency(self) -> int:
        return self.max_concurrent or self.max_batch_size

    @model_validator(mode="before")
    @classmethod
    def _does_not_truncate(cls, values: Any) -> Any:
        for name in ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff"):
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name} is {values[name]!r}, but a truncated distribution is not the one that the trainer "
                    "computes, and would bias every importance ratio; remove it and sharpen with rollout.temperature"
                )
        return values
