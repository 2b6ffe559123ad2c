"""What every command is told: a config, changes of it, and where to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from agile.errors import AgileError

Config = Annotated[Path, typer.Argument(help="YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes of the config, such as ppo.lr=1e-4, and out=DIR.", metavar="a.b=value"),
]


def parse(words: Sequence[str], default_out: str) -> tuple[Path, list[str]]:
    """The run folder, and the overrides without it."""
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    if "" in outs:
        raise AgileError("out= names no folder. Write out=DIR, for example out=runs/mine.")
    return Path([default_out, *outs][-1]).expanduser(), [word for word in words if not word.startswith("out=")]
