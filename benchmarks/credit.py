"""Does credit through memory make an agent ask earlier, and score more? Four modes, on shops of two kinds.

    python -m benchmarks.credit runs/credit --seeds 0 1 2 --jobs 2

Most questions have an answer that is right in 55 % of the cases, and advice costs 0.7: for one session alone, guessing
is worth more than asking. In the shops `recurring`, questions come again: there, asking at first pays. In the shops
`unique`, nothing comes again, and nobody should be better than the agent without credit. For each seed, one agent is
trained by imitation, which guesses and asks; from it, PPO starts in each kind of shop with each mode. All are tested on
unseen shops.

Whatever is done stands in the folder: started again, it goes on. Takes about 4 minutes of one core a run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agile.evaluate import Outcome, outcomes, paired_difference, summarise
from agile.session_log import logged_sessions
from agile.tasks.minishop import MiniShopSpec, write_minishop
from agile.types import Session, Trajectory

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
PRICE = 0.7
GRADED = MiniShopSpec(
    64, 24, 40, search=0.1, metadata=0.1, history=0.15, knowledge=0.1, skewed=0.55, guessable=(0.85, 0.75, 0.65)
)
WORLDS = {
    "recurring": MiniShopSpec(
        64,
        24,
        60,
        num_products=3,
        search=0.08,
        metadata=0.07,
        history=0.1,
        knowledge=0.15,
        skewed=0.6,
        guessable=(0.55, 0.55, 0.55),
    ),
    "unique": MiniShopSpec(
        64,
        24,
        40,
        search=0.15,
        metadata=0.15,
        history=0.1,
        knowledge=0.1,
        skewed=0.5,
        recurring=False,
        guessable=(0.55, 0.55, 0.55),
    ),
}
MODES: dict[str, tuple[str, ...]] = {
    "none": (),
    "utility": ("ppo.utility_beta=0.3",),
    # returns fall along the stream: the critic must know where it stands, which the policy's trunk has forgotten
    "chain": ("ppo.gamma_session=0.95", "ppo.lam_session=0.95", "model.critic=separate"),
    "lineage": ("ppo.gamma_session=0.98",),
}


def run(folder: Path, *overrides: str) -> None:
    """`agile train` in a process of its own, gone on with if it was stopped; its output goes to `<folder>.log`."""
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    cache = f"memory.cache={folder.parent / 'embeddings.sqlite'}"  # one for all runs: they ask the same questions
    command = [sys.executable, "-m", "agile.cli", "train", str(DEMO), cache, f"out={folder}", *resume]
    command += ["ppo.lr_schedule=constant", *overrides]  # constant as it was for the figures in docs/
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {folder}.log")


def bench(folder: Path, agent: str, *overrides: str) -> None:
    """`agile bench` of one agent of a run, into `<folder>-test`."""
    command = [sys.executable, "-m", "agile.cli", "bench", str(folder / "config.yaml"), f"evaluate.checkpoint={folder}"]
    command += [f"evaluate.agents=[{agent}]", "evaluate.baselines=[]", f"out={folder}-test", *overrides]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def shops(out: Path, name: str, spec: MiniShopSpec, seed: int) -> list[str]:
    """Overrides that name the shops of a kind, which are written if they are not there."""
    if not (data := out / f"{name}-{seed}").exists():
        write_minishop(data, spec, seed)
    return [f"seed={seed}", "threads=1", f"task.data={data}"]


def imitate(out: Path, seed: int, *overrides: str) -> None:
    """The agent of a seed that all of its runs start from; it guesses as often as the answer allows."""
    folder = out / f"imitation-{seed}"
    if not (folder / "sft" / "config.json").exists():
        teacher = "sft.judge_yes=1.0", "sft.sessions_per_item=3"
        run(folder, *shops(out, "graded", GRADED, seed), *teacher, *overrides, "ppo.num_iterations=0")


def reinforce(out: Path, seed: int, world: str, mode: str, overrides: Sequence[str]) -> None:
    folder = out / f"{world}-{mode}-{seed}"
    if not (folder / "ppo" / "config.json").exists():
        run(
            folder,
            *shops(out, world, WORLDS[world], seed),
            *(f"task.advice_price={PRICE}", f"ppo.credit={mode}", *MODES[mode]),
            *(f"model.path={out / f'imitation-{seed}' / 'sft'}", "sft.num_steps=0", "ppo.streams_per_iteration=16"),
            *overrides,
        )
    if not (folder.with_name(f"{folder.name}-test") / "report.json").exists():
        bench(folder, "ppo")


def tested(folder: Path, seed: int, price: float = PRICE) -> list[Outcome]:
    """Outcomes of a run's test sessions at this price, streams named by seed."""
    sessions: dict[str, list[Session]] = {}
    for logged in logged_sessions(folder):
        if logged.session.price != price:
            continue
        sessions.setdefault(logged.session.stream_id, []).append(logged.session)
    results = outcomes(Trajectory(name, tuple(found)) for name, found in sessions.items())
    return [replace(o, stream_id=f"{seed}/{o.stream_id}") for o in results]


def summary(results: Sequence[Outcome], none: Sequence[Outcome]) -> dict[str, Any]:
    asked = [o.position / o.length for o in results if o.advised]
    return {
        **{k: v for k, v in summarise(results, PRICE, bins=10).items() if k != "by_type"},
        "mean_position_of_advice": sum(asked) / len(asked) if asked else None,
        "first_quarter": advice_rate(o for o in results if o.position < o.length / 4),
        "last_quarter": advice_rate(o for o in results if o.position >= 3 * o.length / 4),
        "against_none": paired_difference(results, none, PRICE),
    }


def advice_rate(results: Iterable[Outcome]) -> float:
    asked = [o.advised for o in results]
    return sum(asked) / len(asked)


def render(report: dict[str, dict[str, Any]], console: Console) -> None:
    for world, modes in report.items():
        table = Table(title=f"{world} questions, advice at {PRICE:g}")
        for name in ("credit", "score", "95 %", "against none", "advice", "first quarter", "last", "accuracy"):
            table.add_column(name, justify="left" if name == "credit" else "right")
        for mode, s in modes.items():
            d = s["against_none"]
            table.add_row(
                mode,
                f"{s['score']:.3f}",
                "{:.3f} to {:.3f}".format(*s["score_ci"]),
                "" if mode == "none" else f"{d['difference']:+.3f} ({d['ci'][0]:+.3f} to {d['ci'][1]:+.3f})",
                *(f"{s[key]:.1%}" for key in ("advice_rate", "first_quarter", "last_quarter", "accuracy")),
            )
        console.print(table)


def plot(report: dict[str, dict[str, Any]], path: Path) -> None:
    """Advice over the stream, a panel for each kind of shop."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(report), 3.6), layout="constrained")
    panels = figure.subplots(1, len(report), squeeze=False, sharey=True)[0]
    for axes, (world, modes) in zip(panels, report.items(), strict=True):
        for mode, s in modes.items():
            parts = s["by_position"]
            middle = [(p["from"] + p["to"]) / 2 for p in parts]
            axes.plot(middle, [p["advice_rate"] for p in parts], marker="o", label=f"{mode}: {s['score']:.3f}")
        axes.set(title=f"{world} questions", xlabel="share of the stream", ylabel="advice rate", ylim=(0, None))
        axes.legend(title="credit: score", loc="upper right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs; goes on where it was stopped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("overrides", nargs="*", help="changes of every PPO run, a.b=value", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [(seed, world, mode) for world in args.worlds for seed in args.seeds for mode in args.modes]
    for seed in args.seeds:  # before the threads, which would write the same folders
        for name, spec in {"graded": GRADED, **{world: WORLDS[world] for world in args.worlds}}.items():
            shops(out, name, spec, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: imitate(out, seed), args.seeds))
        list(pool.map(lambda job: reinforce(out, job[0], job[1], job[2], args.overrides), todo))
    report: dict[str, dict[str, Any]] = {}
    for world in args.worlds:
        pooled = {
            mode: [o for seed in args.seeds for o in tested(out / f"{world}-{mode}-{seed}-test", seed)]
            for mode in args.modes
        }
        none = pooled.get("none", next(iter(pooled.values())))
        report[world] = {mode: summary(results, none) for mode, results in pooled.items()}
    (out / "credit.json").write_text(json.dumps(report, indent=2))
    plot(report, out / "credit.png")
    render(report, Console(width=140))


if __name__ == "__main__":
    main()
