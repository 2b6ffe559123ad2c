"""`Learner`: a model that learns from what its user plays, by the same PPO as `agile train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from agile.batching import Row
from agile.chat_format import ChatFormat, for_template
from agile.config import LearnerConfig
from agile.config.file import explained
from agile.credit import Estimator
from agile.engine import Engine
from agile.errors import AgileError
from agile.export import Trained
from agile.lora import add_adapter
from agile.model import ActorCritic, load_lm, load_tokenizer
from agile.policies import HFPolicy
from agile.reference import Reference, adapter_free, frozen
from agile.rollout import status_counts
from agile.run_folder import Place, RunFolder
from agile.stages.ppo import coefficients
from agile.train.kl import KLControl
from agile.train.ppo import Discounts, train_ppo
from agile.train.sft import sft_schedule, train_sft
from agile.types import SegmentEnd, Trajectory


class Learner:
    """A policy, its critic and its optimizer, in a folder that can be killed and resumed after any step.

    `agile train` plays a task; here the user plays, however that is done, and hands over token-exact trajectories with
    their rewards. `agile.Gateway` records them from any agent that speaks OpenAI's API.

    >>> learner = Learner("runs/mine", model="path/to/model", ppo={"lr": 1e-5})  # doctest: +SKIP
    >>> learner.step(trajectories)["kl"]  # doctest: +SKIP

    Args:
        out: Its folder: config, checkpoints, logs of metrics and sessions; `save` writes the model to `<out>/ppo`.
        resume: Go on from the last checkpoint in it.
        settings: Those of `LearnerConfig`; `model`, a Hugging Face folder or name, is needed.

    Attributes:
        policy: Samples with the weights of this moment.
        steps: How many were done.

    Raises:
        AgileError: A setting is wrong, the model cannot be loaded or trained, or the folder holds something else.
    """

    def __init__(self, out: Path | str, *, resume: bool = False, **settings: Any):
        config = self.config = _config(settings)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.run = RunFolder(Path(out), config, resume=resume)
        try:
            self.tokenizer = load_tokenizer(config.model)
            torch.manual_seed(config.seed)
            self.engine = _engine(config, self.tokenizer)
            self._reference = _reference(config, self.engine, self.tokenizer)
            ppo = config.ppo
            self._kl_control = KLControl(ppo.kl_coef, ppo.kl_target)
            self.steps = 0
            if self.run.place is not None:
                self.run.load(self.engine)
                self.steps = self.run.place.step
                self._kl_control.coef = self.run.state["kl_coef"]
            self.policy = HFPolicy(
                self.engine.module.lm, temperature=config.temperature, max_batch_size=config.max_batch_size
            )
            self.policy.update_weights(None, self.steps)
        except BaseException:
            self.run.close(wait=False)
            raise
        self._started = time.monotonic()

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from trajectories: one iteration of PPO; the policy has the new weights afterwards.

        Trajectories of one group, for the estimator `group`, are named `<group>#0`, `<group>#1`, ... Sessions that
        failed are logged and left out of the loss. The first step trains the critic alone, if there is one, see
        `ppo.value_warmup_epochs`.

        Returns:
            The metrics that are logged (docs/metrics.md), with the mean `reward` of the sessions that count.

        Raises:
            AgileError: A reward is not a finite number, there is nothing to learn from, or too many steps of the
                optimizer in a row were skipped.
        """
        config, found = self.config, {}
        sessions = [s for t in trajectories for s in t.sessions]
        for session in sessions:
            if session.reward is not None and not math.isfinite(session.reward.total):
                raise AgileError(
                    f"The reward of session {session.id} is {session.reward.total}, expected a finite number; nothing "
                    "was learned from this step. Mend it, or leave its trajectory out."
                )
        self.run.log_sessions(sessions, stage="ppo", step=self.steps + 1)
        ppo = config.ppo

        def after(step: int, played: Sequence[Trajectory], metrics: Mapping[str, float]) -> None:
            rewards = [s.reward.total for s in sessions if s.reward is not None and not s.failed]
            now = time.monotonic()
            found.update(
                {
                    "reward": sum(rewards) / len(rewards) if rewards else math.nan,
                    **{f"status/{status}": n for status, n in status_counts(played).items()},
                    "skipped_steps": self.engine.num_skipped,
                    **metrics,
                    "seconds": now - self._started,
                }
            )
            self._started = now

        train_ppo(
            self.engine,
            self._reference,
            collect=lambda _: trajectories,
            rewards=lambda *_: [[s.reward.total if s.reward else 0.0 for s in t.sessions] for t in trajectories],
            on_iteration=after,
            first_iteration=self.steps,
            num_iterations=self.steps + 1,
            value_warmup_epochs=ppo.value_warmup_epochs,
            discounts=Discounts(ppo.gamma, ppo.lam),
            coefficients=coefficients(ppo),
            batch_size=ppo.batch_size,
            micro_batch_tokens=ppo.micro_batch_tokens,
            share_prefixes=ppo.share_prefixes,
            num_epochs=ppo.num_epochs,
            temperature=config.temperature,
            seed=config.seed,
            estimator=Estimator(ppo.estimator),
            kl_control=self._kl_control,
            max_epoch_kl=ppo.max_epoch_kl or math.inf,
        )
        self.steps += 1
        self.run.log("ppo", self.steps, found)
        if self.steps % ppo.checkpoint_every == 0 or self.run.is_late():
            self.checkpoint()
        self.policy.update_weights(None, self.steps)
        return found

    def checkpoint(self) -> None:
        """Write a checkpoint of this moment, from which `resume` goes on."""
        place = Place("ppo", self.steps)
        if self.run.place != place:
            self.run.save(place, self.engine, state={"kl_coef": self._kl_control.coef})

    def save(self) -> Path:
        """Write the model and its tokenizer as a Hugging Face folder, which is returned."""
        self.run.export("ppo", Trained.gather(self.engine, self.config.model), self.tokenizer)
        return self.run.path / "ppo"

    def close(self) -> None:
        """Checkpoint, save, and leave the folder to others."""
        if self.steps:
            self.checkpoint()
            self.save()
        self.policy.close()
        self.engine.close()
        self.run.close()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        else:
            self.run.close(wait=False)


def imitate(
    model: Path | str,
    out: Path | str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    num_steps: int,
    lr: float,
    batch_size: int = 64,
    tools: Sequence[Any] | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train a model on the assistant's turns of conversations, as a start for a `Learner`.

    Args:
        model: Hugging Face folder or name.
        out: Where the trained model goes; returned.
        conversations: Lists of messages as OpenAI's API has them.
        on_step: Called with the number of each step (from 1) and its loss, nats a token.

    Raises:
        AgileError: The model cannot be loaded, its chat template does not take the conversations, or the assistant has
            no turn in them.
    """
    tokenizer = load_tokenizer(str(model))
    chat = ChatFormat(tokenizer)
    rows = [_row(chat.spoken([for_template(m) for m in messages], tools)) for messages in conversations]
    if not any(row.num_actions for row in rows):
        raise AgileError(
            f"None of the {len(rows)} conversations holds a turn of the assistant, from which to learn; give some "
            "that do."
        )
    torch.manual_seed(seed)
    module = ActorCritic(load_lm(str(model), tokenizer, dtype="float32"))
    engine = Engine(
        module,
        lr=lr,
        groups=[{"params": list(module.lm.parameters())}],
        schedule=sft_schedule(num_steps, num_steps // 20),
    )
    train_sft(
        engine,
        rows,
        batch_size=batch_size,
        micro_batch_tokens=4096,
        share_prefixes=True,
        num_steps=num_steps,
        seed=seed,
        on_step=on_step,
    )
    Trained.gather(engine, str(model)).save_pretrained(Path(out))
    tokenizer.save_pretrained(out)
    engine.close()
    return Path(out)


def _row(pieces: Sequence[tuple[bool, tuple[int, ...]]]) -> Row:
    ids = np.array([i for _, part in pieces for i in part], dtype=np.int64)
    mask = np.array([own for own, part in pieces for _ in part], dtype=bool)
    return Row(ids, mask, np.zeros(int(mask.sum()), np.float32), SegmentEnd.TERMINATED)


def _config(settings: Mapping[str, Any]) -> LearnerConfig:
    try:
        return LearnerConfig.model_validate(settings)
    except ValidationError as error:
        raise AgileError("Learner cannot be set so:\n" + explained(LearnerConfig, error)) from None


def learner_format(run: Path) -> ChatFormat | None:
    """The chat format of a learner's folder; None for other runs."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    if not isinstance(values.get("model"), str):  # a section
        return None
    return ChatFormat(load_tokenizer(str(run / "ppo") if (run / "ppo").is_dir() else values["model"]))


def _engine(config: LearnerConfig, tokenizer: PreTrainedTokenizerFast) -> Engine:
    lm, lora, ppo = load_lm(config.model, tokenizer, dtype=config.engine.dtype), config.lora, config.ppo
    if lora is not None:
        add_adapter(lm, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules, token_ids=())
    model = ActorCritic(lm, config.critic)
    return Engine(
        model,
        **config.engine.model_dump(),
        lr=ppo.lr,
        groups=model.parameter_groups(ppo.value_lr),
        weight_decay=ppo.weight_decay,
        max_grad_norm=ppo.max_grad_norm,
    )


def _reference(config: LearnerConfig, engine: Engine, tokenizer: PreTrainedTokenizerFast) -> Reference | None:
    if not config.ppo.kl_coef:
        return None
    if config.lora is not None:
        return adapter_free(engine)
    start = ActorCritic(load_lm(config.model, tokenizer, dtype=config.engine.dtype))
    return frozen(start, engine, offload=config.ppo.reference == "offload")
