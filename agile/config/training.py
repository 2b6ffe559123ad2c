"""Sections about training, and about what watches over it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agile.config.evaluate import PromptedConfig
from agile.config.section import Count, Section, Share, UserPath


class EngineConfig(Section):
    """How DeepSpeed trains, see docs/training.md."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="What is sharded over the processes: nothing, optimizer state, gradients too, parameters too."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="What lies in the memory of the CPU: nothing, the optimizer's state, parameters too."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the model computes in; AdamW keeps weights in float32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute layers again for the gradient: a third slower, a fraction of the activations."
    )

    @model_validator(mode="after")
    def _zero_supports_it(self) -> EngineConfig:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload is {self.offload}, which ZeRO supports from stage {least}, but zero_stage is "
                f"{self.zero_stage}; set engine.zero_stage={least}, or engine.offload=none"
            )
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "dtype is bfloat16, whose weights in float32 ZeRO keeps from stage 1, but zero_stage is 0; set "
                "engine.zero_stage=1, which costs nothing in one process"
            )
        return self


class OptimizerConfig(Section):
    lr: float = Field(gt=0)
    batch_size: Count = Field(description="Sequences per optimizer step.")
    micro_batch_tokens: Count = Field(
        4096, description="Most tokens of a forward pass, which holds no padding; a longer sequence is alone."
    )
    share_prefixes: bool = Field(
        True,
        description="Whether what sequences of a pass begin with in common, 16 tokens or more, is computed once.",
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class SFTConfig(OptimizerConfig):
    lr: float = Field(4e-3, gt=0)
    batch_size: Count = 64
    num_steps: int = Field(2000, ge=0, description="Optimizer steps.")
    checkpoint_every: Count = Field(500, description="Optimizer steps between checkpoints.")
    sessions_per_item: Count = Field(4, description="Imitation sessions of each question, with different memories.")
    judge_yes: Share = Field(
        0.4,
        description="How often the teacher's answerability judge lets a predictable question pass that nothing in "
        "sight answers: what gives RL something to explore.",
    )
    stronger_model: str | None = Field(
        None,
        description="medmcqa: who of `experts` has recorded answers to the train questions, or is a model that `agile "
        "sft-data` asks: the teacher answers where it is right and asks where it is wrong, in place of judge_yes.",
    )
    warmup_steps: int = Field(100, ge=0)
    data: UserPath | None = Field(
        None, description="File of `agile sft-data`, or its folder; by default the sessions are played at the start."
    )
    teacher: PromptedConfig | None = Field(
        None, description="A model whose sessions `agile sft-data` keeps where they are right; null for the task's own."
    )

    judge: PromptedConfig | None = Field(
        None,
        description="A model that tells `agile sft-data` which questions can be answered without an expert, in place "
        "of judge_yes; null for that.",
    )

    @model_validator(mode="after")
    def _models_are_named(self) -> SFTConfig:
        for name, model in (("teacher", self.teacher), ("judge", self.judge)):
            if model is not None and not model.model:
                raise ValueError(f"{name} has no model; name one: sft.{name}.model=NAME")
        others = [name for name in ("teacher", "stronger_model") if getattr(self, name) is not None]
        if self.judge is not None and others:
            raise ValueError(f"judge and {others[0]} both say what needs no expert; leave one of them out")
        return self


class UpdateConfig(OptimizerConfig):
    """How one iteration of PPO learns from what was played."""

    lr: float = Field(3e-4, gt=0)
    value_lr: float = Field(
        3e-3, gt=0, description="Learning rate of the critic: the value head, and its own trunk where it has one."
    )
    batch_size: Count = 64
    num_epochs: Count = 2
    max_epoch_kl: float | None = Field(
        None, gt=0, description="KL to the old policy, nats a token, at which a minibatch ends the epochs; None: never."
    )
    estimator: Literal["gae", "group", "reinforce++"] = Field(
        "gae", description="Of advantages: with a critic, over rollouts of the same question, or returns alone."
    )
    gamma: Share = Field(1.0, description="Discount inside a session.")
    lam: Share = Field(1.0, description="GAE lambda inside a session.")
    clip: float = Field(0.2, gt=0)
    value_clip: float | None = Field(
        None, gt=0, description="How far an iteration may move a value, in units of the return; null for any distance."
    )
    value_coef: float = Field(0.5, ge=0)
    kl_coef: float = Field(0.01, ge=0)
    kl_target: float | None = Field(
        None, gt=0, description="KL to the reference, nats a token, that kl_coef is adapted to; None keeps kl_coef."
    )
    reference: Literal["keep", "offload"] = Field(
        "keep",
        description="Where the reference policy lies: on the training device, or in the memory of the CPU but while it "
        "scores. There is none if kl_coef is 0; with lora it is the model without its adapter.",
    )
    entropy_coef: float = Field(0.0, ge=0)
    max_importance_weight: float = Field(2.0, gt=0, description="Truncates the rollout-trainer correction.")
    value_warmup_epochs: int = Field(
        6, ge=0, description="Epochs of the first iteration, which trains the critic alone."
    )
    checkpoint_every: Count = Field(5, description="Iterations between checkpoints.")

    @model_validator(mode="after")
    def _kl_can_be_weighed(self) -> UpdateConfig:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target is set, but kl_coef is 0, from which nothing grows; set kl_coef above 0")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> UpdateConfig:
        if self.estimator == "gae":
            if self.value_coef == 0:
                raise ValueError(
                    "estimator is gae, which measures actions against a critic, but value_coef is 0, with which none "
                    "learns; set ppo.value_coef above 0, or ppo.estimator=reinforce++"
                )
            return self
        for name in ("value_coef", "value_warmup_epochs"):
            if getattr(self, name):
                raise ValueError(
                    f"estimator is {self.estimator}, which has no critic, but {name} is {getattr(self, name):g}; "
                    f"set ppo.{name}=0"
                )
        if self.estimator == "group" and self.gamma != 1:
            raise ValueError(
                f"estimator is group, which gives all tokens of a session one advantage, but gamma is {self.gamma:g}; "
                "set gamma to 1"
            )
        return self


class PPOConfig(UpdateConfig):
    num_iterations: int = Field(20, ge=0, description="Rounds of collecting and learning.")
    streams_per_iteration: Count = Field(48, description="Streams played in each.")
    rollouts_per_stream: Count = Field(
        1, description="Times each of these streams is played, with memories of their own; group compares them."
    )
    lr_schedule: Literal["constant", "linear"] = Field(
        "constant", description="Of all learning rates over the iterations; linear goes to 0."
    )
    gamma_session: Share = Field(0.0, description="Discount from a session to the next of its stream.")
    lam_session: Share = Field(0.0, description="GAE lambda across sessions.")
    credit: Literal["none", "utility", "chain", "lineage"] = Field("none", description="Credit through memory.")
    utility_beta: float = Field(0.1, ge=0)
    utility_similarity: float = Field(0.46, description="Cosine from which questions count as similar.")

    @model_validator(mode="after")
    def _policy_learns(self) -> PPOConfig:
        if self.num_iterations == 1 and self.value_warmup_epochs:
            raise ValueError(
                f"num_iterations is 1, but the first iteration trains the critic alone (value_warmup_epochs is "
                f"{self.value_warmup_epochs}): the policy would learn nothing; set ppo.num_iterations=2 or more, or "
                "ppo.value_warmup_epochs=0"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_are_compared(self) -> PPOConfig:
        if self.estimator == "group" and self.rollouts_per_stream == 1:
            raise ValueError(
                "estimator is group, which compares rollouts of one stream, but rollouts_per_stream is 1; set it to 2 "
                "or more"
            )
        return self

    @model_validator(mode="after")
    def _credit_reaches(self) -> PPOConfig:
        if self.credit == "lineage" and self.estimator != "gae":
            raise ValueError(
                f"credit is lineage, which asks the critic, but estimator is {self.estimator}, which has none; "
                "set estimator to gae, or credit to utility or chain"
            )
        if self.credit == "chain" and self.gamma_session == 0:
            raise ValueError("credit is chain, which carries value from session to session; set gamma_session above 0")
        if self.credit in ("none", "utility") and self.gamma_session:
            raise ValueError(
                f"credit is {self.credit}, which carries nothing from session to session, but gamma_session is "
                f"{self.gamma_session:g}; set gamma_session to 0, or credit to chain or lineage"
            )
        if self.credit == "lineage" and self.gamma_session == 0:
            raise ValueError("credit is lineage, which discounts by gamma_session per session; set it above 0")
        if self.credit == "lineage" and self.gamma != 1:
            raise ValueError(
                f"credit is lineage, which compares rewards with the critic's values, but gamma is {self.gamma:g}, "
                "which discounts the values alone; set gamma to 1"
            )
        if self.credit == "lineage" and self.value_warmup_epochs == 0:
            raise ValueError(
                "credit is lineage, which measures sessions against the critic, but value_warmup_epochs is 0; "
                "give the critic a start"
            )
        return self


class PreferencesConfig(Section):
    """Pairs of a right and a wrong answer, for the stages dpo and reward-model."""

    data: UserPath | None = Field(
        None, description="File of `agile preferences`, or of the same format; by default the run's own sessions."
    )
    gold: bool = Field(False, description="Own sessions: take the task's answer where no expert was asked.")
    held_out: Share = Field(0.1, description="Share of the pairs that is evaluated on and not trained on.")


class PreferenceStageConfig(Section):
    """What TRL's trainers are told."""

    lr: float = Field(gt=0)
    batch_size: Count = Field(16, description="Pairs per optimizer step.")
    micro_batch_size: Count = Field(16, description="Pairs per forward pass; divides batch_size.")
    num_epochs: Count = 1
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _pairs_divide(self) -> PreferenceStageConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "choose one that does, they are accumulated"
            )
        return self


class DPOConfig(PreferenceStageConfig):
    lr: float = Field(1e-6, gt=0)
    beta: float = Field(0.1, gt=0, description="How strongly the agent is held to the one it starts from.")


class RewardModelConfig(PreferenceStageConfig):
    lr: float = Field(1e-4, gt=0)


class CheckpointsConfig(Section):
    """What stays of a run on its way, beside `sft.checkpoint_every` and `ppo.checkpoint_every`."""

    every_minutes: float | None = Field(
        None, gt=0, description="Minutes after which a step or iteration ends with a further checkpoint; null for none."
    )
    keep: Count = Field(2, description="Last checkpoints that stay; the best by validation stays too.")


class ValidationConfig(Section):
    """Greedy play of train streams that nothing is learned from."""

    every: int = Field(0, ge=0, description="Iterations of PPO between; 0 for none.")
    start: bool = Field(False, description="Whether also before the first one: the best agent may be PPO's start.")
    num_streams: Count | None = Field(
        None, description="The last train streams, set aside for it; by default a tenth of them, 1 to 8."
    )
    select_best: bool = Field(False, description="Whether ppo/ is the agent that scored best in it, not the last one.")

    @model_validator(mode="after")
    def _best_is_known(self) -> ValidationConfig:
        for name in ("select_best", "start"):
            if getattr(self, name) and not self.every:
                raise ValueError(f"{name} is true, but every is 0, so nothing is validated; set validation.every=1")
        return self


class GuardConfig(Section):
    """What PPO must not do, and what follows if it does; see docs/watching.md."""

    max_kl: float | None = Field(None, gt=0, description="KL to the reference policy, nats per token; null for none.")
    min_entropy: float | None = Field(None, gt=0, description="Entropy of the policy, nats per token; null for none.")
    max_entropy: float | None = Field(None, gt=0, description="The same from above: a policy that unlearns.")
    min_score: float | None = Field(None, description="Validation score that must not be fallen below; null for none.")
    max_score_drop: float | None = Field(
        None, gt=0, description="Fall of the validation score below its best so far; null for none."
    )
    action: Literal["stop", "rollback", "finish"] = Field(
        "stop",
        description="End the run, go on from the weights of the last checkpoint within the limits, or end PPO there "
        "and keep the agent that scored best in validation.",
    )
    max_rollbacks: Count = Field(2, description="Rollbacks after which the run stops.")
    max_grad_norm: float | None = Field(
        None, gt=0, description="Gradient norm before clipping above which a step is skipped; null for none."
    )
    max_skipped_steps: Count = Field(
        5, description="Steps in a row, of a gradient that is not finite or too large, after which the run stops."
    )

    @model_validator(mode="after")
    def _leaves_a_range(self) -> GuardConfig:
        if self.min_entropy is not None and self.max_entropy is not None and self.min_entropy >= self.max_entropy:
            raise ValueError(
                f"min_entropy {self.min_entropy:g} is not below max_entropy {self.max_entropy:g}, so that no policy "
                "is within them; set a lower one, or null"
            )
        return self


class TrackingConfig(Section):
    """Where the numbers of metrics.jsonl go besides; what they mean says docs/metrics.md."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description='W&B and MLflow are extras, `pip install -e ".[wandb]"`.'
    )
    project: str = Field("agile", description="W&B's project, MLflow's experiment.")
    name: str | None = Field(None, description="How the run is shown; by default as its folder is called.")
