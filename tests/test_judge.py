"""A judge that answers nonsense is counted and shown, never scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agile.config import PromptedConfig
from agile.config.evaluate import TokenPrices
from agile.errors import AgileError
from agile.judge import judged
from agile.types import Advice, Item, Reward, Session, SessionStatus
from tests.stub_endpoint import Reply, refused, said, stub_endpoint


def played(
    answer: str | None, right: bool = False, advised: bool = False, failed: bool = False
) -> tuple[Item, Session]:
    status = SessionStatus.TRUNCATED if failed else SessionStatus.COMPLETED
    advice = Advice("Seine", price=0.3) if advised else None
    reward = Reward({"correct": float(right)})
    session = Session("s/0", "s", 0, "i", "bridge", 0, (), (), (), (), advice, answer, status, reward=reward)
    return Item("i", "Which river?", "Seine", "bridge"), session


CASES = [
    played("Seine", right=True),
    played("Loire", right=True, advised=True),
    played("Rhine", failed=True),
    played("river Seine"),
    played("Loire"),
    played("Marne"),
    played("perhaps"),
    played("Oise"),
    played("Aisne"),
]


def reply(body: dict[str, Any]) -> Reply:
    content = body["messages"][0]["content"]
    answers = {
        "river Seine": "Yes.",
        "Loire": " **no**, it is another",
        "Marne": "I would say so",
        "perhaps": "yesterday",
        "Oise": "No idea",
        "Aisne": "Yes or no",
    }
    return said(next(text for answer, text in answers.items() if f"Given answer: {answer}\n" in content))


def test_verdicts_are_read_or_left_out_and_shown(tmp_path: Path) -> None:
    with stub_endpoint() as stub:
        stub.reply = reply
        prices = TokenPrices(input=10, output=30)
        config = PromptedConfig(base_url=stub.url, model="judge", api_key_env=None, prices=prices)
        found = judged(config, tmp_path, CASES)
        assert found["judge cost"] == pytest.approx(6 * 1300 / 1e6)  # 100 tokens read and 10 written, each time
        assert len(stub.requests) == found["answers judged"] == 6, "right, advised and failed ones need no judge"
        assert found["verdicts that could not be read"] == 4
        assert found["said instead"] == "I would say so | yesterday | No idea"
        assert found["judged right"] == pytest.approx(3 / 5)
        assert found["judge"] == "judge"
        again = judged(config, tmp_path, CASES)
        assert "judge cost" not in again
        assert len(stub.requests) == 6, "what was answered is kept"
        assert again["judged right"] == found["judged right"]


def test_a_judge_that_rejects_a_case_says_nothing_of_it_and_one_without_a_key_ends_it(tmp_path: Path) -> None:
    with stub_endpoint() as stub:
        config = PromptedConfig(base_url=stub.url, model="judge", api_key_env=None)
        stub.reply = lambda body: refused(400, "content policy") if "Marne" in str(body) else reply(body)
        found = judged(config, tmp_path, CASES)
        assert "content policy" in found["said instead"] and found["verdicts that could not be read"] == 4
        stub.reply = lambda body: refused(401, "no credit")
        with pytest.raises(AgileError, match=r"no credit.*task\.judge\.base_url"):
            judged(config, tmp_path / "other", CASES)
