"""How far a stage is, for whoever watches."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def progress_bar() -> Progress:
    """A bar in a terminal; elsewhere `advance` prints lines."""
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def advance(progress: Progress, bar: TaskID, step: int, note: str) -> None:
    progress.update(bar, completed=step, note=note)
    task = progress.tasks[bar]
    if not progress.console.is_terminal and task.total and step % max(1, int(task.total) // 10) == 0:
        progress.console.print(f"{task.description} {step}/{task.total:.0f} {note}")
