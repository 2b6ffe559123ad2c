"""The commands `agile serve`, `agile serve-swap` and `agile serve-user`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agile.cli_words import Config, Overrides, parse
from agile.errors import AgileError
from agile.screen import console, one_screen

if TYPE_CHECKING:
    from agile.serve.database import Database

users = typer.Typer(no_args_is_help=True, help="Accounts of `agile serve`: who may ask, answer and administer.")
OUT = "runs/serve"
Name = Annotated[str, typer.Argument(help="Name of the user.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        help="Config of the server (default: configs/serve.yaml), out=DIR and changes.", metavar="[CONFIG] [a.b=value]"
    ),
]
Password = Annotated[
    str,
    typer.Option(prompt=True, hide_input=True, confirmation_prompt=True, envvar="AGILE_PASSWORD", help="Asked for."),
]
CONFIG = Path(__file__).parent / "configs" / "serve.yaml"


def add_to(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(serve)
    app.command("serve-swap")(serve_swap)
    app.add_typer(users, name="serve-user")


def serve(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", show_default=False)] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy on this machine encrypts and passes on.")
    ] = False,
) -> None:
    """Let people ask a trained agent, and experts answer it in a web page.

    Speaks OpenAI's chat completions API at `/v1`, and has a desk at `/desk/queue`. Questions, answers, what the agent
    remembers and accounts are in a database; sessions are logged in `runs/serve` for `agile show`. Needs the extra
    `serve`. docs/serve.md says more.

    - `agile serve configs/serve.yaml`
    - `agile serve configs/serve.yaml serve.run=runs/mine serve.database=postgresql://desk@localhost/desk`
    """
    with one_screen():
        if (tls_cert is None) != (tls_key is None):
            raise AgileError("--tls-cert and --tls-key come together: a certificate and its key.")
        out, rest = parse(overrides or [], OUT)

        from agile.extras import needs

        with needs("serve"):
            from agile.serve.server import run_server

        tls = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
        run_server(config, rest, out, console, host=host, port=port, tls=tls, behind_proxy=behind_proxy)


def serve_swap(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run whose agent is to be served, and as for `serve` the config, out=DIR and changes.",
            metavar="RUN [CONFIG] [a.b=value]",
        ),
    ] = None,
    agent: Annotated[
        str | None, typer.Option(help="Which of its agents: sft, ppo or dpo (default: the newest).", show_default=False)
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Serve again what was served before.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for the server.")] = 120,
) -> None:
    """Have the server answer with another agent, without stopping it.

    What is asked from then on is answered by the agent of RUN; sessions under way end with the one that they began
    with. Products, tools, memory and price stay those of the server. A server that is started later serves it too.

    - `agile serve-swap runs/from-desk`
    - `agile serve-swap --back`
    """
    with one_screen():
        given = words or []
        runs = [word for word in given if "=" not in word and not word.endswith((".yaml", ".yml"))]
        if len(runs) != (not back):
            raise AgileError(f"expected one run, or --back and none, found {' '.join(runs) or 'none'}.")
        database = _database([word for word in given if word not in runs])

        from agile.serve.swap import swap

        swap(database, None if back else Path(runs[0]).expanduser(), agent, console, wait_s=wait_s)


@users.command("add")
def add(
    name: Name,
    password: Password,
    words: Words = None,
    role: Annotated[str, typer.Option(help="user, expert or administrator.")] = "user",
) -> None:
    """Make an account: users ask by API key, experts answer at the desk, administrators also see the metrics.

    - `agile serve-user add ann --role expert`
    """
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import add_user

        add_user(database, name, role, password)
        console.print(f"{name} can log in, as {role}.", markup=False)


@users.command("password")
def set_password(name: Name, password: Password, words: Words = None) -> None:
    """Set another password, and log the user out everywhere."""
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import set_password

        set_password(database, name, password)
        console.print(f"{name} has a new password.", markup=False)


@users.command("key")
def key(name: Name, words: Words = None) -> None:
    """Make an API key and print it; it cannot be seen again."""
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import add_key

        console.print(add_key(database, name), markup=False, soft_wrap=True)


@users.command("revoke-keys")
def revoke_keys(name: Name, words: Words = None) -> None:
    """End all API keys of a user."""
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import revoke_keys

        console.print(f"{revoke_keys(database, name)} keys of {name} ended.", markup=False)


@users.command("disable")
def disable(name: Name, words: Words = None) -> None:
    """Shut a user out; what they said stays."""
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import disable_user

        disable_user(database, name)
        console.print(f"{name} is shut out.", markup=False)


@users.command("list")
def list_users(words: Words = None) -> None:
    """Print all accounts."""
    with one_screen():
        database = _database(words)

        from agile.serve.accounts import users

        for user in users(database):
            console.print(f"{user.name}  {user.role}{'  disabled' if user.disabled else ''}", markup=False)


def _database(words: list[str] | None) -> Database:
    from agile.config import load_config
    from agile.extras import needs

    configs = [word for word in words or [] if "=" not in word]
    if len(configs) > 1:
        raise AgileError(f"{' and '.join(configs)}: expected one config, out=DIR, and changes as a.b=value.")
    out, rest = parse([word for word in words or [] if "=" in word], OUT)
    with needs("serve"):
        from agile.serve.database import Database, database_url
    return Database(database_url(load_config(Path(configs[0]) if configs else CONFIG, rest).serve.database, out))
