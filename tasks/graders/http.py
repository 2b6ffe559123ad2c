"""Graders over HTTP: the hosted API's `POST /v1/fine_tuning/alpha/graders/validate` and `/run`, on this machine.

Whoever reaches the server may run graders of theirs, so it listens on the loopback address alone, answers no requests
of web pages, and runs no `function` graders, which would import code of this process unconfined.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from agile.errors import AgileError
from agile.tasks.graders.command import asks_model
from agile.tasks.graders.grading import Grading
from agile.tasks.graders.models import FunctionGrader, Grader, Multi, parse_grader, read_json
from agile.tasks.graders.sandbox import Limits

if TYPE_CHECKING:
    from agile.policies.endpoint import Endpoint

HOST = "127.0.0.1"
PATH = "/v1/fine_tuning/alpha/graders"
MAX_BODY_BYTES = 4_000_000
_KEYS = {"validate": ("grader",), "run": ("grader", "model_sample", "item")}


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}


def graders_app(make_endpoint: Callable[[], Endpoint], limits: Limits | None = None) -> FastAPI:
    """The application.

    Args:
        make_endpoint: Reaches the models that grade; called when the first of their graders comes.
        limits: Of python graders.
    """
    grading = Grading(None, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with grading:
            yield

    app = FastAPI(title="AGILE graders", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # of no page that renamed itself

    @app.post(f"{PATH}/validate")
    async def validate(request: Request) -> JSONResponse:
        grader = _grader(await _body(request, "validate"))
        return JSONResponse({"grader": grader.model_dump(mode="json", exclude_none=True)})

    @app.post(f"{PATH}/run")
    async def run(request: Request) -> JSONResponse:
        body = await _body(request, "run")
        grader = _grader(body)
        sample, item = body.get("model_sample"), body.get("item") or {}
        if not isinstance(sample, str):
            raise _Refused(400, "model_sample: expected the text that the model wrote.", "model_sample")
        if not isinstance(item, dict):
            raise _Refused(400, "item: expected an object.", "item")
        try:
            if grading.endpoint is None and asks_model(grader):
                grading.endpoint = make_endpoint()
            grade = await grading.grade(grader, sample, item)
        except AgileError as error:  # a key, a library or an endpoint is missing: no other request would fare better
            raise _Refused(500, str(error), kind="server_error") from None
        return JSONResponse(grade.to_json())

    app.add_exception_handler(_Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    return app


async def _body(request: Request, name: str) -> Mapping[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send without asking is of another type
        raise _Refused(415, f"The content type is {kind or 'missing'}, expected application/json.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise _Refused(413, f"The body has more than {MAX_BODY_BYTES:,} bytes.")
    try:
        body = read_json(data.decode(), "The body")
    except (UnicodeDecodeError, AgileError) as error:
        raise _Refused(400, str(error)) from None
    if not isinstance(body, dict):
        raise _Refused(400, f"The body is {json.dumps(body)[:80]}: expected an object with {', '.join(_KEYS[name])}.")
    if strange := sorted(body.keys() - {*_KEYS[name]}):
        what = "what templates read as item.X stands in item" if name == "run" else "expected grader alone"
        raise _Refused(400, f"{strange[0]!r} is unknown; {what}.", strange[0])
    return body


def _grader(body: Mapping[str, Any]) -> Grader:
    try:
        grader = parse_grader(body.get("grader"), "grader")
    except AgileError as error:
        raise _Refused(400, str(error), "grader") from None
    parts = grader.graders.values() if isinstance(grader, Multi) else [grader]
    if any(isinstance(part, FunctionGrader) for part in parts):
        raise _Refused(
            400, "function graders are not run over HTTP; use agile grade run, or a python grader.", "grader.type"
        )
    return grader


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _Refused)
    return JSONResponse(error.body, error.status)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    paths = f"There are POST {PATH}/validate and POST {PATH}/run."
    return JSONResponse(_Refused(error.status_code, f"{error.detail}. {paths}").body, error.status_code)
