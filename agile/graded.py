"""Task `rft` as a config describes it: its files, and what its grader runs with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agile.tasks.graders.command import asks_model
from agile.tasks.rft import RftTask

if TYPE_CHECKING:
    from agile.config.task import TaskConfig


def graded_task(task: TaskConfig, folder: Path) -> RftTask:
    """The task.

    Args:
        folder: Keeps what models answered that grade.

    Raises:
        AgileError: The key of their endpoint is missing. What is wrong with the files comes up when they are read.
    """
    assert task.data is not None  # TaskConfig checks all three
    assert task.validation_data is not None
    assert task.grader is not None
    grading = task.grading
    made = RftTask(
        task.data,
        task.validation_data,
        task.grader,
        imitation_data=task.imitation_data,
        response_format=task.response_format,
        time_s=grading.time_s,
        max_items=task.max_items,
    )
    if made.grader is not None and asks_model(made.grader):
        from agile.policies.endpoint import Endpoint, read_key  # takes a second to import

        read_key(grading.base_url, grading.api_key_env, "task.grading")  # now, not when the first answer is graded
        made.ask(
            lambda: Endpoint(
                grading.base_url,
                "",
                api_key_env=grading.api_key_env,
                max_concurrent=grading.max_concurrent,
                cache=folder / "answers.grading.sqlite",
                section="task.grading",
            )
        )
    return made
