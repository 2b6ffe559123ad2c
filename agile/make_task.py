"""Wiring: the task that a config describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agile.config import RunConfig
from agile.graded import graded_task
from agile.memory.encoders import Vectors
from agile.protocols import Task
from agile.tasks.hotpotqa import HotPotQA
from agile.tasks.jsonl import JsonlTask
from agile.tasks.medmcqa import MedMCQA
from agile.tasks.minishop import MiniShopSpec, write_minishop
from agile.tasks.productqa import ProductQA
from agile.tools.passages import bm25, dense

HOTPOT_STREAM = 10  # its questions share nothing, so short streams play more of them at once


def make_task(
    config: RunConfig,
    folder: Path,
    predicted: Mapping[str, str | None] | None,
    encode: Callable[[Sequence[str]], Vectors],
) -> Task:
    """The task of a config.

    Args:
        folder: The run folder, where MiniShop's worlds are written.
        predicted: What a stronger model answered to train questions, see `MedMCQA`.
        encode: For a dense search.
    """
    task, data = config.task, config.task.data
    reading = task.model_dump(include={"max_items", "advice_counts", "skip_bad_rows"})
    if task.name == "minishop" and data is None:
        data = folder / "minishop"
        if not data.exists():
            spec = MiniShopSpec(task.num_train_worlds, task.num_test_worlds, task.num_questions)
            write_minishop(data, spec, config.seed)
    if task.name == "rft":
        return graded_task(task, folder)
    assert data is not None  # TaskConfig checks it
    match task.name:
        case "minishop" | "productqa":
            macro = task.name == "productqa"  # as the paper reports it
            return ProductQA(data, task.train_groups, task.test_groups, macro=macro, **reading)
        case "medmcqa":
            return MedMCQA(
                data,
                task.test_data,
                stream_by=task.stream_by,
                stream_length=task.stream_length,
                predicted=predicted,
                **reading,
            )
        case "hotpotqa":
            rank = bm25 if task.search == "bm25" else dense(encode)
            length = task.stream_length or HOTPOT_STREAM
            return HotPotQA(data, task.test_data, rank=rank, stream_length=length, **reading)
        case "jsonl":
            return JsonlTask(data, task.test_data, database=task.database, stream_length=task.stream_length, **reading)
