"""Reinforcement fine-tuning by `agile rft`: 50 rows to learn from, 50 to validate on, a tiny model from scratch.

    python -m benchmarks.rft runs/rft --seeds 0 1 2

Notes are turned into JSON. The model is first trained by imitation of a weak player on other notes, who nearly always
takes the net amount for the total, and the buyer for the seller now and then. So it starts with a habit that is wrong
and one that is right, and with something to explore; which is which it learns from the grader alone.

Each seed also has a control from the same start: every answer has the reward of another one (demo.shuffle_rewards).
The player is as rarely right about totals as it is wrong about sellers: the start's sampled and greedy answers are
worth about the same, neither field is near a tie, and noise spoils one as it mends the other.

Whatever is done stands in the folder: started again, it goes on. A seed takes 2.3 minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# So few names and amounts that none can be told to be right by itself: only what stands before it says.
NAMES = ("Ada", "Bela", "Cleo", "Dino", "Enzo", "Fara", "Gita", "Hugo")
AMOUNTS = tuple(range(10, 100, 10))
GRADER = {
    "type": "structured",
    "name": "fields",
    "reference": "{{ item.invoice }}",
    "fields": {"seller": {}, "total": {}},
}
SETTINGS = ("compute_multiplier=0.25", "eval_interval=5", "threads=1")
EPOCHS = {"train": 200, "shuffled": 50}
LIMITS = ("rollout.max_action_tokens=32", "rollout.max_context_tokens=96")
IMITATION = ("sft.num_steps=300", "sft.lr=4e-3", "sft.batch_size=64", "sft.checkpoint_every=300")
WRONG = {"seller": 0.15, "total": 0.85}  # how often the player is


def note(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A note, what it says, and what the weak player takes it for."""
    seller, buyer = rng.sample(NAMES, 2)
    net, total = rng.sample(AMOUNTS, 2)
    parts = [[f"from {seller}", f"to {buyer}"], [f"net {net}", f"total {total}"]]
    for part in parts:
        rng.shuffle(part)
    right, wrong = {"seller": seller, "total": total}, {"seller": buyer, "total": net}
    said = {k: (wrong if rng.random() < WRONG[k] else right)[k] for k in right}
    return f"invoice {' '.join(parts[0])} {' '.join(parts[1])}", right, said


def messages(text: str, answer: dict[str, Any] | None = None) -> list[dict[str, str]]:
    said = [] if answer is None else [{"role": "assistant", "content": json.dumps(answer)}]
    return [{"role": "user", "content": text}, *said]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder: Path, seed: int, *, num_rows: int = 50, num_imitated: int = 4000) -> None:
    """Rows to imitate, to train on, and to validate on; no note stands in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    notes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    while len(notes) < num_imitated + 2 * num_rows:
        text, right, said = note(rng)
        notes.setdefault(text, (right, said))
    told = list(notes.items())
    imitated, train, validation = (
        told[:num_imitated],
        told[num_imitated : num_imitated + num_rows],
        told[num_imitated + num_rows :],
    )
    write(
        folder / "imitate.jsonl",
        ({"messages": messages(text, said)} for text, (_, said) in imitated),
    )
    write(folder / "train.jsonl", ({"messages": messages(t), "invoice": right} for t, (right, _) in train))
    write(folder / "validation.jsonl", ({"messages": messages(t), "invoice": right} for t, (right, _) in validation))
    (folder / "grader.json").write_text(json.dumps(GRADER))


def rft(files: Path, out: Path, *words: str | Path) -> dict[str, Any]:
    """The report of a run, which is made if it is not there."""
    if not (out / "report.json").exists():
        command: list[str | Path] = [sys.executable, "-m", "agile.cli", "rft", "--train", files / "train.jsonl"]
        command += ["--validation", files / "validation.jsonl", "--grader", files / "grader.json"]
        resume = ["--resume"] if (out / "config.yaml").exists() else []
        subprocess.run([*command, *resume, f"out={out}", *SETTINGS, *LIMITS, *words], check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def one(out: Path, seed: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The two runs of a seed, from one start."""
    files = out / f"files-{seed}"
    if not (files / "grader.json").exists():
        write_files(files, seed)
    rows = []
    for name in ("train", "shuffled"):
        own = name == "train"  # the control starts from the same weights
        start: list[str | Path] = ["--imitate", files / "imitate.jsonl", *IMITATION]
        if not own:
            start = ["--model", out / f"train-{seed}" / "sft", "demo.shuffle_rewards=true"]
        report = rft(
            files,
            out / f"{name}-{seed}",
            *start,
            f"seed={seed}",
            f"n_epochs={EPOCHS[name]}",
            *overrides,
        )
        course = [p["validation"] for p in report["course"] if p["validation"] is not None]
        sampled = [p["train"] for p in report["course"] if p["train"] is not None]
        rows.append(
            {
                "seed": seed,
                "train": name,
                "start": report["before"]["reward"],
                "best": report["after"]["reward"],
                "last": course[-1],
                "mean_of_last_5": sum(course[-5:]) / 5,
                "lowest_after_best": min(course[course.index(max(course)) :]),
                "train_start": sampled[0],
                "train_end": sum(sampled[-5:]) / len(sampled[-5:]),
                "iterations": report["iterations"],
                "kl": next((p["kl"] for p in reversed(report["course"]) if p["kl"] is not None), None),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs; goes on where it was stopped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("overrides", nargs="*", help="changes of every run, a.b=value", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    out = args.out.resolve()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for found in pool.map(lambda seed: one(out, seed, args.overrides), args.seeds) for row in found]
    (out / "rft.json").write_text(json.dumps(rows, indent=2))
    table = Table(title="validation reward")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
