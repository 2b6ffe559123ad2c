"""How many sessions a second each policy collects: one at a time, many at once, with vLLM in process and as a server.

    python benchmarks/rollout.py --checkpoint RUN --out rollout.json               # on MiniShop
    python benchmarks/rollout.py --data DIR --vllm --server                        # on ProductQA's prompts, with vLLM

With `--checkpoint` (a folder of `agile train` or `agile demo`) its agent plays; without, random weights answer with
invalid actions, in turns and contexts of like lengths. Rows are repeated in turn, and the medians compared: other work
on the machine hits all rows alike. Prefilled are the prompt tokens that no cache held; every run starts with empty
caches. One at a time plays every 16th stream, whose sessions are the same in every row: a seed belongs to its session.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from rich.console import Console
from rich.table import Table

from agile.build import Setup
from agile.config import load_config
from agile.executor import Executor
from agile.policies import HFPolicy
from agile.policies.vllm import VLLMPolicy
from agile.policies.vllm_http import server_command
from agile.policies.vllm_server import VLLMServerPolicy
from agile.protocols import Policy, TrainablePolicy
from agile.rollout import collect
from agile.types import BLAMELESS, Stream, Usage


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
        if broken := [s for s in sessions if s.status in BLAMELESS]:
            raise SystemExit(f"{len(broken)} of {len(sessions)} sessions failed, the first: {broken[0].error}")
        return Run(len(sessions), time.perf_counter() - began, sum((s.usage for s in sessions), Usage()))


def rows(
    bench: Bench, streams: Sequence[Stream], args: argparse.Namespace, folder: Path, stack: ExitStack
) -> dict[str, Callable[[], Run]]:
    """What is measured, by name; the first is what the others are compared to."""
    tokenizer, config = bench.executor.codec.tokenizer, bench.setup.config
    model = bench.setup.language_model(tokenizer, args.agent)

    def hf(slots: int, *groups: Sequence[Stream], reuse: bool = True) -> Callable[[], Run]:
        """A policy a run: none begins with a warm cache."""
        return lambda: bench.play(HFPolicy(model, max_batch_size=slots, reuse=reuse), *groups)

    found = {
        "one at a time": hf(1, *([s] for s in streams[::16])),
        f"HF, {len(streams)}": hf(len(streams), streams),
        f"HF, {len(streams)}, no reuse": hf(len(streams), streams, reuse=False),
    }
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    limits: dict[str, Any] = {"max_model_len": config.rollout.max_context_tokens, "num_tokens": len(tokenizer)}
    engine: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_gib": 1,
        "enforce_eager": True,
        "block_size": args.block_size,
    }

    def vllm(policy: TrainablePolicy) -> Callable[[], Run]:
        """New weights before each run, as between two iterations: they empty the prefix cache."""
        stack.callback(policy.close)

        def run() -> Run:
            policy.update_weights(model.named_parameters(remove_duplicate=False), version=next(versions))
            return bench.play(policy, streams)

        return run

    versions = itertools.count(1)
    if args.vllm:
        found[f"vLLM, {len(streams)}"] = vllm(VLLMPolicy(folder / "model", **limits, **engine))
    if args.server:
        url = stack.enter_context(server(folder, limits["max_model_len"], engine))
        weights_dir = folder / "weights"
        policy = VLLMServerPolicy(folder / "model", [url], dtype="float32", weights_dir=weights_dir, **limits)
        found[f"vLLM server, {len(streams)}"] = vllm(policy)
    return found


@contextmanager
def server(folder: Path, max_model_len: int, engine: dict[str, Any]) -> Iterator[str]:
    """A vLLM server of `<folder>/model` on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        command = server_command(folder / "model", port, max_model_len=max_model_len, **engine)
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                try:
                    httpx2.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx2.HTTPError:
                    if process.poll() is not None:
                        raise SystemExit(f"The server ended:\n{(folder / 'server.log').read_text()[-2000:]}") from None
                    time.sleep(1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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


def show(medians: dict[str, dict[str, float]], task: str, console: Console) -> None:
    table = Table(title=f"rollouts on {task}; the last columns are tokens a session")
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
    parser.add_argument("--data", type=Path, help="ProductQA's files; MiniShop without")
    parser.add_argument("--vllm", action="store_true", help="also vLLM in this process")
    parser.add_argument("--server", action="store_true", help="also a vLLM server, which it starts")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per block of vLLM's prefix cache")
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default 64)")
    parser.add_argument("--sessions", type=int, default=10, help="sessions of each stream (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    overrides, name = ["memory.encoder=hashing"], "demo"
    if args.data:
        overrides, name = [*overrides, f"task.data={args.data}", "task.max_items=null"], "productqa-tiny"
    else:
        overrides += [f"task.num_train_worlds={args.streams}", "task.num_test_worlds=1"]
    args.agent = None
    if args.checkpoint is None:
        overrides += ["rollout.max_action_tokens=6", "rollout.max_invalid_actions=2"]
    else:
        args.agent = next(a for a in (args.checkpoint / "ppo", args.checkpoint / "sft") if a.exists())
    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml", overrides)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        setup = Setup(config, folder)
        bench = Bench(setup, setup.executor(setup.tokenizer(args.agent)), args.seed)
        starts = ((s, i) for i in itertools.count(0, args.sessions) for s in setup.task.streams("train"))
        parts = (Stream(f"{s.id}/{i}", s.items[i : i + args.sessions]) for s, i in starts)
        streams = list(itertools.islice(parts, args.streams))
        setup.embed(streams)
        medians = measure(rows(bench, streams, args, folder, stack), args.repeats)
    show(medians, "ProductQA" if args.data else "MiniShop", Console())
    if args.out:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        shown = {k: str(v) for k, v in vars(args).items() if v is not None}
        args.out.write_text(json.dumps({"arguments": shown, "machine": machine, "rows": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
