"""`agile grade`: the command line of graders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from agile.screen import console, one_screen

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Check a grader of reinforcement fine-tuning, or grade samples with it.",
)
AsJson = Annotated[bool, typer.Option("--json", help="For machines; errors go to stderr.")]


@app.command("validate")
def validate(
    grader: Annotated[Path, typer.Argument(help="Grader file, JSON.", show_default=False)], as_json: AsJson = False
) -> None:
    """Check a grader file: fields, templates, formula, labels, range, Python source. Nothing of it is run.

    Exit codes: 0 valid, 2 not.

    - `agile grade validate grader.json`
    """
    with one_screen():
        from agile.tasks.graders import command

        command.validate(grader, console, as_json=as_json)


@app.command("run")
def run(
    grader: Annotated[str, typer.Argument(help="Grader file, or function as module.name.", show_default=False)],
    sample: Annotated[
        Path, typer.Argument(help='{"model_sample": TEXT, "item": {...}}; .jsonl: one a line.', show_default=False)
    ],
    as_json: AsJson = False,
    base_url: Annotated[
        str, typer.Option(help="OpenAI-compatible endpoint of model graders.")
    ] = "https://api.openai.com/v1",
    api_key_env: Annotated[str, typer.Option(help="Variable that holds its key; empty for none.")] = "OPENAI_API_KEY",
    cache: Annotated[
        Path | None, typer.Option(help="SQLite file that keeps what models answered.", show_default=False)
    ] = None,
    time_s: Annotated[float, typer.Option("--time", min=0.1, help="Limit of a python grader, seconds.")] = 120.0,
) -> None:
    """Grade samples.

    Exit codes: 0 graded, 1 graded with an error (which `errors` names), 2 not graded.

    - `agile grade run grader.json sample.json`
    - `agile grade run grader.json samples.jsonl --base-url http://localhost:8000/v1 --api-key-env "" --json`
    - `agile grade run my_rewards.grade samples.jsonl`
    """
    with one_screen():
        from agile.tasks.graders import Limits, command

        found, cases = command.find_grader(grader), command.read_cases(sample)
        key, limits = api_key_env or None, Limits(time_s=time_s)
        grades = command.run(found, cases, base_url=base_url, api_key_env=key, cache=cache, limits=limits)
        if as_json:
            for result in grades:
                typer.echo(json.dumps(result.to_json()))
        else:
            command.print_grades(grades, console)
        if any(result.errors.kinds for result in grades):
            raise typer.Exit(1)
