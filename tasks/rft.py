"""Reinforcement fine-tuning: rows of messages to answer, and a grader that says what an answer is worth."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agile.errors import AgileError
from agile.extras import needs
from agile.protocols import Tool
from agile.tasks.graders.command import find_grader
from agile.tasks.graders.grading import Function, Grading, make_sample
from agile.tasks.graders.models import FunctionGrader, Grader
from agile.tasks.graders.sandbox import Limits
from agile.tasks.rft_rows import (
    MessageRow,
    in_both,
    missing_variables,
    raise_all,
    read_response_format,
    read_rows,
)
from agile.types import Item, Reward, Session, Stream

if TYPE_CHECKING:
    from agile.policies.endpoint import Endpoint

logger = logging.getLogger(__name__)

GRADE = "grade"  # the component of the reward
FORMAT_ERROR = "response_format_error"  # of 0, beside the grader's own errors: they are counted
# What no answer is to blame for: the session fails, and is left out of the loss.
BLAMELESS = ("model_grader_server_error", "python_grader_server_error")


class RftTask:
    """One stream of one session for each row; all sessions are independent.

    An answer that does not end within the limit, or does not fit the response format, is worth 0 and not graded. So is
    one that the grader fails on, or gives anything but a finite number; the reward then names the error by a component
    of 0. Where the grader's endpoint or sandbox fails, the session fails.

    Args:
        data, validation_data: JSON lines with `messages`, the last one the user's; every further key is the `item`.
        grader: Its file, or the dotted path of a function `grade(sample, item)`.
        imitation_data: JSON lines with `messages`, the last one the assistant's.
        response_format: File of the hosted API's `response_format`.
        time_s: Limit of a python grader, and of a function.
        max_items: Read only the first so many rows of each file.

    Raises:
        AgileError: A line for each thing that is wrong with any of the files. They are read when first asked for.
    """

    macro = False
    tools: Mapping[str, Tool] = {}
    skipped: Sequence[str] = ()

    def __init__(
        self,
        data: Path,
        validation_data: Path,
        grader: Path,
        *,
        imitation_data: Path | None = None,
        response_format: Path | None = None,
        time_s: float = 120.0,
        max_items: int | None = None,
    ):
        self._files = {"train": data, "validation": validation_data}
        if imitation_data is not None:
            self._files["imitation"] = imitation_data
        self._max_items = max_items
        self._time_s = time_s
        self._endpoint: Callable[[], Endpoint] | None = None
        self._grading = Grading(None, Limits(time_s=time_s))
        self._streams: dict[str, tuple[Stream, ...]] = {}
        problems: list[str] = []
        self._problems = problems
        self.grader: Grader | Function | None = None
        self._schema: Any = None
        self._told: set[str] = set()  # kinds of errors
        try:
            self.grader = find_grader(str(grader))
        except AgileError as error:
            problems.append(str(error))
        if response_format is not None:
            try:
                self._schema = _validator(read_response_format(response_format))
            except AgileError as error:
                problems.append(str(error))

    def ask(self, endpoint: Callable[[], Endpoint]) -> None:
        """How to reach the models that grade, when the first answer is graded."""
        self._endpoint = endpoint

    def streams(self, split: str) -> Sequence[Stream]:
        """The rows of `train`, `validation` (also called `test`) or `imitation`; all are read and checked at once."""
        if not self._streams:
            self._streams = self._read()
        return self._streams["validation" if split == "test" else split]

    def _read(self) -> dict[str, tuple[Stream, ...]]:
        problems = list(self._problems)
        rows = {
            split: read_rows(path, "assistant" if split == "imitation" else "user", problems, max_items=self._max_items)
            for split, path in self._files.items()
        }
        if self.grader is not None and not callable(self.grader):
            for split in ("train", "validation"):
                problems += missing_variables(self.grader, self._files[split], rows[split])
        problems += in_both(self._files["train"], rows["train"], self._files["validation"], rows["validation"])
        raise_all(problems)
        return {split: tuple(_stream(split, row) for row in found) for split, found in rows.items()}

    async def score(self, item: Item, session: Session) -> Reward:
        """What the grader gives.

        Raises:
            AgileError: What no other answer would mend, such as a missing key.
            RuntimeError: The grader's endpoint or sandbox failed.
            TimeoutError: A function did not answer.
        """
        if item.kind == "imitation":
            return Reward({})
        if session.answer is None:
            return Reward({GRADE: 0.0})
        sample = make_sample(session.answer)
        if self._schema is not None and not ("output_json" in sample and self._schema.is_valid(sample["output_json"])):
            return Reward({GRADE: 0.0, FORMAT_ERROR: 0.0})
        assert self.grader is not None  # streams() has raised
        if self._endpoint is not None and self._grading.endpoint is None:
            self._grading.endpoint = self._endpoint()
        graded = self._grading.grade(self.grader, sample, item.context["item"])
        if callable(self.grader) or isinstance(self.grader, FunctionGrader):  # all others have limits of their own
            graded = asyncio.wait_for(graded, self._time_s)
        grade = await graded
        kinds = grade.errors.kinds
        for kind in kinds:
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("%s: %s. Further ones are counted.", kind, "; ".join(grade.errors.details))
        if any(kind in BLAMELESS for kind in kinds):
            raise RuntimeError("; ".join(grade.errors.details) or ", ".join(kinds))
        return Reward({GRADE: grade.reward, **dict.fromkeys(kinds, 0.0)})

    @staticmethod
    def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
        raise AgileError("Answers of task rft are graded, not right or wrong: baselines cannot play it.")

    def tool_answer(self, item: Item) -> str | None:
        return None


def _stream(split: str, row: MessageRow) -> Stream:
    messages, answer = row.messages, None
    if split == "imitation":
        messages, answer = messages[:-1], messages[-1]["content"]
    context = {"messages": [dict(m) for m in messages], "item": dict(row.item), "line": row.line}
    item = Item(str(row.line), messages[-1]["content"] if messages else "", answer, split, context=context)
    return Stream(f"{split}/{row.line}", (item,))


def _validator(schema: Mapping[str, Any] | None) -> Any:
    if schema is None:
        return None
    with needs("graders"):
        from jsonschema import Draft202012Validator
    return Draft202012Validator(schema)
