"""The desk's page where people say whether the answers that the agent gave on its own are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Request, Response

from agile.serve import questions, reviews
from agile.serve.database import new_id
from agile.serve.desk import Desk, desk_of, page, to
from agile.serve.models import Question
from agile.serve.pages import Expert, ExpertForm, Line, Text
from agile.serve.requests import Said
from agile.serve.reviews import CORRECTED, ORDERS, RIGHT, WRONG
from agile.types import Advice, MemoryItem

router = APIRouter()
MESSAGES = {
    "right": "Noted as right.",
    "wrong": "Noted as wrong.",
    "corrected": "Corrected. The agent knows it from now on.",
    "again": "That was noted already.",
    "empty": "Write the right answer first.",
}


@router.get("/desk/review")
def review_list(request: Request, login: Expert, order: str = ORDERS[0], said: str = "") -> Response:
    desk, order = desk_of(request), order if order in ORDERS else ORDERS[0]
    return page(
        desk,
        "review",
        login,
        order=order,
        answers=reviews.own_answers(desk.database, order),
        left=reviews.num_left(desk.database),
        accuracy={name: reviews.accuracy(desk.database, sampled=name == "sampled") for name in ("all", "sampled")},
        new_key=new_id,
        said=MESSAGES.get(said, ""),
    )


@router.post("/desk/review/{question_id}")
def review(
    request: Request,
    question_id: str,
    login: ExpertForm,
    verdict: Annotated[str, Form(pattern="^(right|wrong|corrected)$")],
    key: Annotated[str, Form(min_length=1, max_length=64)],
    order: Annotated[str, Form(max_length=16)] = ORDERS[0],
    answer: Line = "",
    explanation: Text = "",
) -> Response:
    desk = desk_of(request)
    question = questions.by_id(desk.database, question_id)
    if question is None or question.status != "answered" or question.advised is not False:
        raise HTTPException(404, "There is no such answer of the agent's own.")
    answer, explanation = " ".join(answer.split()), explanation.strip()
    if "\0" in answer + explanation or (verdict == CORRECTED and not answer):
        return to("/desk/review", order=order, said="empty")
    given = question.answer or ""
    if verdict == CORRECTED or (verdict == WRONG and answer):
        verdict = RIGHT if answer.casefold().split() == given.casefold().split() else CORRECTED
    said = reviews.review(
        desk.database,
        desk.memory,
        question,
        login.user.id,
        verdict,
        answer=answer,
        explanation=explanation,
        sampled=order == "sample",
        key=key,
        lesson=_lesson(desk, question, answer if verdict == CORRECTED else given, login.user.name),
    )
    if said is Said.TAKEN:
        desk.metrics.reviews.labels(verdict).inc()
    return to("/desk/review", order=order, said=verdict if said is Said.TAKEN else "again")


def _lesson(desk: Desk, question: Question, answer: str, name: str) -> list[MemoryItem]:
    """What the agent would remember, had this person advised it."""
    served = desk.runner.served
    if question.product not in served.products:
        return []
    item = replace(served.item(question), answer=answer)
    return served.executor.agent.remember(item, item.id, Advice(answer, expert=name), "")
