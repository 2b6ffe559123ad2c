"""What every training has in common, and the config of `agile.Learner`, whose user plays."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agile.config.rollout import LoRAConfig
from agile.config.section import Count, Section, UserText
from agile.config.training import CheckpointsConfig, EngineConfig, TrackingConfig, UpdateConfig


class TrainingConfig(Section):
    """What a folder of training is about, whoever plays."""

    seed: int = Field(0, ge=0, lt=2**32)
    threads: int | None = Field(None, ge=1, description="CPU threads of torch.")
    lora: LoRAConfig | None = Field(None, description="null trains all weights.")
    engine: EngineConfig = EngineConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tracking: TrackingConfig = TrackingConfig()


class LearnerConfig(TrainingConfig):
    """A model that learns from what its user plays, see docs/gateway.md."""

    model: UserText = Field(description="Hugging Face folder or name.")
    critic: Literal["shared", "separate"] = Field("shared", description="As `model.critic` of a run.")
    temperature: float = Field(1.0, gt=0, description="Of sampling.")
    max_batch_size: Count = Field(256, description="Most sequences sampled at once.")
    ppo: UpdateConfig = UpdateConfig()
