"""What a run can be told: YAML files, `a.b=value` on the command line, and checks that name the nearest right key."""

from agile.config.evaluate import PromptedConfig
from agile.config.expert import GOLD, ExpertConfig
from agile.config.file import differences, flat, load_config, load_section
from agile.config.learner import LearnerConfig, TrainingConfig
from agile.config.rollout import RolloutConfig
from agile.config.run import RunConfig
from agile.config.training import GuardConfig, PPOConfig, PreferenceStageConfig, UpdateConfig

__all__ = [
    "GOLD",
    "ExpertConfig",
    "GuardConfig",
    "LearnerConfig",
    "PPOConfig",
    "PreferenceStageConfig",
    "PromptedConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainingConfig",
    "UpdateConfig",
    "differences",
    "flat",
    "load_config",
    "load_section",
]
