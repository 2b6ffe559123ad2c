"""How fast training is: tokens/s, peak memory and the share of the machine's peak, side by side with TRL in one run.

    python -m benchmarks.training                       # MiniShop; --data DIR: prompts of ProductQA's questions
    python -m benchmarks.training --zero                # also ZeRO's stages on 1 and 2 processes

Competitors take turns (A B B A ...), and medians are shown, since a machine may do other things too. All train the same
model with random weights, in float32, on the same tokens: imitation sessions, the loss at the action tokens alone,
AdamW, the same number of sequences per optimizer step. Padding does not count as tokens.

`sft` compares imitation: `agile.train.sft` on the engine with TRL's SFTTrainer as it comes, with sequences grouped by
length, and with its padding-free collator. Measured is from the end of one optimizer step to that of another, data
loading included.

`ppo` compares an update on sessions that are given: scoring and epochs of `agile.train.ppo.update`, with a critic, to
TRL's GRPOTrainer, whose `rollout_func` hands it the same tokens, with `env_mask` for what the LLM did not sample. Both
compute the old logprobs once and pass over the sequences as often; neither has a reference model. GRPO has no critic.

The share of the peak is floating-point operations over time over what `torch.mm` reaches in the same run. A step does
6 N T + 6 L d S + 6 d V A of them: N weights of the trunk, T tokens, L layers of width d, S the sum of the squares of
the lengths (causal attention), A action tokens, whose logits alone are computed, V tokens in the vocabulary; 2 of 6 of
each where only the forward pass is computed. The count is the same for all: what AGILE leaves out of its last layer or
computes once for several rows counts as done, and what TRL computes beyond it (padding, other logits) does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from agile import ranks
from agile.batching import Row, minibatches
from agile.build import Setup
from agile.config import load_config
from agile.engine import Engine
from agile.losses import PPOCoefficients
from agile.model import ActorCritic, small_llama
from agile.train.ppo import Discounts, update
from agile.train.preference import import_trl
from agile.train.sft import train_sft
from agile.types import Segment, SegmentEnd, Session, SessionStatus, Source, Span, Trajectory
from benchmarks.turns import Measured, in_turns, matmul_peak, peak_memory, show

LR, CONFIGS = 1e-4, Path(__file__).parents[1] / "configs"
CLIPPED = PPOCoefficients(
    clip=0.2, value_clip=0.5, value_coef=0.5, kl_coef=0.0, entropy_coef=0.0, max_importance_weight=2.0
)


@dataclass(frozen=True, slots=True)
class Task:
    """What all competitors train.

    Attributes:
        rows: Imitation sessions, in random order.
        new_model: Gives the same model with the same random weights each time.
        batch_size: Sequences of an optimizer step.
        num_steps: Optimizer steps that are measured.
    """

    rows: Sequence[Row]
    tokenizer: PreTrainedTokenizerFast
    new_model: Callable[[], PreTrainedModel]
    batch_size: int
    micro_batch_tokens: int
    num_steps: int
    num_epochs: int


def flops(rows: Sequence[Row], model: PreTrainedModel, per_weight: int = 6) -> float:
    """Floating-point operations of a pass over rows, forward and backward (6) or forward alone (2)."""
    config = model.config.get_text_config()
    outside = {
        id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()
    }
    trunk = sum(p.numel() for p in model.parameters() if id(p) not in outside)
    lengths = np.array([len(row) for row in rows], dtype=np.float64)
    actions = sum(row.num_actions for row in rows)
    attention = float(config.num_hidden_layers * config.hidden_size * (lengths @ lengths))
    heads = float(config.hidden_size * config.vocab_size * actions)
    return per_weight * (trunk * float(lengths.sum()) + attention + heads)


# --------------------------------------------------------------------------------------------------------------------
# Imitation


def agile_sft(
    task: Task, *, share_prefixes: bool = False, pad: bool = False, zero_stage: int = 0
) -> Callable[[], Measured]:
    """Imitation on the engine; `pad` makes every sequence as long as the longest of its batch, as padding would."""
    model = ActorCritic(task.new_model())
    engine = Engine(model, lr=LR, groups=[{"params": list(model.lm.parameters())}], zero_stage=zero_stage)
    rows = padded_by_batch(task) if pad else task.rows
    ends: list[float] = []

    def run() -> Measured:
        ends.clear()
        train_sft(
            engine,
            rows,
            batch_size=task.batch_size,
            micro_batch_tokens=task.micro_batch_tokens,
            share_prefixes=share_prefixes,
            num_steps=task.num_steps + 1,
            seed=0,
            on_step=lambda step, loss: ends.append(time.perf_counter()),
        )
        batches = minibatches(task.rows, task.batch_size, np.random.default_rng([0, 0]))
        tokens = [sum(len(task.rows[i]) for i in batch) for batch in batches]
        return Measured(sum(tokens[1 : task.num_steps + 1]), ends[-1] - ends[0])

    return run


def padded_by_batch(task: Task) -> list[Row]:
    """Rows with as many idle tokens behind them as padding to the longest of their batch has."""
    rows = list(task.rows)
    for batch in minibatches(task.rows, task.batch_size, np.random.default_rng([0, 0])):
        longest = max(len(rows[i]) for i in batch)
        for i in batch:
            row, idle = rows[i], longest - len(rows[i])
            rows[i] = Row(
                np.concatenate([row.token_ids, np.zeros(idle, np.int64)]),
                np.concatenate([row.action_mask, np.zeros(idle, bool)]),
                row.logprobs,
                row.end,
            )
    return rows


class Clock(TrainerCallback):
    """When each optimizer step of a trainer of transformers ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())


def trl_arguments(task: Task, folder: Path, num_steps: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": task.batch_size,
        "max_steps": num_steps,
        "learning_rate": LR,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 10**6,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }


def trl_sft(task: Task, folder: Path, **options: Any) -> Callable[[], Measured]:
    """TRL's SFTTrainer on the same ids and labels."""
    import datasets

    trl = import_trl()

    labels = [np.where(row.action_mask, row.token_ids, -100).tolist() for row in task.rows]
    data = datasets.Dataset.from_dict({"input_ids": [row.token_ids.tolist() for row in task.rows], "labels": labels})
    arguments = trl.SFTConfig(**trl_arguments(task, folder, task.num_steps + 1, max_length=None, **options))
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=task.new_model(),
        args=arguments,
        train_dataset=data,
        processing_class=task.tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    collate, counts = trainer.data_collator, []

    def counted(examples: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted

    def run() -> Measured:
        clock.ends.clear()
        counts.clear()
        trainer.train()
        return Measured(sum(counts[1 : task.num_steps + 1]), clock.ends[-1] - clock.ends[0])

    return run


# --------------------------------------------------------------------------------------------------------------------
# PPO's update


def trajectories(task: Task) -> list[Trajectory]:
    """Each row as a session of its own."""
    found = []
    for number, row in enumerate(task.rows):
        cuts = np.flatnonzero(np.diff(row.action_mask)) + 1
        spans = []
        for ids, mask in zip(np.split(row.token_ids, cuts), np.split(row.action_mask, cuts), strict=True):
            source, logprobs = (Source.LLM, (0.0,) * len(ids)) if mask[0] else (Source.TASK, ())
            spans.append(Span(source, tuple(ids.tolist()), logprobs))
        segment = Segment(tuple(spans), SegmentEnd.TERMINATED)
        session = Session(
            id=f"s{number}/0",
            stream_id=f"s{number}",
            index=0,
            item_id="q",
            kind="",
            seed=0,
            segments=(segment,),
            steps=(),
            retrieved=(),
            written=(),
            advice=None,
            answer="",
            status=SessionStatus.COMPLETED,
        )
        found.append(Trajectory(session.stream_id, (session,)))
    return found


def agile_ppo(task: Task, *, share_prefixes: bool = False) -> Callable[[], Measured]:
    model = ActorCritic(task.new_model())
    engine = Engine(model, lr=LR, groups=model.parameter_groups(LR))
    played = trajectories(task)
    rewards = [[random.Random(i).random()] for i in range(len(played))]

    def run() -> Measured:
        started = time.perf_counter()
        update(
            engine,
            None,
            played,
            rewards,
            discounts=Discounts(),
            coefficients=CLIPPED,
            batch_size=task.batch_size,
            micro_batch_tokens=task.micro_batch_tokens,
            share_prefixes=share_prefixes,
            num_epochs=task.num_epochs,
            temperature=1.0,
            rng=np.random.default_rng(0),
        )
        seconds = time.perf_counter() - started
        return Measured(task.num_epochs * sum(len(row) for row in task.rows), seconds)

    return run


def trl_grpo(task: Task, folder: Path) -> Callable[[], Measured]:
    """GRPOTrainer on given completions: a cycle of scoring and epochs, after a first one that is not counted."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets

    trl = import_trl()

    first = [int(np.argmax(row.action_mask)) for row in task.rows]

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        assert len(prompts) == len(task.rows)
        parts = list(zip(task.rows, first, strict=True))
        return {
            "prompt_ids": [row.token_ids[:cut].tolist() for row, cut in parts],
            "completion_ids": [row.token_ids[cut:].tolist() for row, cut in parts],
            "logprobs": [[0.0] * (len(row) - cut) for row, cut in parts],
            "env_mask": [row.action_mask[cut:].astype(int).tolist() for row, cut in parts],
        }

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [random.Random(i).random() for i in range(len(completions))]

    per_cycle = len(task.rows) // task.batch_size * task.num_epochs
    arguments = trl.GRPOConfig(
        **trl_arguments(task, folder, 2 * per_cycle),
        num_generations=2,
        steps_per_generation=len(task.rows) // task.batch_size,
        num_iterations=task.num_epochs,
        beta=0.0,
        max_completion_length=max(len(row) for row in task.rows),
    )
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=task.new_model(),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(i) for i in range(len(task.rows))]}),
        processing_class=task.tokenizer,
        rollout_func=given,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> Measured:
        clock.ends.clear()
        trainer._step, trainer._buffered_inputs = 0, None
        trainer.train()
        tokens = task.num_epochs * sum(len(row) for row in task.rows)
        return Measured(tokens, clock.ends[-1] - clock.ends[per_cycle - 1])

    return run


# --------------------------------------------------------------------------------------------------------------------
# ZeRO


def zero_stages(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Imitation on the engine under each stage, by 1 and by 2 processes; each process is started anew."""
    found: dict[str, dict[str, float]] = {}
    for processes in (1, 2):
        for stage in range(4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command += ["-m", "benchmarks.training", *arguments, "--stage", str(stage)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"ZeRO {stage} on {processes} processes ended:\n{done.stderr[-3000:]}")
            line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
            found[f"ZeRO {stage}, {processes} process{'es' * (processes > 1)}"] = json.loads(line)
    first = next(iter(found.values()))["tokens_per_s"]
    return {name: {**row, "ratio": row["tokens_per_s"] / first, "share_of_peak": 0.0} for name, row in found.items()}


def one_stage(task: Task, stage: int) -> None:
    """What a process of `zero_stages` does; `train_sft` shares each batch among them. The first one says how fast."""
    torch.manual_seed(0)
    measured, memory = peak_memory(agile_sft(task, zero_stage=stage))
    if ranks.is_main():
        print(json.dumps({"tokens_per_s": measured.tokens / measured.seconds, "peak_mib": memory}), flush=True)


# --------------------------------------------------------------------------------------------------------------------


def make_task(args: argparse.Namespace, folder: Path) -> Task:
    """Rows of imitation sessions in random order, as many as the steps need."""
    overrides = ["memory.encoder=hashing", "sft.sessions_per_item=1"]
    if args.data:
        name = "productqa-tiny"
        overrides += [f"task.data={args.data}", f"task.max_items={args.items}"]
    else:
        name = "demo"
        overrides += ["task.num_train_worlds=24", "task.num_test_worlds=1"]
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    setup = Setup(config, folder)
    setup.embed(setup.task.streams("train"))
    tokenizer = setup.tokenizer()
    rows = [row for row in setup.imitation_rows(setup.executor(tokenizer)) if row.num_actions]
    chosen = np.random.default_rng(0).permutation(len(rows))[: args.batch_size * (args.steps + 1)]
    if len(chosen) < args.batch_size * (args.steps + 1):
        raise SystemExit(f"{len(rows)} sequences are too few for {args.steps + 1} steps of {args.batch_size}.")
    new_model = partial(
        small_llama,
        tokenizer,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.hidden // 64,
        max_tokens=2 * max(len(row) for row in rows),
        seed=0,
    )
    return Task(
        [rows[i] for i in chosen],
        tokenizer,
        new_model,
        args.batch_size,
        args.micro_batch_tokens,
        args.steps,
        args.epochs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="ProductQA's files; MiniShop without")
    parser.add_argument("--items", type=int, default=30, help="questions of each of ProductQA's groups (default 30)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of an optimizer step (default 32)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a round (default 3)")
    parser.add_argument("--epochs", type=int, default=2, help="of an update of PPO (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--only", nargs="+", choices=["sft", "ppo"], default=["sft", "ppo"])
    parser.add_argument("--zero", action="store_true", help="also ZeRO's stages on 1 and 2 processes")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    ranks.join()
    console, found = Console(), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = make_task(args, folder)
        if args.stage is not None:
            return one_stage(task, args.stage)
        model, lengths = task.new_model(), np.array([len(row) for row in task.rows])
        peak, tokens = matmul_peak(), float(lengths.sum())
        console.print(
            f"{sum(p.numel() for p in model.parameters()):,} weights; {len(lengths)} sequences of {lengths.min()} to "
            f"{lengths.max()} tokens, mean {lengths.mean():.0f}; torch.mm {peak / 1e9:.1f} GFLOP/s"
        )
        rate = flops(task.rows, model) / tokens / peak
        if "sft" in args.only:
            found["sft"] = in_turns(
                {
                    "TRL SFTTrainer": trl_sft(task, folder),
                    "TRL, grouped by length": trl_sft(task, folder, train_sampling_strategy="group_by_length"),
                    "TRL, padding-free": trl_sft(task, folder, padding_free=True),
                    "AGILE, padded": agile_sft(task, pad=True),
                    "AGILE, packed": agile_sft(task),
                    "AGILE, prefixes shared": agile_sft(task, share_prefixes=True),
                },
                args.repeats,
                rate,
            )
            show("imitation", found["sft"], console)
        if "ppo" in args.only:
            scored = flops(task.rows, model, per_weight=2) / tokens / peak / task.num_epochs
            found["ppo"] = in_turns(
                {
                    "TRL GRPOTrainer": trl_grpo(task, folder),
                    "AGILE PPO, packed": agile_ppo(task),
                    "AGILE PPO, prefixes shared": agile_ppo(task, share_prefixes=True),
                },
                args.repeats,
                rate + scored,
            )
            show(f"an update of {task.num_epochs} epochs", found["ppo"], console)
    if args.zero:
        shared = ("data", "items", "layers", "hidden", "batch_size", "micro_batch_tokens", "steps", "threads")
        given = [(name.replace("_", "-"), getattr(args, name)) for name in shared if getattr(args, name) is not None]
        found["zero"] = zero_stages([word for name, value in given for word in (f"--{name}", str(value))])
        show("ZeRO, imitation", found["zero"], console)
    if args.out:
        import trl

        versions = {"torch": torch.__version__, "trl": trl.__version__}
        shown = {k: str(v) for k, v in vars(args).items() if v is not None}
        args.out.write_text(json.dumps({"arguments": shown, "versions": versions, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
