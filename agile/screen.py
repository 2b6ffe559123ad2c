"""What the commands say to a person: the terminal, and errors on one screen."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from agile import ranks
from agile.errors import AgileError

console = Console(emoji=False, highlight=False)
_errors = Console(stderr=True, emoji=False, highlight=False)


@contextmanager
def one_screen() -> Iterator[None]:
    """What a user can mend is printed without a traceback; exit code 2."""
    try:
        yield
    except AgileError as error:
        with ranks.failing() as first:
            if first:
                _errors.print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        with ranks.failing() as first:
            if first:
                _errors.print("\nStopped. What was saved is complete; demo and train go on from there by --resume.")
        raise typer.Exit(130) from None
    except Exception:
        if ranks.world_size() == 1:
            raise
        with ranks.failing() as first:
            if first:
                traceback.print_exc()
        raise typer.Exit(1) from None
