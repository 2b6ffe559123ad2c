"""The gateway over HTTP: OpenAI's chat and text completions, and trajectories for agents in other processes."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal
from uuid import uuid4

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from agile.chat_format import for_template
from agile.errors import AgileError
from agile.gateway.gateway import Gateway
from agile.gateway.trajectory import OpenTrajectory, Reply
from agile.serve.errors import ApiError
from agile.types import Usage

router = APIRouter(prefix="/v1")
KEEP_ALIVE_S = 10.0

# What would sample from another distribution than the one that is trained.
NEUTRAL: dict[str, Any] = {
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "n": 1,
    "best_of": 1,
    "stop": [],
    "suffix": "",
    "echo": False,
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class SamplingRequest(BaseModel):
    """What both kinds of completions take; what would change the distribution is in `model_extra`."""

    model_config = ConfigDict(extra="allow")
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1)


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: ToolFunction


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow")
    function: CalledFunction


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None


class ChatRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False


class CompletionRequest(SamplingRequest):
    prompt: str | list[int]


class Opening(BaseModel):
    model_config = ConfigDict(extra="forbid")
    group: str | None = None
    id: str | None = None


class Ending(BaseModel):
    """How a trajectory ended: with a reward, or with an error."""

    model_config = ConfigDict(extra="forbid")
    reward: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: an open trajectory, or the holder of the gateway's own key."""

    gateway: Gateway
    trajectory: OpenTrajectory | None


def _caller(request: Request) -> Caller:
    gateway: Gateway = request.app.state.gateway
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        if t := gateway.by_key(key):
            return Caller(gateway, t)
        if secrets.compare_digest(key.encode(), gateway.api_key.encode()):
            return Caller(gateway, None)
    raise ApiError(
        401,
        "No open trajectory and no gateway has this API key; a trajectory's key ends with it.",
        type="authentication_error",
        code="invalid_api_key",
    )


def _owner(caller: Annotated[Caller, Depends(_caller)]) -> Gateway:
    if caller.trajectory is not None:
        raise ApiError(403, "A trajectory's key opens and ends nothing; use the gateway's.", code="wrong_key")
    return caller.gateway


Called = Annotated[Caller, Depends(_caller)]
Owned = Annotated[Gateway, Depends(_owner)]


@router.get("/models")
def models(caller: Called) -> dict[str, Any]:
    """The one model that there is."""
    return {
        "object": "list",
        "data": [{"id": caller.gateway.name, "object": "model", "created": 0, "owned_by": "agile"}],
    }


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest, caller: Called) -> Response:
    """Answer a conversation; the tokens are recorded in the caller's trajectory."""
    answer = _Answering.of(caller, body, "chat.completion")
    choice = (body.model_extra or {}).get("tool_choice", "auto")
    if choice not in ("auto", "none", None):
        raise ApiError(
            400, f"tool_choice is {choice!r:.80}, expected auto or none: the policy chooses.", param="tool_choice"
        )
    tools = [t.model_dump() for t in body.tools or ()] if choice != "none" else []
    gateway, most = caller.gateway, body.max_completion_tokens or body.max_tokens
    with _bad_request("messages"):
        messages = [for_template(m.model_dump()) for m in body.messages]
    played = partial(gateway.chat, caller.trajectory, messages, tools or None, most)
    return await answer.respond(request, played, partial(_chat_choice, gateway, body.logprobs), _delta, body)


@router.post("/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest, caller: Called) -> Response:
    """Continue a text, or token ids."""
    answer, gateway = _Answering.of(caller, body, "text_completion"), caller.gateway
    ids = gateway.learner.tokenizer(body.prompt)["input_ids"] if isinstance(body.prompt, str) else body.prompt
    size = len(gateway.learner.tokenizer)
    if not ids or not all(0 <= i < size for i in ids):
        raise ApiError(400, f"prompt must hold a token, and ids below {size}.", param="prompt")
    played = partial(gateway.complete, caller.trajectory, ids, body.max_tokens)
    return await answer.respond(request, played, _text_choice, lambda choice: choice, body)


@router.post("/trajectories")
async def open_trajectory(body: Opening, gateway: Owned) -> dict[str, Any]:
    """Begin a trajectory: calls with its `api_key` belong to it."""
    with _bad_request("id"):
        t = gateway.open(group=body.group, id=body.id, remote=True)
    return {"id": t.id, "group": t.group, "api_key": t.api_key, "base_url": gateway.base_url}


@router.post("/trajectories/{id:path}/end")
async def end_trajectory(id: str, body: Ending, gateway: Owned) -> dict[str, Any]:
    """End a trajectory, with its reward or as failed."""
    t = gateway.by_id(id)
    if t is None:
        raise ApiError(404, f"No trajectory {id!r:.80} is open.", code="not_found")
    if body.error is not None:
        gateway.fail(t, body.error)
    else:
        with _bad_request("reward"):
            gateway.end(t, body.reward)
    await t.client.close()
    return {"id": t.id, "calls": t.num_calls}


@router.post("/train_step")
async def train_step(gateway: Owned) -> dict[str, Any]:
    """Learn from the trajectories that ended; answers when the next call would have the new weights."""
    with _bad_request(None):
        metrics = await gateway.train_step()
    return {name: value if value == value else None for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _bad_request(param: str | None) -> Iterator[None]:
    """Around what a client can have got wrong: its `AgileError` is a 400."""
    try:
        yield
    except AgileError as error:
        raise ApiError(400, str(error), param=param) from None


@dataclass(slots=True)
class _Answering:
    """An answer in OpenAI's shape, streamed or whole."""

    head: dict[str, Any]
    corrected: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, caller: Caller, body: SamplingRequest, kind: str) -> _Answering:
        """Check what both kinds of requests have.

        Raises:
            ApiError: Another model, or another distribution than the trained one.
        """
        gateway, asked = caller.gateway, body.model_extra or {}
        if body.model != gateway.name:
            raise ApiError(
                404,
                f"There is no model {body.model!r:.80}, only {gateway.name!r}: the one that is trained.",
                param="model",
                code="model_not_found",
            )
        for name, neutral in NEUTRAL.items():
            if name in asked and asked[name] not in (None, neutral):
                raise ApiError(
                    400,
                    f"{name} is {asked[name]!r:.80}: the trainer learns from the policy's own distribution, which this "
                    f"would change. Leave {name} out.",
                    param=name,
                )
        form = asked.get("response_format")
        if form is not None and form != {"type": "text"}:
            raise ApiError(
                400,
                f"response_format is {form!r:.80}: constrained sampling is not the policy's own distribution. Leave it "
                "out, and reward answers that have the form.",
                param="response_format",
            )
        temperature, corrected = gateway.learner.config.temperature, []
        if body.temperature not in (None, temperature):
            corrected.append(f"temperature {body.temperature:g} was taken as {temperature:g}, the trainer's")
            gateway.counts["corrected"] += 1
        t = caller.trajectory
        head = {
            "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": gateway.name,
            "agile": {"trajectory": None if t is None else t.id, "corrected": corrected},
        }
        return cls(head, corrected)

    async def respond(
        self,
        request: Request,
        play: Callable[[], Awaitable[Reply]],
        choice: Callable[[Reply], dict[str, Any]],
        delta: Callable[[dict[str, Any]], dict[str, Any]],
        body: SamplingRequest,
    ) -> Response:
        headers = {"x-agile-corrected": "; ".join(self.corrected)} if self.corrected else {}
        playing = asyncio.ensure_future(play())
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(playing, choice, delta, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        with _bad_request("messages"):
            reply = await _unless_gone(request, playing)
        if reply is None:
            return Response(status_code=499)  # read by nobody
        whole = {**self.head, "choices": [choice(reply)], "usage": _usage(reply.usage)}
        return JSONResponse(whole, headers=headers)

    async def _events(
        self,
        playing: asyncio.Future[Reply],
        choice: Callable[[Reply], dict[str, Any]],
        delta: Callable[[dict[str, Any]], dict[str, Any]],
        with_usage: bool,
    ) -> AsyncIterator[str]:
        """The answer in one piece when it is there; comments keep the connection alive until then."""
        kind = "chat.completion.chunk" if self.head["object"] == "chat.completion" else self.head["object"]

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps({**self.head, 'object': kind, 'choices': choices, **more})}\n\n"

        try:
            while not (await asyncio.wait({playing}, timeout=KEEP_ALIVE_S))[0]:
                yield ": sampling\n\n"
            reply = playing.result()
        except AgileError as error:
            yield f"data: {json.dumps(ApiError(400, str(error)).body)}\n\n"
            return
        finally:
            playing.cancel()  # where the client hung up
        yield event([delta(choice(reply))])
        if with_usage:
            yield event([], usage=_usage(reply.usage))
        yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, playing: asyncio.Future[Reply]) -> Reply | None:
    """What is played; None if the client hangs up, which ends it: nobody learns from an answer that nobody got."""
    gone = asyncio.ensure_future(_hung_up(request))
    either: set[asyncio.Future[Any]] = {playing, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return await playing if playing.done() else None
    finally:
        gone.cancel()
        playing.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _chat_choice(gateway: Gateway, logprobs: bool, reply: Reply) -> dict[str, Any]:
    answer = reply.answer
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.content or None if answer.tool_calls else answer.content,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in answer.tool_calls
        ]
    return {
        "index": 0,
        "message": message,
        "finish_reason": reply.finish_reason,
        "logprobs": _logprobs(gateway, reply) if logprobs else None,
    }


def _logprobs(gateway: Gateway, reply: Reply) -> dict[str, Any]:
    completion, content = reply.completion, []
    for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        text = str(gateway.learner.tokenizer.decode([token_id]))
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = dict(choice["message"])
    if "tool_calls" in message:
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
    return {**{k: v for k, v in choice.items() if k != "message"}, "delta": message}


def _text_choice(reply: Reply) -> dict[str, Any]:
    return {"index": 0, "text": reply.answer.content, "finish_reason": reply.finish_reason, "logprobs": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


# ----------------------------------------------------------------------------------------------------------------------


def create_app(gateway: Gateway) -> FastAPI:
    """The application of a gateway."""
    app = FastAPI(title="AGILE gateway", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.gateway = gateway
    app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _malformed)  # type: ignore[arg-type]
    return app


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(ApiError(400, f"{where or 'the body'}: {first['msg']}.", param=where or None).body, 400)


class _Server(uvicorn.Server):
    """Leaves signals to the program that it runs in."""

    @staticmethod
    def capture_signals() -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()


@asynccontextmanager
async def listening(gateway: Gateway, sock: socket.socket) -> AsyncIterator[None]:
    """Within it the gateway answers on a socket, which is closed at the end."""
    config = uvicorn.Config(
        create_app(gateway), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await serving
        sock.close()
