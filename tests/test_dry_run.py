"""`agile bench --dry-run`: what a benchmark would take."""

from pathlib import Path

import pytest

from agile.config import load_config
from agile.dry_run import plan_bench
from tests.tiny import TINY, agile

WORDS = [*TINY, "evaluate.agents=[sft, ppo, prompted]", "evaluate.prompted.model=m", "evaluate.prices=[.1, .3]"]
PRICED = ["evaluate.prompted.prices.input=10", "evaluate.prompted.prices.output=30", "evaluate.prompted.max_tokens=100"]


def test_a_plan_counts_sessions_calls_and_money() -> None:
    plans, whose = plan_bench(load_config(None, [*WORDS, *PRICED, "agent.show_price=true"]))
    sft, ppo, prompted = plans
    assert whose == "a tokenizer made of the task's texts"
    assert (sft.sessions, ppo.sessions, prompted.sessions) == (32, 32, 16)  # 2 worlds of 8; 0.1 is played anew
    assert 2 * prompted.calls == ppo.calls > ppo.sessions
    assert ppo.money is None and prompted.money is not None
    assert prompted.money == pytest.approx((10 * prompted.prompt_tokens + 30 * prompted.completion_tokens) / 1e6)
    assert prompted.most == pytest.approx((10 * prompted.prompt_tokens + 30 * 100 * prompted.calls) / 1e6)
    assert prompted.completion_tokens < prompted.prompt_tokens
    unseen, _ = plan_bench(load_config(None, WORDS))
    assert [plan.sessions for plan in unseen] == [16, 16, 16]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = agile("bench", "configs/demo.yaml", *WORDS, *PRICED, f"out={tmp_path / 'out'}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "prompted" in result.output and "evaluate.checkpoint" in result.output
    assert not list(tmp_path.iterdir())
