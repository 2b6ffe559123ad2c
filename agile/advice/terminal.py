"""The person at this terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from agile import threads
from agile.types import Advice, AdviceRequest, AdviceStatus


class TerminalAdvisor:
    """Asks the person in this terminal, one question at a time; an empty line or end of file means not knowing.

    Args:
        read_line: Blocks until the person has typed a line.
        console: Where the question appears.
        name: Recorded as the expert.
    """

    def __init__(
        self, read_line: Callable[[], str] = input, console: Console | None = None, name: str = "terminal"
    ) -> None:
        self.name = name
        self._read_line = read_line
        self._console = console or Console()
        self._turn = asyncio.Lock()
        self._line: Future[str] | None = None

    async def advise(self, request: AdviceRequest) -> Advice:
        """Show the question and wait for a line."""
        async with self._turn:
            self._show(request)
            # Nothing stops a read that has begun: after a timeout it goes on, and the next line typed answers the
            # question that is then on the screen.
            if self._line is None or self._line.done():
                self._line = threads.start(self._read_line)
            try:
                line = await asyncio.wrap_future(self._line)
            except EOFError:
                line = ""
        if not line.strip():
            return Advice("", expert=self.name, status=AdviceStatus.REFUSED)
        return Advice(line.strip(), expert=self.name, price=request.price)

    def _show(self, request: AdviceRequest) -> None:
        item = request.item
        about = " / ".join(part for part in (item.group, item.product) if part)
        # Text, not markup: a question may hold brackets.
        body = Text(item.question)
        if request.message.strip():
            body.append(f"\nThe agent says: {request.message.strip()}")
        self._console.print(Panel(body, title=Text(f"Your advice, please: {about}".rstrip(": ")), title_align="left"))
        self._console.print(Text("Answer (empty: I do not know) > "), end="")
