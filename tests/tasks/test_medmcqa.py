"""MedMCQA and MedQA: what the loader reads, refuses and leaves out, and how sessions are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agile.agents.multiple_choice import lesson_of
from agile.errors import AgileError
from agile.tasks.answers import read_answers
from agile.tasks.medmcqa import MedMCQA
from agile.types import Advice, AdviceStatus, Item, Session, SessionStatus

ROW: dict[str, Any] = {
    "question": "Which vitamin is water-soluble?",
    "opa": "Vitamin A",
    "opb": "Vitamin C",
    "opc": "Vitamin D",
    "opd": "Vitamin K",
    "cop": 2,
    "exp": "Vitamin C and the B vitamins are water-soluble. The others are not.",
    "subject_name": "Biochemistry",
    "topic_name": None,
    "id": "q0",
}
SECOND = {**ROW, "id": "q1", "question": "Which is not?", "cop": 4, "exp": None, "subject_name": "Anatomy"}
MEDQA = {
    "question": "What is given first?",
    "options": {"A": "Oxygen", "B": "Water", "C": "Salt", "D": "Rest", "E": "Nothing"},
    "answer": "E",
    "source": "medqa",
    "reflection": "First, do no harm.",
}


def write(path: Path, *rows: Mapping[str, Any] | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def read(folder: Path, *rows: Mapping[str, Any] | bytes, **options: Any) -> tuple[Item, ...]:
    write(folder / "dev.json", *rows)
    return MedMCQA(folder, **options).streams("test")[0].items


def test_official_rows(tmp_path: Path) -> None:
    first, second = read(tmp_path, ROW, SECOND)
    assert (first.id, first.question, first.answer, first.kind) == ("q0", ROW["question"], "B", "Biochemistry")
    assert (first.group, first.product) == (second.group, "Biochemistry")
    assert first.context["options"] == {"A": "Vitamin A", "B": "Vitamin C", "C": "Vitamin D", "D": "Vitamin K"}
    assert (first.context["long_answer"], second.context["long_answer"]) == (ROW["exp"], "")
    assert second.answer == "D"
    task = MedMCQA(tmp_path)
    task.streams("test")
    assert not task.medqa


def test_rows_may_hold_what_they_teach(tmp_path: Path) -> None:
    first, second = read(tmp_path, ROW, {**SECOND, "reflection": "Fat takes the others along."})
    assert (first.context["reflection"], lesson_of(first)) == ("", ROW["exp"])
    assert lesson_of(second) == "Fat takes the others along."


def test_medqa_rows_have_five_options_and_reflections(tmp_path: Path) -> None:
    by_words = {**MEDQA, "answer": "salt", "id": "own"}
    groups = {"question": "Which group?", "options": {"A": "B", "B": "A"}, "answer": "A", "answer_idx": "B", "id": None}
    rows = (MEDQA, by_words, {**MEDQA, "answer": "Rest", "answer_idx": "D", "id": 7}, groups)
    task = MedMCQA(tmp_path, write(tmp_path / "medqa.jsonl", *rows))
    first, second, third, fourth = task.streams("test")[0].items
    assert (third.id, fourth.id, fourth.answer) == ("7", "medqa-4", "B")
    assert (first.id, second.id) == ("medqa-1", "own")
    assert (first.answer, second.answer, third.answer) == ("E", "C", "D")
    assert (first.context["reflection"], first.kind) == ("First, do no harm.", "medqa")
    assert task.is_correct(first, "(e) Nothing", False) and task.medqa


def test_streams_by_file_by_subject_and_cut(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", *({**ROW, "id": str(i), "subject_name": "ba"[i % 2]} for i in range(5)))

    def ids(**options: Any) -> dict[str, list[str]]:
        return {s.id: [item.id for item in s.items] for s in MedMCQA(tmp_path, **options).streams("test")}

    assert ids() == {"dev": ["0", "1", "2", "3", "4"]}
    assert ids(stream_by="subject") == {"dev/a": ["1", "3"], "dev/b": ["0", "2", "4"]}
    assert ids(stream_length=2) == {"dev-0": ["0", "1"], "dev-1": ["2", "3"], "dev-2": ["4"]}
    assert ids(max_items=3, stream_by="subject") == {"dev/a": ["1"], "dev/b": ["0", "2"]}


def test_a_stronger_model_has_answered_train_questions_alone(tmp_path: Path) -> None:
    write(tmp_path / "train.json", ROW, SECOND)
    write(tmp_path / "dev.json", ROW)
    task = MedMCQA(tmp_path, predicted={"q0": "B: Vitamin C", "q1": None})
    assert [item.context["predicted"] for item in task.streams("train")[0].items] == ["B", None]
    assert "predicted" not in task.streams("test")[0].items[0].context
    with pytest.raises(AgileError, match="Question q1 has no recorded answer"):
        MedMCQA(tmp_path, predicted={"q0": "B"}).streams("train")


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in ROW.items() if k != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("opc"), "line 2, field 'opc': expected text, found no such field among"),
        (without("cop"), "line 2, field 'cop': expected a whole number, found no such field"),
        ({**SECOND, "question": 3}, "line 2, field 'question': expected text, found 3"),
        ({**SECOND, "opd": None}, "line 2, field 'opd': expected text, found None"),
        ({**SECOND, "exp": ["x"]}, r"line 2, field 'exp': expected text, found \['x'\]"),
        ({**SECOND, "reflection": 1}, "line 2, field 'reflection': expected text, found 1"),
        ({**SECOND, "cop": "2"}, "line 2, field 'cop': expected a whole number, found '2'"),
        ({**SECOND, "cop": True}, "line 2, field 'cop': expected a whole number, found True"),
        ({**SECOND, "cop": 5}, "line 2, field 'cop': expected the gold option as 1 to 4 .*, found 5"),
        ({**SECOND, "cop": -1}, "line 2, field 'cop': expected the gold option as 1 to 4 .*, found -1"),
        (
            {**SECOND, "id": "q0"},
            r"line 2, field 'id': expected an id that is not yet used .line 1 has it., found",
        ),
        (
            {**SECOND, "exp": "x" * 1_000_000},
            "line 2, field 'exp': expected a row of at most 1,000,000 bytes, found",
        ),
        (b'"' + b"x" * 1_000_000 + b'"', "line 2: expected a row of at most 1,000,000 bytes, found 1,000,002"),
        (b'{"question": "\xff\xfe"}', "line 2, field 'question': expected text in UTF-8, found"),
        (b'{"question": "', "line 2: expected JSON in UTF-8, found"),
        (b"[1]", r"line 2: expected an object with the field 'question', found \[1\]"),
        ({**MEDQA, "options": {"A": "x"}}, "line 2, field 'options': expected two to five options by the letters"),
        ({**MEDQA, "options": {"A": "x", "C": "y"}}, "line 2, field 'options': expected two to five options"),
        ({**MEDQA, "options": ["x", "y"]}, "line 2, field 'options': expected an object"),
        ({**MEDQA, "options": {"A": "x", "B": 2}}, "line 2, options, field 'B': expected text, found 2"),
        ({**MEDQA, "answer": "F"}, "line 2, field 'answer': expected one of A, B, C, D, E or the words .*, found 'F'"),
        ({**MEDQA, "answer": "Fire"}, "line 2, field 'answer': expected one of"),
        ({**MEDQA, "answer_idx": "F"}, "line 2, field 'answer_idx': expected one of A, B, C, D, E or the words"),
        (
            {**MEDQA, "answer": "B", "answer_idx": "A"},
            "line 2, field 'answer': expected the same option as",
        ),
        ({**MEDQA, "id": ["q1"]}, r"line 2, field 'id': expected text, found \['q1'\]"),
        (b'{"question": "?", "question": "!"}', "line 2, field 'question': expected it once, found it again"),
    ],
)
def test_bad_rows_are_named_or_left_out_and_listed(
    tmp_path: Path, row: Mapping[str, Any] | bytes, message: str
) -> None:
    rows = (ROW, row, {**SECOND, "id": "q2"})
    with pytest.raises(AgileError, match=message) as error:
        read(tmp_path, *rows)
    assert str(error.value).startswith(f"{tmp_path / 'dev.json'}, line 2")
    assert len(str(error.value)) < 600
    task = MedMCQA(tmp_path, skip_bad_rows=True)
    assert [item.id for item in task.streams("test")[0].items] == ["q0", "q2"]
    assert task.skipped == [str(error.value)]


def test_labels_from_0_mean_other_options_and_are_never_skipped(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", {**ROW, "cop": 1}, {**SECOND, "cop": 0})
    for skip in (False, True):
        with pytest.raises(AgileError, match="line 2, field 'cop': expected the gold option as 1 to 4"):
            MedMCQA(tmp_path, skip_bad_rows=skip).streams("test")


def test_bad_files(tmp_path: Path) -> None:
    write(tmp_path / "dev.json")
    with pytest.raises(AgileError, match=r"dev\.json: expected one question a row, found an empty file"):
        MedMCQA(tmp_path).streams("test")
    with pytest.raises(AgileError, match=r"train\.json: no such file; expected the train questions"):
        MedMCQA(tmp_path).streams("train")
    write(tmp_path / "dev.json", without("id"))
    with pytest.raises(AgileError, match=r"expected one question a row, found 1 bad ones, the last: .*field 'id'"):
        MedMCQA(tmp_path, skip_bad_rows=True).streams("test")
    with pytest.raises(AgileError, match="is one file, of train questions; give the test questions too"):
        MedMCQA(tmp_path / "dev.json")


def test_hugging_face_labels_count_from_0(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**ROW, "cop": 1}, {**SECOND, "cop": 3}]
    label = datasets.ClassLabel(names=["a", "b", "c", "d"])
    labelled = datasets.Dataset.from_list(rows).cast_column("cop", label)
    hidden = datasets.Dataset.from_list([{**ROW, "cop": -1}]).cast_column("cop", label)
    datasets.DatasetDict({"train": hidden, "validation": labelled}).save_to_disk(tmp_path / "hf")
    task = MedMCQA(tmp_path / "hf")
    assert [(i.id, i.answer) for i in task.streams("test")[0].items] == [("q0", "B"), ("q1", "D")]
    with pytest.raises(AgileError, match=r"train, row 1, field 'cop': .* found -1"):
        task.streams("train")
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "plain")
    assert MedMCQA(tmp_path / "plain").streams("test")[0].items[0].answer == "B"  # whole numbers are the official ones
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"id": []})}).save_to_disk(tmp_path / "empty")
    with pytest.raises(AgileError, match=r"empty: expected a data set with a row in each split, found an empty one\.$"):
        MedMCQA(tmp_path / "empty").streams("test")


def session(answer: str | None, advice: str | None = None, status: SessionStatus = SessionStatus.COMPLETED) -> Session:
    told = None if advice is None else Advice(advice, price=0.4)
    return Session("s/0", "s", 0, "q0", "k", 0, (), (), (), (), told, answer, status)


@pytest.mark.parametrize(
    ("done", "always", "if_right"),
    [
        (session("B"), {"correct": 1.0}, {"correct": 1.0}),
        (session("(b) Vitamin C"), {"correct": 1.0}, {"correct": 1.0}),
        (session("A"), {"correct": 0.0}, {"correct": 0.0}),
        (session("no idea"), {"correct": 0.0, "unreadable": 0.0}, {"correct": 0.0, "unreadable": 0.0}),
        (session(None, status=SessionStatus.TRUNCATED), {"correct": 0.0}, {"correct": 0.0}),
        (session("A", "B"), {"correct": 1.0, "advice": -0.4}, {"correct": 1.0, "advice": -0.4}),
        (session("B", "A"), {"correct": 1.0, "advice": -0.4}, {"correct": 0.0, "advice": -0.4}),
        (
            session("B", "who knows"),
            {"correct": 1.0, "advice": -0.4, "unreadable advice": 0.0},
            {"correct": 0.0, "advice": -0.4, "unreadable advice": 0.0},
        ),
        (
            session(None, "B", SessionStatus.TRUNCATED),
            {"correct": 0.0, "advice": -0.4},
            {"correct": 0.0, "advice": -0.4},
        ),
    ],
)
def test_when_a_session_is_right(
    tmp_path: Path, done: Session, always: Mapping[str, float], if_right: Mapping[str, float]
) -> None:
    (item,) = read(tmp_path, ROW)
    assert MedMCQA(tmp_path).score(item, done).components == always
    assert MedMCQA(tmp_path, advice_counts="if_right").score(item, done).components == if_right


def test_unanswered_advice_is_no_advice(tmp_path: Path) -> None:
    (item,) = read(tmp_path, ROW)
    done = replace(session("B"), advice=Advice("", status=AdviceStatus.REFUSED))
    assert MedMCQA(tmp_path, advice_counts="if_right").score(item, done).components == {"correct": 1.0}


def test_recorded_answers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": "q0", "model": "m", "choice": "B"}, {"id": "q1", "model": "m", "choice": None}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert read_answers(path) == read_answers(path, "m") == {"q0": "B", "q1": None}
    write(path, *rows, {"id": "q0", "model": "n", "answer": "yes"})
    assert read_answers(path, "n") == {"q0": "yes"}
    with pytest.raises(AgileError, match="expected answers of 'o', found 'm', 'n'"):
        read_answers(path, "o")
    with pytest.raises(AgileError, match="expected answers of one model, found 'm', 'n'"):
        read_answers(path)
    for row, message in (
        ({"id": "q0", "model": "m", "choice": "C"}, "line 3, field 'id': expected one answer of a model to a question"),
        ({"id": "q2", "model": "m"}, "line 3, field 'answer': expected text, found no such field"),
        ({"id": "q2", "model": "m", "choice": 2}, "line 3, field 'choice': expected text, found 2"),
    ):
        write(path, *rows, row, {"id": "q3", "model": "m", "choice": "D"})
        with pytest.raises(AgileError, match=message) as error:
            read_answers(path)
        skipped: list[str] = []
        assert read_answers(path, skipped=skipped) == {"q0": "B", "q1": None, "q3": "D"}
        assert skipped == [str(error.value)]


def test_recorded_choices_are_options_of_the_questions_that_are_known(tmp_path: Path) -> None:
    questions = {item.id: item for item in read(tmp_path, ROW, SECOND)}
    rows: list[dict[str, Any]] = [
        {"id": "q0", "choice": None},
        {"id": "q1", "answer": "Z"},
        {"id": "other", "choice": "E"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    assert read_answers(path, questions=questions) == {"q0": None, "q1": "Z", "other": "E"}  # a text may say anything
    path = write(tmp_path / "a.jsonl", *rows[1:], {"id": "q0", "choice": "Z"}, b'{"id": "q\xff"}')
    message = "line 3, field 'choice': expected null or one of A, B, C, D, found 'Z'"
    with pytest.raises(AgileError, match=message):
        read_answers(path, questions=questions)
    skipped: list[str] = []
    assert read_answers(path, skipped=skipped, questions=questions) == {"q1": "Z", "other": "E"}
    assert message in skipped[0] and "line 4, field 'id': expected text in UTF-8" in skipped[1]


def test_real_files(data: Path) -> None:
    folder = data / "medmcqa"
    task = MedMCQA(folder, predicted=None)
    items = task.streams("test")[0].items
    assert len(items) == 4183
    lines = (folder / "dev.json").read_text(encoding="utf-8").splitlines()
    for item, row in zip(items, map(json.loads, lines), strict=True):
        letter = "ABCD"[row["cop"] - 1]
        assert (item.id, item.answer) == (row["id"], letter)
        words = item.context["options"]
        for text in (letter, f"({letter.lower()})", f"{letter}: {words[letter]}", f"The answer is {letter}."):
            assert task.is_correct(item, text, False)
        plain = [w.strip(" .").casefold() for w in words.values()]
        if len(set(plain)) == 4 and all(len(w) > 1 for w in plain):  # words that mean one option, and are no letter
            assert [task.is_correct(item, w, False) for w in words.values()] == [k == letter for k in words]
    for model, right in (("gpt-4-32k", 0.684), ("gpt-35-turbo-16k", 0.535)):
        answers = read_answers(folder / "api_predictions_dev.jsonl", model)
        found = sum(task.is_correct(item, answers[item.id], False) for item in items) / len(items)
        assert round(found, 3) == right
    medqa = MedMCQA(folder, folder / "medqa_dev_with_reflections.jsonl").streams("test")[0].items
    assert len(medqa) == 1272 and all(item.context["reflection"] for item in medqa)
