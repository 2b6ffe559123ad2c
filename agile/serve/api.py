"""The API: chat completions as OpenAI's clients ask for them, and answers that came later."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from agile.conversation import TURNS, last_turns
from agile.errors import AgileError
from agile.serve import accounts, questions, webhooks
from agile.serve.access import KeyUser
from agile.serve.desk import Desk, desk_of
from agile.serve.errors import ApiError
from agile.serve.models import Question
from agile.serve.runner import Progress, Served
from agile.subjects import OPTIONS, question_about

router = APIRouter(prefix="/v1")
ASKED = "An expert has been asked. The answer will be at GET /v1/answers/{id}."
NO_ANSWER = "The agent came to no answer."
POLL_S = 0.25


class Part(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request as OpenAI's API defines it; what has no meaning here, such as temperature, is not looked at."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    metadata: dict[str, str] | None = Field(
        None,
        description="`product`: what the question is about; `webhook`: where the answer is posted; `A`, `B`, ...: "
        "options to choose from.",
    )


@router.get("/models")
def models(request: Request, user: KeyUser) -> dict[str, Any]:
    """The models: the agent, and the agent asked about each product, for clients that can choose nothing else."""
    served = desk_of(request).runner.served
    names = [served.name, *(f"{served.name}/{product}" for product in served.products if product)]
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "agile"} for name in names]
    return {"object": "list", "data": data}


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest, user: KeyUser) -> JSONResponse | StreamingResponse:
    """Ask the agent the last message; experts see those before it, the model if its config says so."""
    desk = desk_of(request)
    product = _product(desk.runner.served, body)
    text = _question(body, desk.config.max_question_chars)
    known = _known(desk.runner.served, product, text, body, desk.config.max_question_chars)
    webhook = (body.metadata or {}).get("webhook", "")
    if webhook and (why := webhooks.problem(webhook)):
        raise ApiError(400, f"The webhook {webhook!r:.80} is none: {why}.", param="metadata.webhook")
    if desk.access.questions.full(user.id):
        raise ApiError(
            429, "Too many questions in a minute; wait a little.", type="rate_limit_error", code="rate_limit"
        )
    desk.access.questions.add(user.id)
    question, progress = await asyncio.wrap_future(desk.runner.ask(user.id, text, product, webhook, known))
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(desk, question, progress, body.model, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
    await asyncio.wait({asyncio.wrap_future(progress.done)}, timeout=desk.config.wait_s)
    message = {"role": "assistant", "content": _content(question, progress)}
    return JSONResponse(
        {
            **_head(question, "chat.completion", body.model),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": _usage(progress),
        }
    )


@router.get("/answers/{answer_id}")
def answer(request: Request, answer_id: str, user: KeyUser) -> dict[str, Any]:
    """How far a question is: `working`, `waiting` (for an expert), `answered` or `failed`."""
    question = questions.by_id(desk_of(request).database, answer_id)
    if question is None or (question.user_id != user.id and user.role != accounts.ADMINISTRATOR):
        raise ApiError(404, f"There is no answer {answer_id!r:.80} of yours.", param="answer_id", code="not_found")
    return answer_body(question)


def answer_body(question: Question) -> dict[str, Any]:
    """What is said of a question, to who asks for it and to webhooks."""
    return {
        "id": question.id,
        "object": "answer",
        "created": int(question.created_at),
        "status": question.status,
        "question": question.text,
        "product": question.product,
        "answer": question.answer,
        "error": NO_ANSWER if question.status == "failed" else None,
    }


def _product(served: Served, body: ChatRequest) -> str:
    """What the question is about: of the metadata, else of the model's name, else the only one there is."""
    name, _, of_model = body.model.partition("/")
    if name != served.name or (of_model and of_model not in served.products):
        raise ApiError(
            404, f"There is no model {body.model!r:.80}; GET /v1/models.", param="model", code="model_not_found"
        )
    product = (body.metadata or {}).get("product", of_model)
    if not product and len(served.products) == 1:
        return next(iter(served.products))
    if product not in served.products:
        some = ", ".join(list(served.products)[:8])
        raise ApiError(
            400,
            f"The product is {product!r:.80}, expected one of {some}; choose the model {served.name}/PRODUCT, or send "
            'metadata {"product": ...}.',
            param="metadata.product",
        )
    return product


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or ())


def _known(served: Served, product: str, text: str, body: ChatRequest, most: int) -> dict[str, Any]:
    """What goes with this question alone: the messages before it, options to choose from."""
    before = [(m.role, _text(m)) for m in body.messages[:-1] if m.role in ("user", "assistant")]
    options = {k: v.replace("\0", "") for k, v in (body.metadata or {}).items() if re.fullmatch("[A-Z]", k)}
    known = {TURNS: last_turns(before, most), OPTIONS: dict(sorted(options.items()))}
    try:
        question_about(served.products[product], "", text, "", known)
    except AgileError as error:
        raise ApiError(400, str(error), param="metadata") from None
    return {name: value for name, value in known.items() if value}


def _question(body: ChatRequest, most: int) -> str:
    last = body.messages[-1]
    content = _text(last)
    if last.role != "user" or not content.strip() or "\0" in content:
        raise ApiError(400, "The last message must be the user's, with text.", param="messages")
    if len(content) > most:
        raise ApiError(400, f"The question has {len(content)} characters, at most {most} are read.", param="messages")
    return content.strip()


def _content(question: Question, progress: Progress) -> str:
    if question.status == "answered":
        return question.answer or ""
    if question.status == "failed":
        return NO_ANSWER
    if progress.asking:
        return ASKED.format(id=question.id)
    return f"The agent is still at it. The answer will be at GET /v1/answers/{question.id}."


def _head(question: Question, kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{question.id}",
        "object": kind,
        "created": int(question.created_at),
        "model": model,
        "agile": {"answer_id": question.id, "status": question.status},
    }


def _usage(progress: Progress) -> dict[str, int]:
    read, written = progress.read, progress.written
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _events(
    desk: Desk, question: Question, progress: Progress, model: str, with_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events; comments keep the connection alive and say what is waited for."""

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        return (
            f"data: {json.dumps({**_head(question, 'chat.completion.chunk', model), 'choices': choices, **more})}\n\n"
        )

    def choice(delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    done = asyncio.wrap_future(progress.done)
    told, spoken = False, time.monotonic()
    while not (await asyncio.wait({done}, timeout=POLL_S))[0]:
        if progress.asking and not told:
            told, spoken = True, time.monotonic()
            yield f": an expert has been asked, {question.id}\n\n"
        elif time.monotonic() - spoken > desk.config.keep_alive_s:
            spoken = time.monotonic()
            yield ": waiting\n\n"
    yield chunk(choice({"content": _content(question, progress)}))
    yield chunk(choice({}, "stop"))
    if with_usage:
        yield chunk([], usage=_usage(progress))
    yield "data: [DONE]\n\n"
