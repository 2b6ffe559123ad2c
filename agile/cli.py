"""The command line: `agile demo`, `train`, `bench`, `chat`, `minishop`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from agile.errors import AgileError

app = typer.Typer(
    name="agile",
    help="Train language-model agents that look up, remember, and ask people only when it is worth the price.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="a.b=value changes the config; out=DIR is the run folder (default under runs/).", metavar="[a.b=value]..."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")]


@contextmanager
def _one_screen() -> Iterator[None]:
    """What a user can mend is printed without a traceback; exit code 2."""
    try:
        yield
    except AgileError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("Stopped. What was saved is complete; --resume goes on from there.")
        raise typer.Exit(130) from None


def _parse(overrides: list[str] | None, default_out: str) -> tuple[Path, list[str]]:
    """The run folder, and the overrides without it."""
    rest = [o for o in overrides or [] if not o.startswith("out=")]
    outs = [o.removeprefix("out=") for o in overrides or [] if o.startswith("out=")]
    return Path(outs[-1] if outs else default_out), rest


def _quiet() -> None:
    """Libraries that print to the terminal at import and at start."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Another seed is another set of worlds and another run.")] = 0,
    resume: Resume = False,
) -> None:
    """Watch an agent learn end to end, on a CPU, in minutes.

    Writes small shop worlds, teaches a tiny model by imitation, improves it by PPO on what answers are worth and what
    advice costs, and compares it with agents that do not learn, on worlds that it has never seen.

    Example: agile demo --seed 1 out=runs/demo-1
    """
    with _one_screen():
        _quiet()
        from agile.config import load_config
        from agile.demo import run_demo

        out, rest = _parse(overrides, "runs/demo")
        config = load_config(Path(__file__).parent / "configs" / "demo.yaml", [*rest, f"seed={seed}"])
        run_demo(config, out, console, resume=resume)


@app.command()
def train(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train an agent by imitation, then by PPO.

    Leaves checkpoints, metrics.jsonl, TensorBoard files, every session token by token, and the agents as Hugging Face
    folders `sft` and `ppo`. Killing it loses nothing: --resume gives the same run.

    Example: agile train configs/productqa-tiny.yaml task.data=DIR ppo.lr=1e-4 out=runs/mine
    """
    with _one_screen():
        _quiet()
        from agile.config import load_config
        from agile.training import train as run

        out, rest = _parse(overrides, f"runs/{config.stem}")
        run(load_config(config, rest), out, resume=resume)
        console.print(f"Trained: {out}. Score it: agile bench {config} evaluate.checkpoint={out}", soft_wrap=True)


@app.command()
def bench(config: Config, overrides: Overrides = None) -> None:
    """Score agents and baselines on the test questions of a task.

    With evaluate.checkpoint=RUN the agents that this run trained, and the baselines; without, the baselines alone.
    Writes report.json, report.html and report.png.

    Example: agile bench configs/productqa-baselines.yaml task.data=DIR
    """
    with _one_screen():
        _quiet()
        from agile.bench import bench as run
        from agile.config import load_config
        from agile.report import render_table

        out, rest = _parse(overrides, f"runs/{config.stem}-bench")
        loaded = load_config(config, rest)
        render_table(run(loaded, out, loaded.evaluate.checkpoint), console)
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="Run folder with a trained agent.")] = Path("runs/demo"),
    memory: Annotated[Path | None, typer.Option(help="Where it remembers; default: chat.sqlite in the run.")] = None,
) -> None:
    """Ask the trained agent about a shop; where it asks for advice, you are its expert, and it remembers.

    Example: agile chat runs/demo
    """
    with _one_screen():
        _quiet()
        from agile.chat import run_chat

        run_chat(run, memory or run / "chat.sqlite", console)


@app.command()
def minishop(
    folder: Annotated[Path, typer.Argument(help="Where to write the worlds; must not hold anything yet.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same files.")] = 0,
) -> None:
    """Write MiniShop worlds in ProductQA's file format.

    Example: agile minishop worlds task.num_train_worlds=10 task.num_questions=60
    """
    with _one_screen():
        from agile.config import load_config
        from agile.tasks.minishop import MiniShopSpec, write_minishop

        task = load_config(None, overrides or []).task
        write_minishop(folder, MiniShopSpec(task.num_train_worlds, task.num_test_worlds, task.num_questions), seed)
        console.print(f"{task.num_train_worlds} train and {task.num_test_worlds} test worlds in {folder}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
