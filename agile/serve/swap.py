"""`agile serve-swap`: tell a server which agent to serve, and wait until it does."""

from __future__ import annotations

import getpass
import time
from pathlib import Path

from rich.console import Console

from agile.errors import AgileError
from agile.loaded import agent_of
from agile.serve import deployments
from agile.serve.database import Database
from agile.serve.deployments import FAILED, SERVED

LOOK_S = 0.5


def swap(database: Database, run: Path | None, agent: str | None, console: Console, *, wait_s: float) -> None:
    """Have a run's agent served, or the one of before where `run` is None.

    Raises:
        AgileError: There is no such agent, or the server cannot serve it.
    """
    if run is None:
        earlier = deployments.before(database)
        if earlier is None:
            raise AgileError("No other agent was served before. Name a run: agile serve-swap RUN.")
        run, agent = Path(earlier.run), earlier.agent
    wanted = deployments.deploy(database, run, agent_of(run, agent), getpass.getuser())
    name = f"{wanted.run}/{wanted.agent}"
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        now = deployments.by_id(database, wanted.id)
        assert now is not None
        if now.state == SERVED:
            console.print(f"{name} is served.", markup=False, soft_wrap=True)
            return
        if now.state == FAILED:
            raise AgileError(f"The server cannot serve {name}, and goes on with what it served: {now.error}")
        time.sleep(LOOK_S)
    console.print(f"No server has taken {name} so far; the next one that looks does.", markup=False, soft_wrap=True)
