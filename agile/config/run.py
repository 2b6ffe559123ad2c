"""The whole of a config, and what its sections must agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agile.config.evaluate import AGENTS, BASELINES, EvaluateConfig
from agile.config.expert import GOLD, ExpertConfig
from agile.config.learner import TrainingConfig
from agile.config.rollout import ModelConfig, RolloutConfig, VLLMConfig
from agile.config.section import Section
from agile.config.serve import ServeConfig
from agile.config.task import AgentConfig, MemoryConfig, PromptConfig, TaskConfig
from agile.config.training import (
    DPOConfig,
    GuardConfig,
    PPOConfig,
    PreferencesConfig,
    RewardModelConfig,
    SFTConfig,
    ValidationConfig,
)


class DemoConfig(Section):
    shuffle_rewards: bool = Field(False, description="Control: gives every session another session's reward.")


class RunConfig(TrainingConfig):
    """Everything a run can be told."""

    stages: tuple[Literal["sft", "ppo", "dpo", "reward-model"], ...] = Field(
        ("sft", "ppo"), description="What `agile train` does, in this order."
    )
    task: TaskConfig = TaskConfig()
    experts: dict[str, ExpertConfig] = Field(
        {}, description="Whom the agent can ask, by name; `gold`, who knows the gold answers, is always among them."
    )
    expert: str = Field(GOLD, description="Which of them advises.")
    agent: AgentConfig = AgentConfig()
    memory: MemoryConfig = MemoryConfig()
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VLLMConfig = VLLMConfig()
    sft: SFTConfig = SFTConfig()
    ppo: PPOConfig = PPOConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DPOConfig = DPOConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    validation: ValidationConfig = ValidationConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    demo: DemoConfig = DemoConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def plays(self) -> bool:
        """Whether PPO has anything to do."""
        return "ppo" in self.stages and self.ppo.num_iterations > 0

    @property
    def swaps_adapters(self) -> bool:
        """Whether vLLM gets adapters alone: it runs in this process, and no rows of action tokens learn beside them."""
        merged = self.vllm.adapters == "merge" or self.prompt.special_tokens
        return self.rollout.policy == "vllm" and self.lora is not None and not merged

    @model_validator(mode="after")
    def _stages_follow(self) -> RunConfig:
        order = ("sft", "ppo", "dpo", "reward-model")
        if not self.stages or list(self.stages) != sorted(set(self.stages), key=order.index):
            raise ValueError(
                f"stages are {list(self.stages)}, expected one or more of {list(order)}, each once and in this order"
            )
        if "ppo" in self.stages and "sft" not in self.stages:
            raise ValueError("stages has ppo without sft, which PPO starts from; sft.num_steps=0 skips its training")
        if {"dpo", "reward-model"} & set(self.stages):
            if "sft" not in self.stages and self.model.path is None:
                raise ValueError("stages trains on preferences alone, but model.path names no agent to start from")
            if self.preferences.data is None and not self.plays:
                raise ValueError(
                    "stages trains on preferences, but there are no sessions of PPO to take them from; give a file of "
                    "`agile preferences`: preferences.data=FILE"
                )
        return self

    @model_validator(mode="after")
    def _preferences_are_trained_by_trl(self) -> RunConfig:
        engine, by_trl = self.engine, [stage for stage in self.stages if stage in ("dpo", "reward-model")]
        if not by_trl:
            return self
        for key, value, ignored in (
            ("lora", "an adapter", self.lora is not None),
            ("engine.zero_stage", engine.zero_stage, engine.zero_stage > 1),
            ("engine.offload", engine.offload, engine.offload != "none"),
        ):
            if ignored:
                raise ValueError(
                    f"stages has {by_trl[0]}, where TRL trains all weights in one process and on one device, but {key} "
                    f"is {value}; leave {key} out, or train on preferences in a run of its own without it: "
                    f"stages=[{by_trl[0]}] model.path=RUN/ppo preferences.data=FILE"
                )
        return self

    @model_validator(mode="after")
    def _experts_are_known(self) -> RunConfig:
        known = sorted({GOLD, *self.experts})
        named = {"expert": [self.expert], "evaluate.experts": self.evaluate.experts}
        named["serve.fallback"] = [self.serve.fallback] if self.serve.fallback else []
        for key, names in named.items():
            for name in names:
                if name not in known:
                    raise ValueError(f"{key} names {name!r}, but experts has {', '.join(known)}; add it to experts")
        if taken := sorted({*self.evaluate.experts} & {*AGENTS, *BASELINES}):
            raise ValueError(
                f"evaluate.experts names {taken[0]!r}, an agent's name in the report; call the expert otherwise"
            )
        if self.sft.stronger_model is not None:
            stronger = self.experts.get(self.sft.stronger_model)
            if stronger is None or stronger.kind not in ("recorded", "model"):
                raise ValueError(
                    f"sft.stronger_model names {self.sft.stronger_model!r}, expected one of experts that is recorded "
                    "or a model"
                )
        return self

    @model_validator(mode="after")
    def _desks_are_waited_for(self) -> RunConfig:
        limit = self.rollout.max_stage_s
        for name, expert in self.experts.items():
            if expert.kind == "desk" and limit is not None and (expert.timeout_s is None or expert.timeout_s >= limit):
                raise ValueError(
                    f"experts.{name} is a desk with timeout_s {expert.timeout_s}, but rollout.max_stage_s ends a "
                    f"session whose expert takes {limit:g} s; set timeout_s below it, or max_stage_s=null"
                )
            known = {GOLD} | {n for n, other in self.experts.items() if other.kind != "desk"}
            if expert.fallback is not None and expert.fallback not in known:
                raise ValueError(
                    f"experts.{name}.fallback names {expert.fallback!r}, expected one of experts that is no desk: "
                    f"{', '.join(sorted(known))}"
                )
        return self

    @model_validator(mode="after")
    def _guard_sees_what_it_limits(self) -> RunConfig:
        guard, of_score = self.guard, ("min_score", "max_score_drop")
        watches = {
            "validation.every": self.validation.every > 0,
            **{
                f"guard.{n}": getattr(guard, n) is not None for n in ("max_kl", "min_entropy", "max_entropy", *of_score)
            },
            "guard.action": guard.action == "rollback",
        }
        if "ppo" not in self.stages and (set_keys := [key for key, is_set in watches.items() if is_set]):
            raise ValueError(
                f"{' and '.join(set_keys)} watch over PPO, but stages has no ppo; leave them out, or add ppo to stages"
            )
        if guard.max_kl is not None and self.ppo.kl_coef == 0:
            raise ValueError("guard.max_kl is set, but ppo.kl_coef is 0, so that no reference is kept; set it above 0")
        for name in of_score:
            if getattr(guard, name) is not None and not self.validation.every:
                raise ValueError(f"guard.{name} is set, but nothing is validated; set validation.every=1")
        if guard.action == "finish" and not self.validation.select_best:
            raise ValueError(
                "guard.action is finish, which keeps the agent that scored best, but validation.select_best is false; "
                "set validation.select_best=true, or guard.action=stop"
            )
        if guard.action == "rollback" and self.rollout.lag:
            raise ValueError(
                f"guard.action is rollback, but rollout.lag is {self.rollout.lag}: what was collected ahead is of "
                "weights that a rollback drops; set rollout.lag=0 or guard.action=stop"
            )
        return self

    @model_validator(mode="after")
    def _critic_is_asked(self) -> RunConfig:
        if self.model.critic == "separate" and self.ppo.estimator != "gae":
            raise ValueError(
                f"model.critic is separate, a second trunk, but ppo.estimator is {self.ppo.estimator}, which asks no "
                "critic; set model.critic=shared, which costs nothing, or ppo.estimator=gae"
            )
        return self

    @model_validator(mode="after")
    def _adapters_stand_beside_a_trained_trunk(self) -> RunConfig:
        if self.lora is not None and self.model.path is None:
            raise ValueError(
                "lora trains a few weights beside frozen ones, but without model.path these are random; set "
                "model.path=MODEL, or leave lora out"
            )
        if self.lora is not None and self.model.critic == "separate":
            raise ValueError(
                "lora trains a few weights beside a frozen trunk, but model.critic is separate, which trains a second "
                "trunk whole; set model.critic=shared, or leave lora out"
            )
        return self

    @model_validator(mode="after")
    def _messages_are_shown_as_they_are(self) -> RunConfig:
        if (self.task.name == "rft") != (self.prompt.format == "messages"):
            raise ValueError(
                f"task.name is {self.task.name}, but prompt.format is {self.prompt.format}: rows of messages, which "
                "task rft has, are shown by prompt.format=messages prompt.special_tokens=false, and nothing else is"
            )
        if self.task.imitation_data is None and self.task.name == "rft" and self.sft.num_steps:
            raise ValueError(
                f"sft.num_steps is {self.sft.num_steps}, but there are no rows to imitate; give them "
                "(task.imitation_data=FILE), or set sft.num_steps=0"
            )
        return self

    @model_validator(mode="after")
    def _price_is_seen(self) -> RunConfig:
        varies = self.task.first_price is not None or set(self.task.training_prices) - {self.task.advice_price}
        if varies and self.prompt.instructions != "none" and not self.agent.show_price:
            raise ValueError(
                "the price of advice changes in training, but prompt.instructions tell one price, task.advice_price; "
                "set agent.show_price=true"
            )
        if len(set(self.task.training_prices)) > 1 and not self.agent.show_price:
            raise ValueError(
                f"task.training_prices are {list(self.task.training_prices)}, but the agent does not see which of them "
                "holds; set agent.show_price=true"
            )
        return self

    @model_validator(mode="after")
    def _servers_are_given(self) -> RunConfig:
        if self.rollout.policy == "vllm-server":
            for name in ("servers", "weights_dir"):
                if not getattr(self.vllm, name):
                    raise ValueError(f"rollout.policy is vllm-server, but vllm.{name} is missing; see docs/vllm.md")
        return self
