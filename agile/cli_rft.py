"""The command `agile rft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agile.cli_words import parse
from agile.screen import RESUMES, console, one_screen


def add_to(app: typer.Typer) -> None:
    """Add it to the command line."""
    app.command()(rft)


def rft(
    train: Annotated[Path, typer.Option("--train", help="Train rows, JSON lines.", show_default=False)],
    validation: Annotated[Path, typer.Option("--validation", help="Validation rows.", show_default=False)],
    grader: Annotated[
        str, typer.Option("--grader", help="Its file, or a function as module.name.", show_default=False)
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="n_epochs, batch_size, learning_rate_multiplier, compute_multiplier, eval_interval, eval_samples as "
            "name=value, any setting of configs/rft.yaml as a.b=value, and out=DIR.",
            metavar="name=value",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Hugging Face folder; a small one from scratch without it.", show_default=False),
    ] = None,
    imitate: Annotated[
        Path | None, typer.Option("--imitate", help="Rows that end in an answer, imitated first.", show_default=False)
    ] = None,
    response_format: Annotated[
        Path | None, typer.Option("--response-format", help="The hosted API's, JSON.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the files and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")] = False,
) -> None:
    """Run reinforcement fine-tuning files: rows of messages, and a grader that says what an answer is worth.

    Checks all files, each problem with its line; then trains by PPO with several answers to each row, validates at
    intervals, keeps the best, and stops where validation falls. The run folder (`runs/rft`) then holds the model as
    the folder `ppo`, `report.html` with the validation rows before and after, `rewards.png`, and what every run has.

    - `agile rft --train t.jsonl --validation v.jsonl --grader g.json --check`
    - `agile rft --train t.jsonl --validation v.jsonl --grader g.json --model DIR n_epochs=50`
    - `agile rft --train t.jsonl --validation v.jsonl --grader g.json --imitate s.jsonl out=runs/mine`
    """
    with one_screen(RESUMES):
        out, rest = parse(words or [], "runs/rft")

        from agile.rft_files import Files, rft_config

        config = rft_config(Files(train, validation, grader, model, imitate, response_format), rest)
        if check:
            console.print("Valid: all rows, and the grader.")
            return

        from agile.rft import run_rft
        from agile.rft_report import headline

        report = run_rft(config, out, console, resume=resume)
        console.print(f"\n{headline(report)}\nReport: {out / 'report.html'}\nModel: {out / 'ppo'}", soft_wrap=True)
