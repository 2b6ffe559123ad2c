"""An expert that is a model behind an endpoint."""

from __future__ import annotations

import asyncio

import pytest

from agile.advice.model import ModelAdvisor
from agile.policies.endpoint import Endpoint
from agile.types import Advice, AdviceRequest, AdviceStatus, Item
from tests.stub_endpoint import StubEndpoint, said, stub_endpoint

ITEM = Item("q0", "Which dissolves?", "B", "k", context={"options": {"A": "Oil", "B": "Salt"}})


def ask(endpoint: StubEndpoint, times: int = 1, message: str = "") -> list[Advice]:
    async def run() -> list[Advice]:
        advisor = ModelAdvisor(
            Endpoint(endpoint.url, "m", api_key_env=None), lambda item: f"question: {item.question}\n"
        )
        try:
            request = AdviceRequest("s/0", ITEM, message, 0.3)
            return [await advisor.advise(request) for _ in range(times)]
        finally:
            await advisor.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "answer", "explanation"),
    [
        ("Salt is polar.\nAnswer: B", "B", "Salt is polar."),
        ("Answer: A\nNo, it is polar.\n**Answer: B**", "B", "Answer: A No, it is polar."),
        ("answer = (b) Salt", "(b) Salt", ""),
        ("It depends.", "It depends.", ""),  # the task says whether it can be read
    ],
)
def test_the_last_line_is_the_answer_and_the_rest_explains(text: str, answer: str, explanation: str) -> None:
    with stub_endpoint() as endpoint:
        endpoint.reply = lambda body: said(text)
        assert ask(endpoint) == [Advice(answer, explanation, expert="m", price=0.3)]


def test_each_question_is_paid_for_once_and_silence_is_not_knowing() -> None:
    with stub_endpoint() as endpoint:
        endpoint.reply = lambda body: said("Answer: B")
        assert [a.answer for a in ask(endpoint, times=3, message="I think A")] == ["B"] * 3
        (sent,) = endpoint.requests
        assert sent["messages"][1]["content"] == "question: Which dissolves?\n\nWho asks adds: I think A\n"
        endpoint.reply = lambda body: said("  ")
        assert [a.status for a in ask(endpoint)] == [AdviceStatus.REFUSED]
