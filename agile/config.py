"""What a run can be told: YAML files, `a.b=value` on the command line, and checks that name the nearest right key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agile.errors import AgileError
from agile.types import BLAMELESS, SessionStatus

Price = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]  # no shell expands the ~ of task.data=~/x


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(_Config):
    name: Literal["minishop", "productqa"] = Field("minishop", description="Generated worlds, or official files.")
    data: UserPath | None = Field(None, description="Folder of the files; minishop writes its own without it.")
    advice_price: Price = Field(0.3, description="What one piece of advice costs, in units of a right answer.")
    training_prices: tuple[Price, ...] = Field(
        (), description="In training each stream draws its price from these; by default advice_price."
    )
    first_price: Price | None = Field(
        None,
        description="Price in the first iteration of PPO, from where it goes straight to advice_price in the last.",
    )
    train_groups: tuple[str, ...] | None = Field(None, description="Train groups to use; all by default.")
    test_groups: tuple[str, ...] | None = Field(None, description="Test groups to use; all by default.")
    max_items: Count | None = Field(None, description="Questions to use of each group, from its start.")
    num_train_worlds: Count = Field(64, description="MiniShop: worlds to train on.")
    num_test_worlds: Count = Field(32, description="MiniShop: unseen worlds to test on.")
    num_questions: Count = Field(40, description="MiniShop: questions of a world.")

    @model_validator(mode="after")
    def _one_way_to_price(self) -> TaskConfig:
        if self.training_prices and self.first_price is not None:
            raise ValueError(
                "both training_prices (drawn per stream) and first_price (a schedule) are set; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _data_is_given(self) -> TaskConfig:
        if self.name == "productqa" and self.data is None:
            raise ValueError("data is missing; give the folder of ProductQA's files: task.data=DIR")
        return self


class AgentConfig(_Config):
    product_k: int = Field(1, ge=0, description="Entries of the product's own history in the prompt.")
    group_k: int = Field(0, ge=0, description="Entries of the whole group's history in the prompt.")
    knowledge_k: int = Field(1, ge=0, description="Entries of the group's knowledge in the prompt.")
    show_schema: bool = Field(False, description="Whether the prompt lists the table's columns.")
    show_price: bool = Field(
        False, description="Whether the prompt says what advice costs, so that one policy can serve every price."
    )


class MemoryConfig(_Config):
    encoder: str = Field("all-MiniLM-L6-v2", description="Sentence-transformers name or path, or `hashing`.")
    cache: UserPath | None = Field(None, description="SQLite file that keeps embeddings; by default in the run folder.")


class ModelConfig(_Config):
    """A model of one's own (`path`), or a small Llama from scratch."""

    path: Annotated[str, AfterValidator(os.path.expanduser)] | None = Field(
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


class LoRAConfig(_Config):
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


class PromptConfig(_Config):
    """How prompts are written as tokens."""

    format: Literal["plain", "chat"] = Field("plain", description="Text alone, or the model's own chat template.")
    special_tokens: bool = Field(True, description="Whether an action's name is one special token, or plain text.")
    instructions: Literal["none", "system", "user"] = Field(
        "none",
        description="Where the table of actions and prices is told: nowhere, in a system turn (chat), or before the "
        "first text of each context.",
    )
    thinking: Literal["keep", "cut"] = Field(
        "keep", description="Whether thinking blocks stay in the context; cut starts a new context window after each."
    )
    template_options: dict[str, Any] = Field({}, description="Variables of the chat template, as enable_thinking.")

    @model_validator(mode="after")
    def _fits_the_format(self) -> PromptConfig:
        if self.format == "plain" and self.instructions == "system":
            raise ValueError(
                "instructions is system, but format is plain, which has no turns; set instructions to user"
            )
        return self


class VLLMConfig(_Config):
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
    servers: tuple[str, ...] = Field((), description="Addresses of the servers, such as http://127.0.0.1:8000.")
    name: str = Field("agile", description="What the servers call the model.")
    weights_dir: UserPath | None = Field(
        None, description="Folder for new weights, under the same path here and on every server."
    )
    timeout_s: float = Field(300, gt=0, description="How long a request may go unanswered before the run ends.")


class RolloutConfig(_Config):
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


class EngineConfig(_Config):
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


class OptimizerConfig(_Config):
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
    warmup_steps: int = Field(100, ge=0)


class PPOConfig(OptimizerConfig):
    lr: float = Field(3e-4, gt=0)
    value_lr: float = Field(
        3e-3, gt=0, description="Learning rate of the critic: the value head, and its own trunk where it has one."
    )
    batch_size: Count = 64
    num_iterations: int = Field(20, ge=0, description="Rounds of collecting and learning.")
    streams_per_iteration: Count = Field(48, description="Streams played in each.")
    rollouts_per_stream: Count = Field(
        1, description="Times each of these streams is played, with memories of their own; group compares them."
    )
    num_epochs: Count = 2
    max_epoch_kl: float | None = Field(
        None, gt=0, description="KL to the old policy, nats a token, at which a minibatch ends the epochs; None: never."
    )
    lr_schedule: Literal["constant", "linear"] = Field(
        "constant", description="Of all learning rates over the iterations; linear goes to 0."
    )
    estimator: Literal["gae", "group", "reinforce++"] = Field(
        "gae", description="Of advantages: with a critic, over rollouts of the same question, or returns alone."
    )
    gamma: Share = Field(1.0, description="Discount inside a session.")
    lam: Share = Field(1.0, description="GAE lambda inside a session.")
    gamma_session: Share = Field(0.0, description="Discount from a session to the next of its stream.")
    lam_session: Share = Field(0.0, description="GAE lambda across sessions.")
    credit: Literal["none", "utility", "chain", "lineage"] = Field("none", description="Credit through memory.")
    utility_beta: float = Field(0.1, ge=0)
    utility_similarity: float = Field(0.46, description="Cosine from which questions count as similar.")
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
    def _kl_can_be_weighed(self) -> PPOConfig:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target is set, but kl_coef is 0, from which nothing grows; set kl_coef above 0")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> PPOConfig:
        if self.estimator == "gae":
            return self
        for name in ("value_coef", "value_warmup_epochs"):
            if getattr(self, name):
                raise ValueError(
                    f"estimator is {self.estimator}, which has no critic, but {name} is {getattr(self, name):g}; "
                    f"set ppo.{name}=0"
                )
        if self.credit == "lineage":
            raise ValueError(
                f"credit is lineage, which asks the critic, but estimator is {self.estimator}, which has none; "
                "set estimator to gae, or credit to utility or chain"
            )
        if self.estimator == "group" and self.rollouts_per_stream == 1:
            raise ValueError(
                "estimator is group, which compares rollouts of one stream, but rollouts_per_stream is 1; set it to 2 "
                "or more"
            )
        if self.estimator == "group" and self.gamma != 1:
            raise ValueError(
                f"estimator is group, which gives all tokens of a session one advantage, but gamma is {self.gamma:g}; "
                "set gamma to 1"
            )
        return self

    @model_validator(mode="after")
    def _credit_reaches(self) -> PPOConfig:
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


class PreferencesConfig(_Config):
    """Pairs of a right and a wrong answer, for the stages dpo and reward-model."""

    data: UserPath | None = Field(
        None, description="File of `agile preferences`, or of the same format; by default the run's own sessions."
    )
    gold: bool = Field(False, description="Own sessions: take the task's answer where no expert was asked.")
    held_out: Share = Field(0.1, description="Share of the pairs that is evaluated on and not trained on.")


class PreferenceStageConfig(_Config):
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


class CheckpointsConfig(_Config):
    """What stays of a run on its way, beside `sft.checkpoint_every` and `ppo.checkpoint_every`."""

    every_minutes: float | None = Field(
        None, gt=0, description="Minutes after which a step or iteration ends with a further checkpoint; null for none."
    )
    keep: Count = Field(2, description="Last checkpoints that stay; the best by validation stays too.")


class ValidationConfig(_Config):
    """Greedy play of train streams that nothing is learned from."""

    every: int = Field(0, ge=0, description="Iterations of PPO between; 0 for none.")
    num_streams: Count = Field(8, description="The last train streams, set aside for it.")
    select_best: bool = Field(False, description="Whether ppo/ is the agent that scored best in it, not the last one.")

    @model_validator(mode="after")
    def _best_is_known(self) -> ValidationConfig:
        if self.select_best and not self.every:
            raise ValueError("select_best is true, but every is 0, so nothing is validated; set validation.every=1")
        return self


class GuardConfig(_Config):
    """What PPO must not do, and what follows if it does; see docs/watching.md."""

    max_kl: float | None = Field(None, gt=0, description="KL to the reference policy, nats per token; null for none.")
    min_entropy: float | None = Field(None, gt=0, description="Entropy of the policy, nats per token; null for none.")
    max_score_drop: float | None = Field(
        None, gt=0, description="Fall of the validation score below its best so far; null for none."
    )
    action: Literal["stop", "rollback"] = Field(
        "stop", description="End the run, or go on from the weights of the last checkpoint within the limits."
    )
    max_rollbacks: Count = Field(2, description="Rollbacks after which the run stops.")
    max_grad_norm: float | None = Field(
        None, gt=0, description="Gradient norm before clipping above which a step is skipped; null for none."
    )
    max_skipped_steps: Count = Field(
        5, description="Steps in a row, of a gradient that is not finite or too large, after which the run stops."
    )


class TokenPrices(_Config):
    """Money for a million tokens, in any currency."""

    input: float = Field(0.0, ge=0)
    cached_input: float | None = Field(None, ge=0, description="Input that the endpoint had cached; None: as input.")
    output: float = Field(0.0, ge=0)


class PromptedConfig(_Config):
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


class EvaluateConfig(_Config):
    baselines: tuple[Literal["always_ask", "never_ask", "router", "recall", "oracle"], ...] = (
        "always_ask",
        "never_ask",
        "router",
        "recall",
        "oracle",
    )
    agents: tuple[Literal["sft", "ppo", "dpo", "prompted"], ...] = ("sft", "ppo", "dpo")
    checkpoint: UserPath | None = Field(None, description="Run folder whose agents `agile bench` scores.")
    prompted: PromptedConfig = PromptedConfig()
    prices: tuple[Price, ...] = Field(
        (), description="Further prices at which agents and baselines are scored; agents that see the price play anew."
    )
    notes: tuple[str, ...] = Field((), description="Sentences that the report carries.")

    @model_validator(mode="after")
    def _model_is_named(self) -> EvaluateConfig:
        if "prompted" in self.agents and not self.prompted.model:
            raise ValueError(
                "agents has prompted, but prompted.model is missing; name a model: evaluate.prompted.model=NAME"
            )
        return self


class TrackingConfig(_Config):
    """Where the numbers of metrics.jsonl go besides; what they mean says docs/metrics.md."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description='W&B and MLflow are extras, `pip install -e ".[wandb]"`.'
    )
    project: str = Field("agile", description="W&B's project, MLflow's experiment.")
    name: str | None = Field(None, description="How the run is shown; by default as its folder is called.")


class DemoConfig(_Config):
    shuffle_rewards: bool = Field(False, description="Control: gives every session another session's reward.")


class RunConfig(_Config):
    """Everything a run can be told."""

    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, description="CPU threads of torch.")
    stages: tuple[Literal["sft", "ppo", "dpo", "reward-model"], ...] = Field(
        ("sft", "ppo"), description="What `agile train` does, in this order."
    )
    task: TaskConfig = TaskConfig()
    agent: AgentConfig = AgentConfig()
    memory: MemoryConfig = MemoryConfig()
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig | None = Field(None, description="null trains all weights.")
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VLLMConfig = VLLMConfig()
    engine: EngineConfig = EngineConfig()
    sft: SFTConfig = SFTConfig()
    ppo: PPOConfig = PPOConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DPOConfig = DPOConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    validation: ValidationConfig = ValidationConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    demo: DemoConfig = DemoConfig()

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
            if self.preferences.data is None and ("ppo" not in self.stages or not self.ppo.num_iterations):
                raise ValueError(
                    "stages trains on preferences, but there are no sessions of PPO to take them from; give a file of "
                    "`agile preferences`: preferences.data=FILE"
                )
        return self

    @model_validator(mode="after")
    def _guard_sees_what_it_limits(self) -> RunConfig:
        guard = self.guard
        if guard.max_kl is not None and self.ppo.kl_coef == 0:
            raise ValueError("guard.max_kl is set, but ppo.kl_coef is 0, so that no reference is kept; set it above 0")
        if guard.max_score_drop is not None and not self.validation.every:
            raise ValueError("guard.max_score_drop is set, but nothing is validated; set validation.every=1")
        if guard.action == "rollback" and self.rollout.lag:
            raise ValueError(
                f"guard.action is rollback, but rollout.lag is {self.rollout.lag}: what was collected ahead is of "
                "weights that a rollback drops; set rollout.lag=0 or guard.action=stop"
            )
        return self

    @model_validator(mode="after")
    def _adapters_share_the_trunk(self) -> RunConfig:
        if self.lora is not None and self.model.critic == "separate":
            raise ValueError(
                "lora trains a few weights beside a frozen trunk, but model.critic is separate, which trains a second "
                "trunk whole; set model.critic=shared, or leave lora out"
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


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides and check the result.

    Raises:
        AgileError: The file is missing or not YAML, a key is unknown (with the nearest right one), a value is wrong.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise AgileError(f"{override!r} is not of the form a.b=value, for example ppo.lr=1e-4.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise AgileError(f"{override!r}: {text!r} is not YAML; write a list as [a, b], quote odd text.") from None
        _set(values, key.split("."), value, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        source = "The config" if path is None else f"The config {path}"
        changed = " with " + " ".join(overrides) if overrides else ""
        problems = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise AgileError(f"{source}{changed} cannot be used:\n{problems}") from None


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """`key was ..., is now ...` of every value that differs between two configs of one kind."""
    before, after = (dict(flat(c.model_dump(mode="json"))) for c in (old, new))
    keys = dict.fromkeys([*before, *after])  # a section that may be null has keys in one of them only
    return [f"{k} was {before.get(k)!r}, is now {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(a.b, value)` of every value of a config, as `model_dump` gives it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-4 is a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise AgileError(f"Cannot read the config {path}: {error.strerror}. Give a YAML file, see configs/.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AgileError(f"{path} is not YAML: {error}. Expected sections of keys, see configs/.") from None
    if not isinstance(loaded, dict | None):
        raise AgileError(f"{path} holds a {type(loaded).__name__}, expected a mapping of sections (task:, ppo:, ...).")
    # a section whose keys are all commented out is read as null
    empty: dict[str, Any] = {k: {} for k, f in RunConfig.model_fields.items() if isinstance(f.default, BaseModel)}
    return {k: empty.get(k) if v is None else v for k, v in (loaded or {}).items()}


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise AgileError(f"{override!r}: {key} is a value, not a section. See configs/ for what a config holds.")
    values[keys[-1]] = value


def _explain(error: Any) -> str:
    """One problem in a line: the key, its value, what was expected, and what to write instead."""
    keys = [str(k) for k in error["loc"] if not isinstance(k, int)]
    name = ".".join(keys) or "the file"
    if error["type"] == "extra_forbidden":
        return f"Unknown key {name}. {_nearest(keys)}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "value_error":  # of several keys; it says itself which
        return f"{name}: {message}."
    section = _section(keys[:-1])
    default = section.model_fields[keys[-1]].default if keys else None
    if isinstance(default, BaseModel):
        return f"{name} is {error['input']!r}: expected a section of keys, {', '.join(type(default).model_fields)}."
    if error["type"] == "tuple_type":
        message = "expected a list, [a, b]"
    message = message.partition(", unable to")[0]  # to parse or interpret: the value says so itself
    default = list(default) if isinstance(default, tuple) else default
    return f"{name} is {error['input']!r}: {message}." + ("" if default is None else f" The default is {default!r}.")


def _section(keys: Sequence[str]) -> Any:
    """The model of a section, one that may be null included."""
    section: Any = RunConfig
    for key in keys:
        kind = section.model_fields[key].annotation
        section = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, BaseModel)), kind)
    return section


def _nearest(keys: Sequence[str]) -> str:
    """Which key may have been meant: one of that name in another section, else a similar one in this section."""
    section = _section(keys[:-1])
    elsewhere = [key for key, _ in flat(RunConfig.model_construct().model_dump()) if key.split(".")[-1] == keys[-1]]
    similar = difflib.get_close_matches(keys[-1], section.model_fields, n=1, cutoff=0.5)
    near = elsewhere or [".".join([*keys[:-1], key]) for key in similar]
    return f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(section.model_fields)}."
