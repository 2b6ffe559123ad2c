"""What can be asked about, of each kind of task, and questions that stand in no data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from agile.agents.multiple_choice import MultipleChoiceAgent
from agile.errors import AgileError
from agile.subjects import question_about, subjects
from agile.tasks.jsonl import JsonlTask
from agile.tasks.medmcqa import MedMCQA
from tests.tasks.test_jsonl import CSV, ROWS
from tests.tasks.test_jsonl import write as write_rows
from tests.tasks.test_medmcqa import ROW, SECOND, write
from tests.worlds import AGENT, write_shop

OPTIONS = {"A": "Vitamin A", "B": "Vitamin C"}


def test_products_are_those_of_the_first_test_stream(tmp_path: Path) -> None:
    shop = write_shop(tmp_path)
    found = subjects(shop, "minishop")
    like = shop.streams("test")[0].items[0]
    item = question_about(found[like.product], "x/1", "is it warm ?", "served")
    assert "" not in found and item.context["metadata"] == like.context["metadata"] and item.answer == ""
    assert AGENT.question(item, 0.0, 0.3).endswith("question: is it warm ?\n")
    with pytest.raises(AgileError, match="Options"):
        question_about(found[like.product], "x/1", "which ?", "served", {"options": OPTIONS})


def test_own_questions_are_about_rows_of_the_table_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "wines.csv").write_text(CSV)
    path = write_rows(tmp_path, ROWS)
    found = subjects(JsonlTask(path, path, database=tmp_path / "wines.csv"), "jsonl")
    assert list(found) == ["", "Merlot", "Riesling", "Chianti"]
    assert found["Merlot"].context["metadata"] == {"name": "Merlot", "color": "red", "price": "12.0"}
    alone = question_about(found[""], "x/1", "who ?", "served")
    assert AGENT.question(alone, 0.0, 0.3) == "round 0\nquestion: who ?\n", "nothing of any other question"
    choice = question_about(found[""], "x/1", "how ?", "served", {"options": {"A": "warm", "B": "cool"}})
    assert "A: warm\nB: cool\nquestion: how ?" in AGENT.question(choice, 0.0, 0.3)
    assert found[""].context["metadata"] == {}
    plain = [{name: value for name, value in row.items() if name != "sql"} for row in ROWS]
    path = write_rows(tmp_path, plain, "plain.jsonl")
    assert list(subjects(JsonlTask(path, path), "jsonl")) == ["", "Riesling"]


def test_medical_questions_bring_their_options(tmp_path: Path) -> None:
    write(tmp_path / "dev.json", ROW, SECOND)
    found = subjects(MedMCQA(tmp_path), "medmcqa")
    assert list(found) == ["", "Anatomy", "Biochemistry"]
    item = question_about(found["Anatomy"], "x/1", "which ?", "served", {"options": OPTIONS})
    assert MultipleChoiceAgent().question(item, 0.0, 0.3) == "round 0\nquestion: which ?\nA: Vitamin A\nB: Vitamin C\n"
    assert item.product == "Anatomy" and item.group == "medicine"
    with pytest.raises(AgileError, match="give two or more"):
        question_about(found[""], "x/1", "which ?", "served")
