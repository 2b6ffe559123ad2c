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


# what the same command does after Ctrl-C
RESUMES = "the same command with --resume goes on from there."
GOES_ON = "the same command goes on from there."
BEGINS_AGAIN = "the same command begins again, but asks no model's endpoint twice for an answer."


@contextmanager
def one_screen(afterwards: str = "") -> Iterator[None]:
    """What a user can mend is printed without a traceback, exit code 2; after Ctrl-C, what comes `afterwards`."""
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
                saved = f" What was saved is complete; {afterwards}" if afterwards else ""
                _errors.print(f"\nStopped.{saved}", soft_wrap=True)
        raise typer.Exit(130) from None
    except Exception:
        if ranks.world_size() == 1:
            raise
        with ranks.failing() as first:
            if first:
                traceback.print_exc()
        raise typer.Exit(1) from None
