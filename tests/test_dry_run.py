"""`agile bench --dry-run`: what a benchmark would take."""

import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from agile.bench import bench
from agile.config import load_config
from agile.dry_run import Plan, plan_bench, print_plan
from agile.session_log import read_lines
from tests.tiny import TINY, TinyRun, agile

WORDS = [*TINY, "evaluate.agents=[sft, ppo, prompted]", "evaluate.prompted.model=m", "evaluate.prices=[.1, .3]"]
PRICED = ["evaluate.prompted.prices.input=10", "evaluate.prompted.prices.output=30", "evaluate.prompted.max_tokens=100"]


def test_a_plan_counts_sessions_calls_and_money() -> None:
    plans, whose, _ = plan_bench(load_config(None, [*WORDS, *PRICED, "agent.show_price=true"]))
    sft, ppo, prompted = plans
    assert whose == "a tokenizer made of the task's texts"
    assert (sft.sessions, ppo.sessions, prompted.sessions) == (32, 32, 16)  # 2 worlds of 8; 0.1 is played anew
    assert 2 * prompted.calls == ppo.calls > ppo.sessions
    assert ppo.money is None and prompted.money is not None
    assert prompted.money == pytest.approx((10 * prompted.prompt_tokens + 30 * prompted.completion_tokens) / 1e6)
    assert prompted.most == pytest.approx((10 * prompted.prompt_tokens + 30 * 100 * prompted.calls) / 1e6)
    assert prompted.completion_tokens < prompted.prompt_tokens
    *_, ablations = plan_bench(load_config(None, [*WORDS, "evaluate.ablations=[memory, rl, tools]"]))[0]
    assert (ablations.agent, ablations.sessions) == ("ppo, ablations", 32)  # of `rl` the agent sft is played anyway
    unseen = plan_bench(load_config(None, WORDS))[0]
    assert [plan.sessions for plan in unseen] == [16, 16, 16]


def test_a_plan_needs_no_model_on_this_machine(tmp_path: Path) -> None:
    plans, whose, _ = plan_bench(load_config(None, [*WORDS, f"model.path={tmp_path / 'absent'}"]))
    assert plans[0].prompt_tokens > 0
    assert whose == f"a tokenizer made of the task's texts, for that of {tmp_path / 'absent'} is not on this machine"


@pytest.mark.slow
def test_a_plan_counts_what_a_bench_plays(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, ablations, several prices, experts: as many sessions as then lie in the folder."""
    monkeypatch.setattr("agile.bench.write_report", lambda report, out: None)
    monkeypatch.setattr("agile.bench.save_plots", lambda report, out: None)
    other = shutil.copytree(tiny_run.path, tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    (tmp_path / "answers.jsonl").write_text('{"id": "shop_0003/fact_qa_0", "answer": "yes"}\n')
    words = [f"evaluate.checkpoint=[{tiny_run.path}, {other}]", "agent.show_price=true", "evaluate.baselines=[]"]
    words += ["evaluate.agents=[ppo]", "evaluate.ablations=[memory, rl]", "evaluate.prices=[0.1, 0.3]"]
    words += [f"experts.m={{kind: recorded, answers: {tmp_path / 'answers.jsonl'}}}", "evaluate.experts=[gold, m]"]
    config = load_config(tiny_run.path / "config.yaml", words)
    plans = plan_bench(config)[0]
    assert {plan.agent: plan.sessions for plan in plans} == {
        "ppo": 2 * 16 * 2,  # runs, questions, prices; 0.3 is the config's own
        "ppo, ablations": 2 * 16 * 2,  # of `rl` the agent sft is played anyway
        "m": 2 * 16,
        "asks m": 2 * 16,
        "asks gold": 2 * 16,
    }
    bench(config, tmp_path / "out", config.evaluate.checkpoint)
    played = Counter(path.stem for path in (tmp_path / "out").rglob("test-*.jsonl") for _ in read_lines(path))
    assert played.total() == sum(plan.sessions for plan in plans), played


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = agile("bench", "configs/demo.yaml", *WORDS, *PRICED, f"out={tmp_path / 'out'}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "prompted" in result.output and "evaluate.checkpoint" in result.output
    assert not list(tmp_path.iterdir())


MODELS = [
    "evaluate.experts=[doctor]",
    "expert=doctor",
    "experts.doctor={kind: model, endpoint: {model: d, max_tokens: 200, prices: {input: 1, output: 4}}}",
]


def test_a_plan_counts_models_that_judge_and_advise(tmp_path: Path) -> None:
    rows = [
        {"_id": f"q{k}", "question": f"which is {k}?", "answer": "that", "type": "bridge", "level": "easy",
         "supporting_facts": [["a", 0]], "context": [["a", ["one. "]], ["b", ["two."]]]}
        for k in range(10)
    ]  # fmt: skip
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps(rows))
    words = ["task.name=hotpotqa", f"task.data={file}", f"task.test_data={file}", "memory.encoder=hashing"]
    words += ["evaluate.agents=[prompted]", "evaluate.prompted.model=m", "rollout.max_turns=16", *MODELS]
    words += ["task.judge={model: j, max_tokens: 10, prices: {input: 2, output: 8}}"]
    plans = {plan.agent: plan for plan in plan_bench(load_config(None, words))[0]}
    assert list(plans) == ["prompted", "asks doctor", "expert doctor", "judge"]
    asked, expert, judge = (plans[name] for name in ("asks doctor", "expert doctor", "judge"))
    assert (asked.sessions, asked.calls, asked.expert_calls) == (10, 10, 10)
    assert expert.calls == plans["prompted"].expert_calls > 0 == expert.sessions
    assert (judge.sessions, judge.calls, judge.completion_tokens) == (0, 10, 10)  # at most every answer
    assert judge.money == pytest.approx((2 * judge.prompt_tokens + 8 * 10) / 1e6, rel=1e-3)
    assert judge.most == pytest.approx((2 * judge.prompt_tokens + 8 * 10 * 10) / 1e6, rel=1e-3)
    assert asked.most == pytest.approx((asked.prompt_tokens + 4 * 10 * 200) / 1e6, rel=1e-3)
    words += ["evaluate.agents=[sft,prompted]", "agent.show_price=true", "evaluate.prices=[0.1]"]
    plans = {plan.agent: plan for plan in plan_bench(load_config(None, words))[0]}
    assert (plans["sft"].sessions, plans["judge"].calls) == (20, 20)  # what is played at another price is not judged


def test_a_plan_is_whole_on_a_narrow_screen_and_lists_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("asks gpt-35-turbo-16k", 14_365, 1_767_630, 17_676_300, 2_345_678, 999_999, 4123.45, 12_345.67)
    free = replace(plan, money=0.0, most=0.0)
    bad = [f"dev.json, line {k}: bad [row]" for k in range(30)]
    monkeypatch.setattr("agile.dry_run.plan_bench", lambda config: ([plan, free], "a tokenizer", bad))
    console = Console(width=80, record=True, file=io.StringIO())
    print_plan(load_config(None, []), console)
    text = console.export_text()
    row = "asks gpt-35-turbo-16k 14.4k 1.8M 17.7M 2.3M 1.0M 4,123 to 12,346"
    assert row in " ".join(text.split()) and "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "Bad rows that are left out: 30" in text and "dev.json, line 19: bad [row]" in text
    assert "dev.json, line 20" not in text and "no prices set" in text
