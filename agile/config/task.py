"""Sections about questions, prompts and memory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from agile.config.evaluate import PromptedConfig
from agile.config.section import Count, Price, Section, UserPath


class GradingConfig(Section):
    """What graders of task rft run with."""

    base_url: str = Field(
        "https://api.openai.com/v1", description="OpenAI-compatible endpoint of the models that grade."
    )
    api_key_env: str | None = Field("OPENAI_API_KEY", description="Variable that holds its key; null for no key.")
    max_concurrent: Count = Field(8, description="Most requests under way at once.")
    time_s: float = Field(120.0, gt=0, description="Limit of a python grader, and of a function.")


class DeskConfig(Section):
    """What people said of served sessions, to learn from."""

    served: UserPath = Field(Path("runs/serve"), description="Folder of agile serve; its database is read.")
    since: datetime | None = Field(None, description="Only what was asked from then on, such as 2026-11-01.")
    until: datetime | None = Field(None, description="Only what was asked before then.")


class TaskConfig(Section):
    desk: DeskConfig | None = Field(
        None, description="Train questions are those that people asked a server; null for the task's own."
    )
    name: Literal["minishop", "productqa", "medmcqa", "hotpotqa", "jsonl", "rft"] = Field(
        "minishop",
        description="Generated worlds, official files, your own questions (docs/your-own-data.md), or files of "
        "reinforcement fine-tuning (docs/rft.md).",
    )
    data: UserPath | None = Field(
        None,
        description="Folder of the files; medmcqa: also a file of train questions or a data set of the package "
        "`datasets`; hotpotqa, jsonl: the file. minishop writes its own without it.",
    )
    test_data: UserPath | None = Field(
        None,
        description="File of test questions; by default dev.json (medmcqa), the last fifth of data (hotpotqa, jsonl).",
    )
    validation_data: UserPath | None = Field(None, description="rft: file of validation rows.")
    imitation_data: UserPath | None = Field(
        None, description="rft: rows whose last message is the assistant's, for imitation before PPO."
    )
    grader: UserPath | None = Field(
        None, description="rft: grader file (docs/graders.md), or a function as module.name."
    )
    response_format: UserPath | None = Field(
        None, description="rft: file of the hosted API's response_format; answers that do not fit are worth 0."
    )
    grading: GradingConfig = GradingConfig()
    stream_by: Literal["file", "subject"] = Field(
        "file", description="medmcqa: one stream of a file, in its order, or one of each subject."
    )
    stream_length: Count | None = Field(
        None, description="medmcqa, hotpotqa, jsonl, desk: most questions of a stream; all by default, hotpotqa 10."
    )
    database: UserPath | None = Field(
        None, description="jsonl: table to search, a file of CSV, JSON or Parquet or a SQLite database."
    )
    search: Literal["dense", "bm25"] = Field(
        "dense", description="hotpotqa: what ranks paragraphs, embeddings of memory.encoder or BM25."
    )
    judge: PromptedConfig | None = Field(
        None, description="hotpotqa: a model that judges answers in reports beside exact match; null for none."
    )
    preload: int = Field(
        0,
        ge=0,
        description="Train questions of other streams, with answers and what they teach, that each memory starts with, "
        "drawn at random.",
    )
    advice_price: Price = Field(0.3, description="What one piece of advice costs, in units of a right answer.")
    training_prices: tuple[Price, ...] = Field(
        (), description="In training each rollout of a stream draws its price from these; by default advice_price."
    )
    first_price: Price | None = Field(
        None,
        description="Price in the first iteration of PPO, from where it goes straight to advice_price in the last.",
    )
    advice_counts: Literal["always", "if_right"] = Field(
        "always",
        description="When an advised session is right: always (the paper's rule), or only if the expert was.",
    )
    skip_bad_rows: bool = Field(False, description="Leave bad rows of the files out and list them; else they end it.")
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
    def _groups_stand_once(self) -> TaskConfig:
        for key, groups in (("train_groups", self.train_groups), ("test_groups", self.test_groups)):
            if groups is not None and len(set(groups)) < len(groups):
                raise ValueError(f"{key} are {', '.join(groups)}, expected each once; remove what stands twice")
        return self

    @model_validator(mode="after")
    def _data_is_given(self) -> TaskConfig:
        if self.name == "rft":
            if missing := [n for n in ("data", "validation_data", "grader") if getattr(self, n) is None]:
                raise ValueError(f"{', '.join(missing)} missing; give the file: task.{missing[0]}=FILE")
            return self
        one_file = self.name in ("hotpotqa", "jsonl")
        files = "the file of questions: task.data=FILE" if one_file else "the folder of its files: task.data=DIR"
        if self.name != "minishop" and self.data is None:
            raise ValueError(f"data is missing; give {files}")
        return self

    @model_validator(mode="after")
    def _judge_is_named(self) -> TaskConfig:
        if self.judge is not None and not self.judge.model:
            raise ValueError("judge has no model; name one: task.judge.model=NAME")
        if self.judge is not None and self.name != "hotpotqa":
            raise ValueError(f"judge is for hotpotqa, whose reports hold what it says, not for {self.name}; remove it")
        return self


class AgentConfig(Section):
    product_k: int = Field(1, ge=0, description="Entries of the product's own history in the prompt.")
    group_k: int = Field(0, ge=0, description="Entries of the whole group's history in the prompt.")
    knowledge_k: int = Field(1, ge=0, description="Entries of the group's knowledge in the prompt.")
    show_schema: bool = Field(False, description="Whether the prompt lists the table's columns.")
    show_price: bool = Field(
        False, description="Whether the prompt says what advice costs, so that one policy can serve every price."
    )
    show_turns: int = Field(
        0, ge=0, description="Earlier turns of a conversation in the prompt of a served question; see docs/serve.md."
    )


class MemoryConfig(Section):
    encoder: str = Field("all-MiniLM-L6-v2", description="Sentence-transformers name or path, or `hashing`.")
    cache: UserPath | None = Field(None, description="SQLite file that keeps embeddings; by default in the run folder.")


class PromptConfig(Section):
    """How prompts are written as tokens."""

    format: Literal["plain", "chat", "messages"] = Field(
        "plain",
        description="Text alone, the model's own chat template around turns, or (rft) a row's messages by it.",
    )
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
        if self.format == "messages" and (self.special_tokens or self.instructions != "none"):
            raise ValueError(
                "format is messages, in which no action is written and nothing is told beside the messages; set "
                "special_tokens to false and instructions to none"
            )
        return self
