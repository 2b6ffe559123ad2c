"""`agile grade`: the command line of graders."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agile.errors import AgileError
from agile.screen import console, one_screen

if TYPE_CHECKING:
    from agile.policies.endpoint import Endpoint

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Check a grader of reinforcement fine-tuning, or grade samples with it.",
)
OPENAI = "https://api.openai.com/v1"
BaseUrl = Annotated[str, typer.Option(help="OpenAI-compatible endpoint of model graders.")]
ApiKeyEnv = Annotated[str, typer.Option(help="Variable that holds its key; empty for none.")]
Cache = Annotated[Path | None, typer.Option(help="SQLite file that keeps what models answered.", show_default=False)]
Time = Annotated[float, typer.Option("--time", min=0.1, help="Limit of a python grader, seconds.")]
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
    base_url: BaseUrl = OPENAI,
    api_key_env: ApiKeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    time_s: Time = 120.0,
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


@app.command("serve")
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on, of 127.0.0.1.")] = 8001,
    base_url: BaseUrl = OPENAI,
    api_key_env: ApiKeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    time_s: Time = 120.0,
) -> None:
    """Answer the hosted API's grader endpoints on this machine, so that scripts need another base URL alone.

    `POST /v1/fine_tuning/alpha/graders/validate` and `/run`. Needs the extra `serve`.

    - `agile grade serve`
    - `OPENAI_BASE_URL=http://127.0.0.1:8001/v1 OPENAI_API_KEY=none python my_script.py`
    """
    with one_screen():
        from agile.extras import needs

        with needs("serve"):
            import uvicorn

            from agile.tasks.graders import http
        from agile.tasks.graders import Limits

        def endpoint() -> Endpoint:
            from agile.policies.endpoint import Endpoint

            key = api_key_env or None
            return Endpoint(base_url, "", api_key_env=key, cache=cache, section="the endpoint's settings")

        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((http.HOST, port))
                listener.listen()  # from here on nobody is refused
            except OSError as error:
                raise AgileError(
                    f"Cannot listen on {http.HOST}:{port}: {error.strerror}. Choose another --port."
                ) from None
            console.print(f"Graders are at http://{http.HOST}:{port}/v1 (base_url); Ctrl-C ends.", soft_wrap=True)
            app = http.graders_app(endpoint, Limits(time_s=time_s))
            uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
