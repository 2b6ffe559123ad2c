"""`agile bench` with a prompted agent: figures, money, and a bench that is stopped and started again."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agile.bench import bench
from agile.config import RunConfig, load_config
from agile.errors import AgileError
from agile.report import render_html, render_table
from agile.session_log import read_lines, session_from_json
from tests.stub_endpoint import KEY, Reply, StubEndpoint, refused, said, stub_endpoint


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubEndpoint]:
    monkeypatch.setattr("agile.bench.write_report", lambda report, out: None)
    monkeypatch.setattr("agile.bench.save_plots", lambda report, out: None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with stub_endpoint() as stub:
        stub.reply = decide
        yield stub


def config(stub: StubEndpoint, *more: str) -> RunConfig:
    words = ["task.num_train_worlds=1", "task.num_test_worlds=2", "task.num_questions=6", "memory.encoder=hashing"]
    words += ["rollout.max_context_tokens=4000", "rollout.max_session_tokens=4000", "rollout.max_action_tokens=100"]
    words += ["evaluate.agents=[prompted]", "evaluate.baselines=[router]", "evaluate.prompted.model=tiny"]
    words += ["evaluate.prompted.prices={input: 10, output: 30}", f"evaluate.prompted.base_url={stub.url}"]
    return load_config(None, [*words, "evaluate.prompted.tools=text", *more])


def decide(body: dict[str, Any]) -> Reply:
    """Asks about every other question, else says yes."""
    last = body["messages"][-1]["content"]
    if "Next: [Reflection]" in last:
        return said("[Reflection] red things are red")
    if "[SeekAdvice]" in last.rsplit("Next:", 1)[-1] and sum(map(ord, last)) % 2:
        return said("[SeekAdvice]")
    return said("[PredictAnswer] yes")


def canonical(requests: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(r, sort_keys=True) for r in requests)


def test_a_bench(stub: StubEndpoint, tmp_path: Path) -> None:
    report = bench(config(stub), tmp_path / "out")
    assert list(report["agents"]) == ["prompted", "router"]
    agent = report["agents"]["prompted"]
    assert agent["n"] == 12 and agent["failed"] == 0 and 0 < agent["advice_rate"] < 1
    sessions = [session_from_json(row["session"]) for row in read_lines(tmp_path / "out" / "test-prompted.jsonl")]
    assert agent["usage"]["cost"] == pytest.approx(sum(s.usage.cost for s in sessions))
    turns = sum(s.usage.completion_tokens for s in sessions) // 10
    assert agent["usage"]["cost"] == pytest.approx(turns * (100 * 10 + 10 * 30) / 1e6)
    details = report["details"]["prompted"]
    assert details["paid in this run"] == pytest.approx(len(stub.requests) * 1300 / 1e6)
    assert details["requests sent"] == len(stub.requests) <= turns
    assert [(c["a"], c["b"]) for c in report["comparisons"]] == [("prompted", "router")]

    console = Console(record=True, width=140)
    render_table(report, console)
    text = console.export_text()
    assert re.search(r"tokens +cost +cost in *\n.* each +each +all ", text), "heads of two lines"
    assert f"{agent['usage']['cost'] / 12:.4f}" in text
    page = render_html(report)
    assert "<th>Cost in all</th>" in page and "paid in this run" in page


def test_money_of_the_expert_of_an_agent(stub: StubEndpoint, tmp_path: Path) -> None:
    endpoint = {"base_url": stub.url, "model": "x", "prices": {"input": 1}}
    changes = ["expert=x", f"experts.x={json.dumps({'kind': 'model', 'endpoint': endpoint})}"]
    report = bench(config(stub, *changes), tmp_path / "out")
    agent = report["agents"]["prompted"]
    asked = sum("model" in r and r["model"] == "x" for r in stub.requests)
    assert agent["other_cost"] == {"expert": pytest.approx(asked * 100 / 1e6), "judge": 0.0} and asked > 0
    assert "other_cost" not in report["agents"]["router"]


@pytest.mark.parametrize("max_concurrent", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_bench_that_was_stopped_asks_nothing_twice(stub: StubEndpoint, tmp_path: Path, max_concurrent: int) -> None:
    limit = f"evaluate.prompted.max_concurrent={max_concurrent}"
    whole = bench(config(stub, limit), tmp_path / "whole")
    expected, served = canonical(stub.requests), len(stub.requests)
    assert set(expected.values()) == {1}

    answered: list[dict[str, Any]] = []

    def half(body: dict[str, Any]) -> Reply:
        if len(answered) >= served // 2:
            return refused(401, "no credit")
        answered.append(body)
        return decide(body)

    stub.reply = half
    with pytest.raises(AgileError, match="no credit"):
        bench(config(stub, limit), tmp_path / "out")
    stub.reply = decide
    stub.requests.clear()
    again = bench(config(stub, limit), tmp_path / "out")
    assert canonical(answered + stub.requests) == expected
    for report in (again, whole):
        for agent in report["agents"].values():
            del agent["seconds"]
    assert again["agents"] == whole["agents"]
    assert again["details"]["prompted"]["answers kept from before"] == len(answered)
    assert again["details"]["prompted"]["paid in this run"] < whole["details"]["prompted"]["paid in this run"]
    stub.requests.clear()
    bench(config(stub, limit), tmp_path / "out")
    assert not stub.requests, "a finished one costs nothing"


def test_what_is_refused_before_anything_is_touched(
    stub: StubEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(AgileError, match="OPENAI_API_KEY"):
        bench(config(stub), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not stub.requests
    with pytest.raises(AgileError, match=r"evaluate\.prompted\.model=NAME"):
        config(stub, "evaluate.prompted.model=null")


def test_agents_without_money_have_no_columns_for_it() -> None:
    agent = {"accuracy": 1.0, "advice_rate": 0.0, "score": 1.0, "score_ci": None, "n": 4, "failed": 0}
    usage = {"prompt_tokens": 300, "cached_tokens": 0, "completion_tokens": 108, "cost": 0.0}
    for agents, expected in (({"sft": agent}, ()), ({"sft": {**agent, "usage": usage}}, ("tokens each",))):
        console = Console(record=True, width=140)
        render_table({"task": "t", "advice_price": 0.3, "agents": agents}, console)
        text = console.export_text()
        assert ("tokens" in text, "cost" in text) == (bool(expected), False)
        assert not expected or "102" in text
