"""Tokens trained per second: rows in one line against rows padded, and prefixes computed once against every time.

    python benchmarks/packing.py

One thread, forward and backward of `sft_loss` with the critic's values, on random tokens of the lengths given. The ways
are timed in turns, and the least time of each counts, so that what else runs on the machine weighs on all alike. Tokens
are those of the rows, padding not counted, shared ones counted in each row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from agile.batching import Row, make_batch, micro_batches
from agile.losses import sft_loss, token_logprobs
from agile.model import ActorCritic
from agile.types import SegmentEnd

CPU = torch.device("cpu")
VOCABULARY = 512


def row(rng: np.random.Generator, prefix: Sequence[int], length: int) -> Row:
    """A row with a prompt and a tail; every fourth token of the tail is sampled."""
    ids = np.concatenate([np.array(prefix, np.int64), rng.integers(3, VOCABULARY, length - len(prefix))])
    mask = np.arange(length) % 4 == 3
    mask[: len(prefix)], mask[-1] = False, True
    return Row(ids, mask, np.zeros(int(mask.sum()), np.float32), SegmentEnd.TERMINATED)


def shapes(rng: np.random.Generator) -> dict[str, list[Row]]:
    """Rows by what they are like."""
    prompt = rng.integers(3, VOCABULARY, 1000).tolist()
    short = rng.integers(40, 91, 64)

    def pairs(count: int) -> list[Row]:
        starts = [prompt[20 * (i % count) :][:20] if i < 2 * count else [] for i in range(len(short))]
        return [row(rng, start, n) for start, n in zip(starts, short, strict=True)]

    return {
        "64 rows of 40 to 90 tokens (MiniShop)": [row(rng, [], n) for n in short],
        "the same, the first 12 in common": [row(rng, prompt[:12], n) for n in short],
        "the same, 3 pairs with 20 in common": pairs(3),
        "the same, 12 pairs with 20 in common": pairs(12),
        "the same, the first 24 in common": [row(rng, prompt[:24], n) for n in short],
        "32 rows of 20 to 600 tokens": [row(rng, [], int(20 * 30 ** rng.random())) for _ in range(32)],
        "8 rows of 450 tokens, 400 in common (ProductQA)": [row(rng, prompt[:400], 450) for _ in range(8)],
        "8 rows of 1,050 tokens, 1,000 in common": [row(rng, prompt, 1050) for _ in range(8)],
        "4 x 4 rows of 300, 150 in common, 250 of each 4": [
            row(rng, [*prompt[:150], *prompt[150 + 100 * i : 250 + 100 * i]], 300) for i in range(4) for _ in range(4)
        ],
    }


def backward(model: ActorCritic, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
    logprobs = token_logprobs(logits, ids)
    loss = sft_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), num_tokens=len(ids))
    (loss + values.square().mean()).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def padded(model: ActorCritic, rows: Sequence[Row], max_tokens: int) -> None:
    """As it is done without packing: rows of like length side by side, padded on the right, SDPA's causal mask."""
    batches: list[list[Row]] = []
    for r in sorted(rows, key=len):
        if not batches or (len(batches[-1]) + 1) * len(r) > max_tokens:
            batches.append([])
        batches[-1].append(r)
    for batch in batches:
        shape = len(batch), max(map(len, batch))
        ids, mask, actions = (np.zeros(shape, dtype) for dtype in (np.int64, np.int64, bool))
        for i, r in enumerate(batch):
            ids[i, : len(r)], mask[i, : len(r)], actions[i, : len(r)] = r.token_ids, 1, r.action_mask
        output = model.lm.base_model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False
        )
        hidden = output.last_hidden_state[:, :-1][torch.from_numpy(actions[:, 1:])]
        action_ids = torch.from_numpy(np.concatenate([r.action_ids for r in batch]))
        backward(model, model.lm.get_output_embeddings()(hidden), model.value_head(hidden.detach()), action_ids)


def packed(model: ActorCritic, rows: Sequence[Row], max_tokens: int, *, share_prefixes: bool) -> None:
    (micros,) = micro_batches(rows, np.arange(len(rows)), max_tokens, share_prefixes=share_prefixes)
    for micro in micros:
        batch = make_batch([rows[i] for i in micro], CPU, share_prefixes=share_prefixes)
        logits, values, _ = model(batch)
        backward(model, logits, values, batch.action_ids)


def seconds(ways: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """The least processor time of each, taken in turns."""
    found = [[0.0] * rounds for _ in ways]
    for n in range(rounds):
        for i in range(len(ways))[:: 1 if n % 2 else -1]:  # there and back: none always comes after the same one
            start = time.process_time()
            ways[i]()
            found[i][n] = time.process_time() - start
    return [min(times[1:] or times) for times in found]  # the first of each warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=4096, help="budget of a micro-batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        max_position_embeddings=2048,
    )
    model = ActorCritic(LlamaForCausalLM(config))
    table = Table("rows", "tokens", "of them stored", "padded", "packed", "shared", "packed/padded", "shared/packed")
    for name, rows in shapes(np.random.default_rng(0)).items():
        tokens = sum(map(len, rows))
        stored = len(make_batch(rows, CPU, share_prefixes=True).input_ids)
        times = seconds(
            (
                lambda rows=rows: padded(model, rows, args.max_tokens),  # type: ignore[misc]
                lambda rows=rows: packed(model, rows, args.max_tokens, share_prefixes=False),  # type: ignore[misc]
                lambda rows=rows: packed(model, rows, args.max_tokens, share_prefixes=True),  # type: ignore[misc]
            ),
            args.rounds,
        )
        rates = [tokens / s for s in times]
        table.add_row(
            name,
            f"{tokens:,}",
            f"{stored / tokens:.0%}",
            *(f"{rate:,.0f}/s" for rate in rates),
            f"{rates[1] / rates[0]:.2f}",
            f"{rates[2] / rates[1]:.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
