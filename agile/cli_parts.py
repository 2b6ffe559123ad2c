"""What the commands of the command line share."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from agile import ranks
from agile.errors import AgileError

console = Console(emoji=False, highlight=False)
errors = Console(stderr=True, emoji=False, highlight=False)

Config = Annotated[Path, typer.Argument(help="YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes of the config, such as ppo.lr=1e-4, and out=DIR.", metavar="a.b=value"),
]


@contextmanager
def one_screen() -> Iterator[None]:
    """What a user can mend is printed without a traceback; exit code 2."""
    try:
        yield
    except AgileError as error:
        with ranks.failing() as first:
            if first:
                errors.print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        with ranks.failing() as first:
            if first:
                errors.print("\nStopped. What was saved is complete; demo and train go on from there by --resume.")
        raise typer.Exit(130) from None
    except Exception:
        if ranks.world_size() == 1:
            raise
        with ranks.failing() as first:
            if first:
                traceback.print_exc()
        raise typer.Exit(1) from None


def parse(words: Sequence[str], default_out: str) -> tuple[Path, list[str]]:
    """The run folder, and the overrides without it."""
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    if "" in outs:
        raise AgileError("out= names no folder. Write out=DIR, for example out=runs/mine.")
    return Path([default_out, *outs][-1]).expanduser(), [word for word in words if not word.startswith("out=")]
