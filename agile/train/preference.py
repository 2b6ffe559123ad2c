"""DPO and the reward model: TRL's own trainers on pairs of answers, no loss of our own.

Both read pairs as `agile preferences` writes them, train for whole epochs, and give back a model that
`save_pretrained` saves. TRL itself is imported when it is needed.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from agile.errors import AgileError
from agile.seeding import derive_seed

Pair = Mapping[str, str]  # `prompt`, `chosen` and `rejected`
OnLog = Callable[[int, Mapping[str, float]], None]
# What says no more than the step does, or depends on the machine.
UNWANTED = re.compile(r"^epoch$|^eval_epoch$|^total_flos$|^train_|_runtime$|_per_second$")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast TRL trains: AdamW, linear warm-up, then linear decay to 0 over `num_epochs`."""

    lr: float
    batch_size: int
    micro_batch_size: int
    num_epochs: int
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool = False


def import_trl() -> ModuleType:
    """TRL, or what to install.

    Raises:
        AgileError: It is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise AgileError(
            f"The stages dpo and reward-model run TRL's trainers, which cannot be imported ({error}). Install the "
            'extra: pip install -c constraints.txt -e ".[trl]"'
        ) from None
    return trl


def split_pairs(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and the share `held_out` of them to evaluate on; each side has at least one.

    Raises:
        AgileError: There are fewer than two pairs.
    """
    if len(pairs) < 2:
        raise AgileError(
            f"{len(pairs)} preference pairs, expected at least 2. Give more by preferences.data=FILE, let the task's "
            "answers correct the agent by preferences.gold=true, or train longer; `agile preferences RUN` says why "
            "sessions make no pair."
        )
    order = np.random.default_rng(derive_seed(seed, "held-out pairs")).permutation(len(pairs))
    num = min(len(pairs) - 1, max(1, round(held_out * len(pairs))))
    return [pairs[i] for i in sorted(order[num:])], [pairs[i] for i in sorted(order[:num])]


def train_dpo(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    beta: float,
    schedule: Schedule,
    seed: int,
    on_log: OnLog,
) -> PreTrainedModel:
    """Direct preference optimisation by TRL's DPOTrainer; the reference is the model as it comes.

    A model of bfloat16 learns in float32, its passes are in bfloat16, and it is given back in bfloat16.

    Args:
        beta: How strongly it is held to the reference.
        on_log: Called with the optimizer step and TRL's own figures, those on `held_out` (`eval_*`) at the end.
    """
    trl = import_trl()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(**_arguments(schedule, lm, folder, seed), beta=beta, max_length=None)
        reference, dtype = copy.deepcopy(lm), lm.dtype
        trainer = trl.DPOTrainer(
            model=_learning(lm),
            ref_model=reference,
            args=arguments,
            processing_class=tokenizer,
            **_parts(pairs, held_out, on_log),
        )
        return _run(trainer, dtype)


def train_reward_model(
    source: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    schedule: Schedule,
    seed: int,
    on_log: OnLog,
) -> PreTrainedModel:
    """A sequence classifier with one output, the reward, by TRL's RewardTrainer.

    Args:
        source: Hugging Face folder of the language model whose trunk it takes over; the head is new.
    """
    trl = import_trl()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(source), num_labels=1)
    dtype = model.dtype
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.RewardConfig(**_arguments(schedule, model, folder, seed), max_length=None)
        trainer = trl.RewardTrainer(
            model=_learning(model), args=arguments, processing_class=tokenizer, **_parts(pairs, held_out, on_log)
        )
        return _run(trainer, dtype)


def _arguments(schedule: Schedule, model: PreTrainedModel, folder: str, seed: int) -> dict[str, Any]:
    """What both trainers are told. TRL saves nothing: the caller exports the model."""
    return {
        "output_dir": folder,
        "learning_rate": schedule.lr,
        "per_device_train_batch_size": schedule.micro_batch_size,
        "per_device_eval_batch_size": schedule.micro_batch_size,
        "gradient_accumulation_steps": schedule.batch_size // schedule.micro_batch_size,  # the config was checked
        "num_train_epochs": schedule.num_epochs,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": schedule.weight_decay,
        "max_grad_norm": schedule.max_grad_norm,
        "bf16": model.dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": schedule.gradient_checkpointing,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _parts(pairs: Sequence[Pair], held_out: Sequence[Pair], on_log: OnLog) -> dict[str, Any]:
    from datasets import Dataset

    class Logged(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            figures = {name: float(value) for name, value in others["logs"].items() if not UNWANTED.search(name)}
            if figures:
                on_log(state.global_step, figures)

    return {
        "train_dataset": Dataset.from_list([dict(pair) for pair in pairs]),
        "eval_dataset": Dataset.from_list([dict(pair) for pair in held_out]),
        "callbacks": [Logged()],
    }


def _learning(model: PreTrainedModel) -> PreTrainedModel:
    """With weights in float32: small steps would be lost in those of bfloat16."""
    torch.nn.Module.to(model, torch.float32)
    return model


def _run(trainer: Any, dtype: torch.dtype) -> PreTrainedModel:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.evaluate()
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    torch.nn.Module.to(model, dtype)
    model.eval()
    return model
