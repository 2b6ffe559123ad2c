"""`agile bench` on multiple-choice questions: experts, who plays alone, who asks, and bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from agile.bench import bench
from agile.config import load_config
from agile.errors import AgileError
from agile.session_log import read_lines, session_from_json
from tests.stub_endpoint import said, stub_endpoint
from tests.tiny import agile

NUM = 8  # questions, of which the recorded model answers 5 right, 2 wrong and 1 unreadably


def question(n: int, **changed: Any) -> dict[str, Any]:
    options = {
        f"op{letter}": f"{word} {n}" for letter, word in zip("abcd", ("red", "blue", "green", "white"), strict=True)
    }
    return {
        "question": f"What colour is {n}?",
        "id": f"q{n}",
        "cop": 1 + n % 4,
        "subject_name": "Skin",
        **options,
    } | changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions, recorded answers, and a config."""
    (tmp_path / "dev.json").write_text("".join(json.dumps(question(n)) + "\n" for n in range(NUM)))
    choices = ["ABCD"[n % 4] for n in range(5)] + ["A", "A", None]
    rows = [{"id": f"q{n}", "model": "m", "choice": choice} for n, choice in enumerate(choices)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": {"name": "medmcqa", "data": str(tmp_path), "advice_price": 0.4, "advice_counts": "if_right"},
        "experts": {"m": {"kind": "recorded", "answers": "answers.jsonl", "price": 0.1, "latency_s": 2.0}},
        "agent": {"product_k": 0, "group_k": 5, "knowledge_k": 0},
        "memory": {"encoder": "hashing"},
        "evaluate": {"agents": [], "baselines": ["always_ask"], "experts": ["gold", "m"]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agile.bench.write_report", lambda report, out: None)
    monkeypatch.setattr("agile.bench.save_plots", lambda report, out: None)


def test_recorded_experts_alone_and_asked(folder: Path) -> None:
    report = bench(load_config(folder / "config.yaml"), folder / "out")
    assert {n: (a["accuracy"], a["advice_rate"], round(a["score"], 6)) for n, a in report["agents"].items()} == {
        "m": (5 / 8, 0.0, 0.625),
        "asks m": (5 / 8, 1.0, 0.225),
        "asks gold": (1.0, 1.0, 0.6),
        "always_ask": (1.0, 1.0, 0.6),
    }
    assert report["advice_counts"] == "if_right"
    assert (report["details"]["m"], report["details"]["asks m"]) == ({"unreadable": 1}, {"unreadable advice": 1})
    assert "experts" not in report["details"]
    gold, recorded = report["experts"]["experts"]
    assert (gold["expert"], gold["accuracy"], gold["price"]) == ("gold", 1.0, 0.4)
    assert recorded == {
        "expert": "m",
        "accuracy": 0.625,
        "answered": 1.0,
        "unreadable": 0.125,
        "price": 0.1,
        "latency_s": 2.0,
    }
    (gain,) = report["experts"]["gains"]
    assert (gain["agent"], gain["expert"]) == ("m", "gold")
    assert gain["gain"] == pytest.approx(0.6 - 0.625)
    assert gain["worth_below"] == pytest.approx(0.375)


def test_who_asks_remembers_and_reads_its_memory(folder: Path) -> None:
    bench(load_config(folder / "config.yaml"), folder / "out")
    sessions = [session_from_json(row["session"]) for row in read_lines(folder / "out" / "test-asks-gold.jsonl")]
    assert [len(s.retrieved) for s in sessions] == [0, 1, 2, 3, 4, 5, 5, 5]
    assert all(len(s.written) == 1 and not s.failed for s in sessions)
    alone = [session_from_json(row["session"]) for row in read_lines(folder / "out" / "test-m.jsonl")]
    assert not any(s.written or s.advice for s in alone)


def test_by_the_papers_rule_experts_cannot_err(folder: Path) -> None:
    report = bench(load_config(folder / "config.yaml", ["task.advice_counts=always"]), folder / "out")
    assert report["advice_counts"] == "always"
    assert report["agents"]["asks m"]["accuracy"] == 1.0
    assert report["experts"]["experts"][1]["accuracy"] == 0.625  # what it said is what it said


def test_a_model_is_asked_and_timed(folder: Path) -> None:
    def reply(body: dict[str, Any]) -> Any:
        return said("So it is.\nAnswer: A" if "is 4?" not in body["messages"][1]["content"] else "Who knows?")

    with stub_endpoint() as stub:
        stub.reply = reply
        prices = {"input": 10, "output": 30}
        endpoint = {"base_url": stub.url, "model": "x", "api_key_env": None, "prices": prices}
        expert = {"kind": "model", "endpoint": endpoint}
        changes = [f"experts.x={json.dumps(expert)}", "evaluate.experts=[x]"]
        report = bench(load_config(folder / "config.yaml", changes), folder / "out")
        assert len(stub.requests) == NUM
        again = bench(load_config(folder / "config.yaml", changes), folder / "out")
        assert len(stub.requests) == NUM  # what was answered is kept
    (row,) = report["experts"]["experts"]
    assert (row["accuracy"], row["unreadable"], row["price"]) == (1 / 8, 1 / 8, 0.4)  # q0 alone; q4 said nothing
    assert row["latency_s"] > 0
    asks = report["agents"]["asks x"]
    assert asks["other_cost"] == {
        "expert": pytest.approx(NUM * 1300 / 1e6),
        "judge": 0.0,
    }  # 100 tokens read, 10 written
    assert asks["seconds"] > 0 < report["agents"]["always_ask"]["seconds"]
    assert "other_cost" not in again["agents"]["asks x"]
    assert again["experts"]["experts"][0]["accuracy"] == 1 / 8


def test_bad_rows_are_left_out_on_request_and_listed(folder: Path) -> None:
    with (folder / "dev.json").open("a") as file:
        file.write(json.dumps(question(9, cop=7)) + "\n")
    refused = agile("bench", folder / "config.yaml", f"out={folder / 'out'}")
    assert refused.exit_code == 2
    assert "line 9, field 'cop': expected the gold option as 1 to 4" in " ".join(refused.output.split())
    done = agile("bench", folder / "config.yaml", "--skip-bad-rows", f"out={folder / 'out2'}")
    assert done.exit_code == 0, done.output
    assert "1 bad rows left out" in " ".join(done.output.split())
    assert "line 9, field 'cop'" in (folder / "out2" / "skipped_rows.txt").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "q0", "choice": "Z"}], "line 1, field 'choice': expected null or one of A, B, C, D, found 'Z'"),
        (
            [{"id": "p0", "choice": "A"}],
            "none of its 1 recorded answers is to a test question, such as 'q0'; found 'p0'",
        ),
    ],
)
def test_recorded_answers_are_to_the_test_questions(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AgileError, match=message):
        bench(load_config(folder / "config.yaml"), folder / "out")
