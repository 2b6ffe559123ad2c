"""Multiple-choice questions of medicine: MedMCQA (arXiv 2203.14371) and MedQA (arXiv 2009.13081).

A folder holds JSON lines: `dev.json`, on which agents are tested (the gold answers of `test.json` are not public), and
`train.json`. Other files may be given, in MedQA's layout too. Or the data set is one of the package `datasets`: a
folder that `save_to_disk` wrote, or the name of one that was downloaded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from agile.errors import AgileError
from agile.protocols import Tool
from agile.tasks.choices import read_choice
from agile.tasks.rows import cut, field, lines, optional_text, read_items, show, wrong
from agile.tasks.scoring import AdviceCounts, fold, question_reward
from agile.types import Item, Reward, Session, Stream

GROUP = "medicine"  # one scope of memory for all questions, so that what one data set teaches serves another
LETTERS = "ABCDE"
_SPLITS = {"train": "train", "test": "validation"}  # of the data set of `datasets`
_OPTIONS = {"A": "opa", "B": "opb", "C": "opc", "D": "opd"}


class MedMCQA:
    """Questions with four or five options, as one stream in file order or one for each subject.

    Args:
        data: Folder of the official files, a file of train questions, or a data set of `datasets`.
        test_data: A file of test questions instead.
        stream_by: `file` makes one stream of a split, `subject` one of each subject, sorted by name.
        stream_length: Cuts streams into ones of at most so many questions.
        max_items: Read only the first so many questions of each split.
        predicted: What a stronger model answered to train questions, by id; each question's context then holds what it
            chose as `predicted`, None where that cannot be read.
        advice_counts: When an advised session is right, see `agile.tasks.scoring`.
        skip_bad_rows: Whether bad rows are left out and listed in `skipped`, not an error.

    Attributes:
        skipped: What is wrong with each row that was left out.
        medqa: Whether a test row was in MedQA's layout: what is published about MedMCQA is not about such questions.

    Raises:
        AgileError: A folder, file, line or field is missing or malformed. Splits are read when first asked for.
    """

    tools: Mapping[str, Tool] = MappingProxyType({})
    macro = False

    def __init__(
        self,
        data: Path,
        test_data: Path | None = None,
        *,
        stream_by: Literal["file", "subject"] = "file",
        stream_length: int | None = None,
        max_items: int | None = None,
        predicted: Mapping[str, str | None] | None = None,
        advice_counts: AdviceCounts = "always",
        skip_bad_rows: bool = False,
    ) -> None:
        if data.is_file() and test_data is None:
            raise AgileError(
                f"{data} is one file, of train questions; give the test questions too: task.test_data=FILE"
            )
        self.data = data
        self.stream_by, self.stream_length, self.max_items = stream_by, stream_length, max_items
        self.predicted = predicted
        self.advice_counts = advice_counts
        self.skipped: list[str] = []
        self._skipped = self.skipped if skip_bad_rows else None
        self.medqa = False
        self._files = {
            "train": data if data.is_file() else data / "train.json",
            "test": data / "dev.json" if test_data is None else test_data,
        }
        self._streams: dict[str, tuple[Stream, ...]] = {}

    def streams(self, split: str) -> Sequence[Stream]:
        """The streams of `train` or `test`, read once."""
        if split not in self._streams:
            items, name = self._items(split)
            parts = {name: items}
            if self.stream_by == "subject":
                subjects = sorted({item.kind for item in items})
                parts = {f"{name}/{kind}": tuple(i for i in items if i.kind == kind) for kind in subjects}
            self._streams[split] = tuple(
                Stream(stream_id, part)
                for name, whole in parts.items()
                for stream_id, part in cut(name, whole, self.stream_length)
            )
        return self._streams[split]

    def score(self, item: Item, session: Session) -> Reward:
        """See `agile.tasks.scoring`; what cannot be read as an option is wrong, and marked."""
        return question_reward(
            session,
            lambda answer: self.is_correct(item, answer, False),
            self.advice_counts,
            readable=lambda answer: read_choice(answer, item.context["options"]) is not None,
        )

    @staticmethod
    def is_correct(item: Item, answer: str | None, used_search: bool) -> bool:
        """Whether the answer chooses the gold option, see `agile.tasks.choices`."""
        return answer is not None and read_choice(answer, item.context["options"]) == item.answer

    @staticmethod
    def tool_answer(item: Item) -> str | None:
        """None: there is no tool."""
        return None

    def _items(self, split: str) -> tuple[tuple[Item, ...], str]:
        path = self._files[split]
        rows: Iterator[tuple[str, Any]]
        if not path.is_file() and _of_datasets(self.data):
            path = self.data / _SPLITS[split]
            rows = _dataset_rows(self.data, _SPLITS[split])
        else:
            rows = lines(path, f"expected the {split} questions, one JSON object a line")
        predicted = self.predicted if split == "train" else None

        def parse(row: Any, where: str) -> Item:
            is_medqa = isinstance(row, dict) and "options" in row
            item = _medqa(row, where) if is_medqa else _medmcqa(row, where)
            self.medqa |= is_medqa and split == "test"
            if predicted is not None:
                item = _with_prediction(item, predicted)
            return item

        items = read_items(rows, parse, path, max_items=self.max_items, skipped=self._skipped)
        if first := next((bad for bad in self.skipped if "field 'cop'" in bad and bad.endswith("found 0.")), ""):
            raise AgileError(f"{first} All rows then mean other options than they say, so none is read.")
        return items, path.stem


def _medmcqa(row: Any, where: str) -> Item:
    """MedMCQA; `reflection`, what the question teaches, is an addition to the official fields."""
    question, question_id, subject = (field(row, name, str, where) for name in ("question", "id", "subject_name"))
    options = {letter: field(row, name, str, where) for letter, name in _OPTIONS.items()}
    gold = field(row, "cop", int, where)
    if not 1 <= gold <= len(options):
        known = "1 to 4 in the official files (0 to 3 in the data set of `datasets`, which hides test answers as -1)"
        raise wrong(where, "cop", f"the gold option as {known}", gold)
    explanation, reflection = optional_text(row, "exp", where), optional_text(row, "reflection", where)
    return _item(question_id, question, options, LETTERS[gold - 1], subject or "Unknown", explanation, reflection)


def _medqa(row: Any, where: str) -> Item:
    """MedQA: `options` by letter, `answer` a letter or the words of an option, `reflection` what it teaches."""
    question, options = field(row, "question", str, where), field(row, "options", dict, where)
    letters = LETTERS[: len(options)]
    if len(options) < 2 or sorted(options) != list(letters):
        raise wrong(where, "options", f"two to five options by the letters {LETTERS[0]} to {LETTERS[-1]}", options)
    options = {letter: field(options, letter, str, f"{where}, options") for letter in letters}
    name = "answer_idx" if "answer_idx" in row else "answer"
    answer = field(row, name, str, where)
    gold = read_choice(answer, options)
    if gold is None:
        raise wrong(where, name, f"one of {', '.join(letters)} or the words of one option", answer)
    words = field(row, "answer", str, where) if "answer" in row else options[gold]
    if fold(words) != fold(options[gold]) and read_choice(words, options) not in (gold, None):
        raise wrong(where, "answer", f"the same option as answer_idx, {gold}", words)
    if isinstance(question_id := row.get("id"), int) and not isinstance(question_id, bool):
        question_id = str(question_id)
    elif question_id is None:
        question_id = f"medqa-{where.rpartition(' ')[2]}"
    else:
        question_id = field(row, "id", str, where)
    subject = optional_text(row, "source", where) or "medqa"
    explanation = optional_text(row, "exp", where)
    return _item(question_id, question, options, gold, subject, explanation, optional_text(row, "reflection", where))


def _item(
    question_id: str,
    question: str,
    options: Mapping[str, str],
    gold: str,
    subject: str,
    explanation: str,
    reflection: str,
) -> Item:
    """The gold answer is a letter; memory's scope within the group is the subject."""
    context = {"options": options, "long_answer": explanation, "reflection": reflection}
    return Item(question_id, question, gold, subject, GROUP, subject, context)


def _with_prediction(item: Item, predicted: Mapping[str, str | None]) -> Item:
    if item.id not in predicted:
        raise AgileError(
            f"Question {item.id} has no recorded answer of sft.stronger_model, which must have one "
            "for every train question."
        )
    text = predicted[item.id]
    choice = None if text is None else read_choice(text, item.context["options"])
    return replace(item, context={**item.context, "predicted": choice})


def _of_datasets(data: Path) -> bool:
    """Whether this is a folder of `save_to_disk`, or no folder but what can be the name of a data set."""
    if data.is_dir():
        return (data / "dataset_dict.json").exists() or (data / "dataset_info.json").exists()
    return not data.exists() and not data.is_absolute() and len(data.parts) == 2


def _dataset_rows(data: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of the data set, with `cop` as in the official files: a class label counts from 0 there, from 1 here."""
    import datasets  # takes a second

    try:
        loaded = datasets.load_from_disk(str(data)) if data.is_dir() else datasets.load_dataset(str(data))
    except IndexError:  # what `datasets` says where not one row was saved
        raise AgileError(f"{data}: expected a data set with a row in each split, found an empty one.") from None
    except Exception as error:  # it has many kinds of errors for what is missing or cannot be reached
        raise AgileError(
            f"{data}: cannot be loaded by `datasets` ({type(error).__name__}: {str(error)[:200]}). Give a folder with "
            "dev.json, a folder of save_to_disk, or a data set that was downloaded before; HF_HUB_OFFLINE=0 lets it "
            "be downloaded."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise AgileError(f"{data}: expected a split {split!r}, found {show(list(loaded))}.")
        loaded = loaded[split]
    offset = 1 if isinstance(loaded.features.get("cop"), datasets.ClassLabel) else 0
    for number, row in enumerate(loaded, 1):
        gold = row.get("cop")
        if isinstance(gold, int) and gold >= 0:
            row = {**row, "cop": gold + offset}
        yield f"{data / split}, row {number}", row
