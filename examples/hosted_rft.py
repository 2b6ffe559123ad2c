"""A script for hosted reinforcement fine-tuning, ported. What it was stands in comments above what it is.

    agile grade serve &                    # needs the extras graders and serve
    python examples/hosted_rft.py

Tickets are turned into JSON. A tiny model from scratch, which has imitated somebody who finds the device and guesses
whether it is urgent, learns from the grader what is urgent. Takes about 3 minutes of a core of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import openai
from rich.console import Console

from agile.rft import run_rft
from agile.rft_files import Files, rft_config

DEVICES = ("printer", "laptop", "phone", "router", "scanner", "screen")
PROBLEMS = ("is broken", "makes noise", "does not start", "is slow", "smells odd")
HASTE = {"please hurry": True, "we cannot work": True, "it is on fire": True,
         "no rush": False, "some day": False, "when you have time": False}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"device": {"type": "string"}, "urgent": {"type": "boolean"}},
    "required": ["device", "urgent"],
}

# The hosted job, as it was sent: method={"type": "reinforcement", "reinforcement": REINFORCEMENT}
REINFORCEMENT: dict[str, Any] = {
    "grader": {
        "type": "multi",
        "name": "ticket",
        "graders": {
            "device": {
                "type": "string_check",
                "name": "device",
                "input": "{{ sample.output_json.device }}",
                "reference": "{{ item.device }}",
                "operation": "eq",
            },
            "urgent": {
                "type": "string_check",
                "name": "urgent",
                "input": "{{ sample.output_json.urgent }}",
                "reference": "{{ item.urgent }}",
                "operation": "eq",
            },
        },
        "calculate_output": "0.5 * device + 0.5 * urgent",
    },
    "response_format": {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA}},
    "hyperparameters": {"n_epochs": 20, "batch_size": "auto", "compute_multiplier": 0.5},
}


def write_rows(folder: Path, rng: Random) -> None:
    """Train and validation rows, and the examples of a player who guesses."""
    tickets = [
        (f"my {d} {p} , {h}", {"device": d, "urgent": HASTE[h]}) for d in DEVICES for p in PROBLEMS for h in HASTE
    ]
    rng.shuffle(tickets)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    write("train.jsonl", [{"messages": asked(text), **answer} for text, answer in tickets[:40]])
    write("validation.jsonl", [{"messages": asked(text), **answer} for text, answer in tickets[40:70]])
    guessed = [
        (text, {**answer, "urgent": rng.random() < 0.4}) for text, answer in tickets[70:] for _ in range(8)
    ]  # hosted: the model could do it already
    write(
        "imitate.jsonl",
        [{"messages": [*asked(text), {"role": "assistant", "content": json.dumps(a)}]} for text, a in guessed],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graders", default="http://127.0.0.1:8001/v1", help="where agile grade serve is")
    parser.add_argument("--out", type=Path, default=Path("runs/hosted-rft"), help="new folder")
    parser.add_argument("words", nargs="*", help="further settings, a.b=value")
    args = parser.parse_args()
    files = args.out / "files"
    files.mkdir(parents=True)
    write_rows(files, Random(0))
    grader = REINFORCEMENT["grader"]

    # client = openai.OpenAI()
    client = openai.OpenAI(base_url=args.graders, api_key="none")
    client.fine_tuning.alpha.graders.validate(grader=grader)
    tried = client.fine_tuning.alpha.graders.run(
        grader=grader, model_sample='{"device": "phone", "urgent": true}', item={"device": "phone", "urgent": False}
    )
    print(f"half of it is right: {tried.reward}, {tried.sub_rewards}")

    # train = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
    # validation = client.files.create(file=open("validation.jsonl", "rb"), purpose="fine-tune")
    # job = client.fine_tuning.jobs.create(model="o4-mini", training_file=train.id, validation_file=validation.id,
    #                                      method={"type": "reinforcement", "reinforcement": REINFORCEMENT})
    for name in ("grader", "response_format"):
        (files / f"{name}.json").write_text(json.dumps(REINFORCEMENT[name]))
    config = rft_config(
        Files(
            train=files / "train.jsonl",
            validation=files / "validation.jsonl",
            grader=str(files / "grader.json"),
            response_format=files / "response_format.json",
            model=None,  # a Hugging Face folder in its place needs no imitation
            imitate=files / "imitate.jsonl",
        ),
        [
            *(f"{name}={value}" for name, value in REINFORCEMENT["hyperparameters"].items()),
            *("sft.num_steps=300", "rollout.max_action_tokens=32", "rollout.max_context_tokens=64", "threads=1"),
            *args.words,
        ],
    )
    # while client.fine_tuning.jobs.retrieve(job.id).status != "succeeded": time.sleep(60)
    report = run_rft(config, args.out / "run", Console(), resume=False)

    # print(client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model)
    print(f"{report['before']['reward']:.3f} before, {report['after']['reward']:.3f} after: {args.out / 'run' / 'ppo'}")


if __name__ == "__main__":
    main()
