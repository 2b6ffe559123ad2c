"""How far a stage is, for whoever watches."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from agile import ranks


def progress_bar() -> Progress:
    """A bar in a terminal; elsewhere `advance` prints lines. The main process alone shows it."""
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not ranks.is_main(),
    )


def advance(progress: Progress, bar: TaskID, step: int, note: str) -> None:
    if progress.disable:
        return
    progress.update(bar, completed=step, note=note)
    task = progress.tasks[bar]
    if not progress.console.is_terminal and task.total and step % max(1, int(task.total) // 10) == 0:
        progress.console.print(f"{task.description} {step}/{task.total:.0f} {note}")
