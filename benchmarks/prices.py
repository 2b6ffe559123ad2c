"""One policy for every price: trained with the price in its prompt, against policies trained for one price each.

    python -m benchmarks.prices runs/prices --jobs 2

The shops hold facts that can be guessed more or less well (85, 75, 65 and 50 %), so that what is worth asking depends
on the price. One agent is trained by imitation of a teacher who leans to what pays at each price; PPO then starts from
it once for every price, and once for each price alone. All are trained alike, but that the one for every price plays
each stream five times, at prices drawn each time, and learns from batches five times as large: at each price it has
played as much as the policy for that price alone. All are tested on unseen shops, the first at every price.

Whatever is done stands in the folder: started again, it goes on. Takes about an hour of one core: a quarter of it is
imitation, a quarter the policy for every price.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agile.evaluate import paired_difference, summarise
from benchmarks.credit import GRADED, bench, imitate, run, shops, tested

PRICES = (0.1, 0.2, 0.3, 0.4, 0.5)
SHOPS = replace(GRADED, num_test_worlds=48)
DRAWN = f"task.training_prices={list(PRICES)}"
IMITATION = (
    *("agent.show_price=true", "sft.judge_yes=0.7", DRAWN),
    *("sft.sessions_per_item=20", "sft.num_steps=2600"),  # with fewer it learns sessions by heart, not what prices mean
)
ALL = "every"


def reinforce(out: Path, seed: int, name: str, overrides: Sequence[str]) -> None:
    """PPO for one price, or for every price."""
    more = f"ppo.rollouts_per_stream={len(PRICES)}", f"ppo.batch_size={64 * len(PRICES)}"
    prices = [DRAWN, *more] if name == ALL else [f"task.advice_price={name}"]
    tests = [f"evaluate.prices={list(PRICES)}"] if name == ALL else []
    folder = out / f"price-{name}-{seed}"
    if not (folder / "ppo" / "config.json").exists():
        start = f"model.path={out / f'imitation-{seed}' / 'sft'}", "sft.num_steps=0"
        rates = "agent.show_price=true", "ppo.lr_schedule=linear"
        run(folder, *shops(out, "graded", SHOPS, seed), *rates, *prices, *start, *overrides)
    if not (folder.with_name(f"{folder.name}-test") / "report.json").exists():
        bench(folder, "ppo", *tests)


def compare(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for price in PRICES:
        every, only = (
            [o for seed in seeds for o in tested(out / f"price-{name}-{seed}-test", seed, price)]
            for name in (ALL, f"{price:g}")
        )
        rows.append(
            {
                "price": price,
                ALL: {k: v for k, v in summarise(every, price).items() if not k.startswith("by_")},
                "only": {k: v for k, v in summarise(only, price).items() if not k.startswith("by_")},
                "difference": paired_difference(every, only, price),
            }
        )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Score and advice rate at each price, of the one policy and of the five."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("score", "advice_rate"), strict=True):
        for name, label in ((ALL, "one policy for every price"), ("only", "one policy for each price")):
            axes.plot(PRICES, [row[name][key] for row in rows], marker="o", label=label)
            if key == "score":
                low, high = zip(*(row[name]["score_ci"] for row in rows), strict=True)
                axes.fill_between(PRICES, low, high, alpha=0.15)
        axes.set(xlabel="price of advice", ylabel=key.replace("_", " "), xticks=PRICES)
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs; goes on where it was stopped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("overrides", nargs="*", help="changes of every PPO run, a.b=value", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [(seed, name) for name in (ALL, *(f"{p:g}" for p in PRICES)) for seed in args.seeds]
    for seed in args.seeds:  # before the threads, which would write the same folder
        shops(out, "graded", SHOPS, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: imitate(out, seed, *IMITATION), args.seeds))
        list(pool.map(lambda job: reinforce(out, job[0], job[1], args.overrides), todo))
    rows = compare(out, args.seeds)
    (out / "prices.json").write_text(json.dumps(rows, indent=2))
    plot(rows, out / "prices.png")
    table = Table(title="one policy for every price, and one policy for each")
    for name in ("price", "advice", "accuracy", "score", "95 %", "one for each: advice", "score", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        every, only, d = row[ALL], row["only"], row["difference"]
        table.add_row(
            f"{row['price']:g}",
            *(f"{every['advice_rate']:.1%}", f"{every['accuracy']:.1%}", f"{every['score']:.3f}"),
            "{:.3f} to {:.3f}".format(*every["score_ci"]),
            *(f"{only['advice_rate']:.1%}", f"{only['score']:.3f}"),
            f"{d['difference']:+.3f} ({d['ci'][0]:+.3f} to {d['ci'][1]:+.3f})",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
