"""A script for TRL's GRPOTrainer, ported. What it was stands in comments above what it is.

    python examples/from_trl.py

Asked which of two numbers is larger, a tiny model from scratch has imitated somebody who guesses, and forgets the tags
every fourth time. Two reward functions, as TRL takes them, teach it both. Takes about a minute of a core of its own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from agile.rft import run_rft
from agile.rft_files import Files, rft_config

Messages = list[dict[str, str]]


# Both reward functions are as they were. TRL gives them many completions at once, and the columns of their rows.
def format_reward(completions: list[Messages], **kwargs: Any) -> list[float]:
    return [float(re.fullmatch(r"<answer>\w+</answer>", c[0]["content"]) is not None) for c in completions]


def accuracy_reward(completions: list[Messages], solution: list[str], **kwargs: Any) -> list[float]:
    return [float(s in re.findall(r"\w+", c[0]["content"])) for c, s in zip(completions, solution, strict=True)]


# GRPOTrainer(reward_funcs=[format_reward, accuracy_reward], args=GRPOConfig(reward_weights=[0.2, 0.8]))
def grade(sample: Mapping[str, Any], item: Mapping[str, Any]) -> float:
    """One answer and its row; `item` has the columns of the row."""
    completions = [[{"role": "assistant", "content": sample["output_text"]}]]
    columns = {name: [value] for name, value in item.items()}
    return 0.2 * format_reward(completions, **columns)[0] + 0.8 * accuracy_reward(completions, **columns)[0]


def write_rows(folder: Path, rng: Random) -> None:
    """Train and validation rows, and the examples of a player who guesses."""
    pairs = list(permutations(range(1, 16), 2))
    rng.shuffle(pairs)

    def asked(a: int, b: int) -> Messages:
        return [{"role": "user", "content": f"which is larger , {a} or {b} ?"}]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    # train, validation = (Dataset.from_list([{"prompt": asked(a, b), "solution": str(max(a, b))} for a, b in part])
    #                      for part in (pairs[:100], pairs[100:140]))
    for name, part in (("train.jsonl", pairs[:100]), ("validation.jsonl", pairs[100:140])):
        write(name, [{"messages": asked(a, b), "solution": str(max(a, b))} for a, b in part])
    guessed = [
        (pair, ("{}" if rng.random() < 0.25 else "<answer>{}</answer>").format(rng.choice(pair)))
        for pair in pairs[140:]
        for _ in range(20)
    ]  # TRL: the model could do it already
    write("imitate.jsonl", [{"messages": [*asked(*p), {"role": "assistant", "content": a}]} for p, a in guessed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/from-trl"), help="new folder")
    parser.add_argument("--model", help="Hugging Face folder; a tiny one from scratch without it")
    parser.add_argument("words", nargs="*", help="further settings, a.b=value")
    args = parser.parse_args()
    files = args.out / "files"
    files.mkdir(parents=True)
    write_rows(files, Random(0))

    # trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=train, eval_dataset=validation, ...)
    config = rft_config(
        Files(
            train=files / "train.jsonl",
            validation=files / "validation.jsonl",
            grader="from_trl.grade",  # this file's
            model=args.model,
            imitate=None if args.model else files / "imitate.jsonl",
        ),
        [
            # args=GRPOConfig(num_train_epochs=6, per_device_train_batch_size=400, num_generations=8,
            "n_epochs=6",
            "batch_size=50",
            "ppo.rollouts_per_stream=8",
            #                 learning_rate=1e-3, num_iterations=2, epsilon=0.2, beta=0.0, max_completion_length=16,
            "ppo.lr=1e-3",
            "ppo.num_epochs=2",
            "ppo.clip=0.2",
            "ppo.kl_coef=0",
            "rollout.max_action_tokens=16",
            #                 max_steps=-1, eval_strategy="steps", eval_steps=3, seed=0)
            "eval_interval=3",
            "seed=0",
            "rollout.max_context_tokens=64",
            "threads=1",
            *([] if args.model else ["sft.num_steps=150"]),
            *args.words,
        ],
    )
    # trainer.train()
    report = run_rft(config, args.out / "run", Console(), resume=False)

    # trainer.evaluate(); trainer.save_model()
    print(f"{report['before']['reward']:.3f} before, {report['after']['reward']:.3f} after: {args.out / 'run' / 'ppo'}")


if __name__ == "__main__":
    main()
