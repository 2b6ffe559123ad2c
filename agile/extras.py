"""Parts that need packages which are not installed with the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agile.errors import AgileError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of an extra's packages.

    Raises:
        AgileError: One is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "agile":
            raise
        raise AgileError(
            f"The package {error.name} is not installed; it comes with the extra {extra}: pip install "
            f"'agile-agents[{extra}]', or in a clone: pip install -c constraints.txt -e \".[{extra}]\""
        ) from None
