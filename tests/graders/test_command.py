"""`agile grade`: what is printed, for people and for machines, and with which exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse
from typer.testing import CliRunner, Result

from agile.cli import app
from tests.stub_endpoint import said, stub_endpoint

ROOT = Path(__file__).parents[2]
CHECK = {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}",
         "reference": "{{ item.answer }}", "operation": "eq"}  # fmt: skip
JUDGE = {"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "Rate."}]}


def grade(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["grade", *map(str, words)])


def write(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(json.dumps(v) for v in values))
    return path


def test_a_valid_grader(tmp_path: Path) -> None:
    path = write(tmp_path / "g.json", CHECK | {"input": "{{ sample.output_text"})
    result = grade("validate", path)
    assert result.exit_code == 0
    assert f"Valid: {path}, same (string_check)\nNote: " in result.output
    machine = json.loads(grade("validate", path, "--json").output)
    assert machine["grader"]["operation"] == "eq"
    assert len(machine["notes"]) == 1


def test_an_invalid_grader(tmp_path: Path) -> None:
    result = grade("validate", write(tmp_path / "g.json", CHECK | {"operation": "is"}))
    assert result.exit_code == 2
    assert "operation is \"is\": expected 'eq'" in result.output


def test_one_sample(tmp_path: Path) -> None:
    grader, sample = write(tmp_path / "g.json", CHECK), tmp_path / "s.json"
    write(sample, {"model_sample": "blue", "item": {"answer": "blue"}})
    result = grade("run", grader, sample)
    assert result.exit_code == 0
    assert result.output.startswith("reward 1  same (string_check)")
    machine = grade("run", grader, sample, "--json")
    assert GraderRunResponse.model_validate_json(machine.output).reward == 1.0


def test_errors_have_an_exit_code_and_are_named(tmp_path: Path) -> None:
    sample = write(tmp_path / "s.json", {"model_sample": "blue"})
    result = grade("run", write(tmp_path / "g.json", CHECK), sample)
    assert result.exit_code == 1
    assert "invalid_variable_error\n  same: {{ item.answer }}: item has nothing, not 'answer'" in result.output


def test_many_samples(tmp_path: Path) -> None:
    rows = [{"sample": {"output_text": text}, "item": {"answer": "a"}} for text in ("a", "b", "a", "b")]
    result = grade("run", write(tmp_path / "g.json", CHECK), write(tmp_path / "s.jsonl", *rows))
    assert "4 samples, mean reward 0.5, 0 with errors" in result.output
    machine = grade("run", tmp_path / "g.json", tmp_path / "s.jsonl", "--json")
    assert [json.loads(line)["reward"] for line in machine.output.splitlines()] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "said_"),
    [
        ("", "is empty"),
        ('{"model_sample": "x"}\n{"item": {}}', "line 2: expected an object with model_sample"),
        ('{"model_sample": "x"}\nnot json', "line 2 is no JSON"),
        ('{"model_sample": "x", "answer": 3}', "line 1: 'answer' is unknown; what templates read as item.X"),
        ('{"model_sample": "x", "item": 3}', "line 1: item is 3, expected an object"),
        ('{"model_sample": 3}', "line 1: A sample is 3"),
    ],
)
def test_bad_samples_are_refused_with_their_line(tmp_path: Path, text: str, said_: str) -> None:
    (tmp_path / "s.jsonl").write_text(text)
    result = grade("run", write(tmp_path / "g.json", CHECK), tmp_path / "s.jsonl")
    assert result.exit_code == 2
    assert said_ in result.output


def test_a_model_behind_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = write(tmp_path / "s.json", {"model_sample": "x"})
    grader = write(tmp_path / "g.json", JUDGE)
    with stub_endpoint() as stub:
        stub.script(said("0.25"))
        at = ("--base-url", stub.url, "--api-key-env", "", "--cache", tmp_path / "c.sqlite")
        for _ in range(2):
            result = grade("run", grader, sample, *at)
            assert result.output.startswith("reward 0.25")
            assert "110 tokens" in result.output
        assert len(stub.requests) == 1
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = grade("run", grader, sample)
    assert result.exit_code == 2
    assert "OPENAI_API_KEY" in result.output


def test_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text("def grade(sample, item): return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = grade("run", "rewards_of_a_test.grade", write(tmp_path / "s.json", {"model_sample": "x"}))
    assert result.output.startswith("reward 0.5  grade (function)")
    assert grade("run", "rewards_of_a_test.missing", tmp_path / "s.json").exit_code == 2


def test_fields_are_shown(tmp_path: Path) -> None:
    grader = write(tmp_path / "g.json", {"type": "structured", "name": "s", "reference": "{{ item.a }}"})
    sample = write(tmp_path / "s.json", {"model_sample": '{"t": ["x"]}', "item": {"a": {"t": ["x", "y"]}}})
    assert "precision 1, recall 0.5, f1 0.6667" in grade("run", grader, sample).output


def test_the_worked_example_of_the_docs(tmp_path: Path) -> None:
    grader, sample = re.findall("```json\n(.*?)```", (ROOT / "docs" / "graders.md").read_text(), re.DOTALL)
    (tmp_path / "g.json").write_text(grader)
    (tmp_path / "s.json").write_text(sample)
    result = grade("run", tmp_path / "g.json", tmp_path / "s.json")
    assert result.output.startswith("reward 0.955  invoice (multi)")
    assert "`reward 0.955`" in (ROOT / "docs" / "graders.md").read_text()
