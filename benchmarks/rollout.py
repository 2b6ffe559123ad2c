"""How many sessions a second each policy collects on MiniShop: one at a time, and many at once.

    python benchmarks/rollout.py --checkpoint RUN --out rollout.json

With `--checkpoint` (a folder of `agile train` or `agile demo`) its agent plays; without, random weights answer with
invalid actions, in turns and contexts of like lengths. Rows are repeated in turn, and the medians compared: other work
on the machine hits all rows alike. Prefilled are the prompt tokens that no cache held. One at a time plays every 16th
stream, whose sessions are the same in every row: a seed belongs to its session.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from agile.build import Setup
from agile.config import load_config
from agile.executor import Executor
from agile.policies import HFPolicy
from agile.protocols import Policy
from agile.rollout import collect
from agile.types import Stream, Usage


@dataclass(frozen=True)
class Run:
    """What one collection took."""

    sessions: int
    seconds: float
    usage: Usage

    @property
    def figures(self) -> dict[str, float]:
        usage = self.usage
        return {
            "sessions": self.sessions,
            "sessions_per_s": self.sessions / self.seconds,
            "tokens_per_s": usage.completion_tokens / self.seconds,
            "prompt_tokens": usage.prompt_tokens,
            "prefilled_tokens": usage.prompt_tokens - usage.cached_tokens,
            "sampled_tokens": usage.completion_tokens,
        }


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    setup: Setup
    executor: Executor
    seed: int

    def play(self, policy: Policy, *groups: Sequence[Stream]) -> Run:
        """Play the groups one after the other, the streams of each at once."""
        began = time.perf_counter()
        sessions = []
        for streams in groups:
            run = collect(self.executor, policy, streams, self.setup.memory, seed=self.seed, max_failed=1.0)
            sessions += [s for t in asyncio.run(run) for s in t.sessions]
        return Run(len(sessions), time.perf_counter() - began, sum((s.usage for s in sessions), Usage()))


def rows(bench: Bench, streams: Sequence[Stream], args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """What is measured, by name; the first is what the others are compared to. Another engine joins by a line."""
    tokenizer = bench.executor.codec.tokenizer
    model = bench.setup.language_model(tokenizer, args.agent)

    def hf(slots: int, *groups: Sequence[Stream], reuse: bool = True) -> Callable[[], Run]:
        """A policy a run: none begins with a warm cache."""
        return lambda: bench.play(HFPolicy(model, tokenizer.pad_token_id, max_batch_size=slots, reuse=reuse), *groups)

    return {
        "one at a time": hf(1, *([s] for s in streams[::16])),
        f"HF, {len(streams)}": hf(len(streams), streams),
        f"HF, {len(streams)}, no reuse": hf(len(streams), streams, reuse=False),
    }


def measure(found: dict[str, Callable[[], Run]], repeats: int) -> dict[str, dict[str, float]]:
    """Median figures of each row; a first round is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, run in found.items():
            result = run()
            if repeat:
                runs[name].append(result)
    medians = {
        name: {key: statistics.median(r.figures[key] for r in results) for key in results[0].figures}
        for name, results in runs.items()
    }
    first = next(iter(medians.values()))
    for figures in medians.values():
        figures["ratio"] = figures["sessions_per_s"] / first["sessions_per_s"]
    return medians


def show(medians: dict[str, dict[str, float]], console: Console) -> None:
    table = Table(title="rollouts on MiniShop; the last columns are tokens a session")
    table.add_column("policy", no_wrap=True)
    for column in ("sessions/s", "tok/s", "ratio", "prompt", "prefilled", "sampled"):
        table.add_column(column, justify="right")
    for name, row in medians.items():
        per_session = [row[f"{kind}_tokens"] / row["sessions"] for kind in ("prompt", "prefilled", "sampled")]
        table.add_row(
            name,
            f"{row['sessions_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio']:.1f}",
            *(f"{value:.1f}" for value in per_session),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of `agile train` whose last agent plays")
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default 64)")
    parser.add_argument("--sessions", type=int, default=10, help="sessions of each stream (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    overrides = [f"task.num_train_worlds={args.streams}", "task.num_test_worlds=1", "memory.encoder=hashing"]
    args.agent = None
    if args.checkpoint is None:
        overrides += ["rollout.max_action_tokens=6", "rollout.max_invalid_actions=2"]
    else:
        args.agent = next(a for a in (args.checkpoint / "ppo", args.checkpoint / "sft") if a.exists())
    config = load_config(Path(__file__).parent.parent / "configs" / "demo.yaml", overrides)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(config, Path(folder))
        bench = Bench(setup, setup.executor(setup.tokenizer(args.agent)), args.seed)
        streams = [replace(s, items=s.items[: args.sessions]) for s in setup.task.streams("train")]
        setup.embed(streams)
        medians = measure(rows(bench, streams, args), args.repeats)
    show(medians, Console())
    if args.out:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        shown = {k: str(v) for k, v in vars(args).items() if v is not None}
        args.out.write_text(json.dumps({"arguments": shown, "machine": machine, "rows": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
