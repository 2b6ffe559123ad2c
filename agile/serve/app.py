"""The web application: routes, errors, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jinja2
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from agile import __version__
from agile.config.serve import ServeConfig
from agile.serve import api, figures_page, pages, requests, review_pages, reviews, webhooks
from agile.serve.access import Access, administrator
from agile.serve.database import Database, DatabaseAway
from agile.serve.desk import Desk, Watch, desk_of
from agile.serve.errors import ApiError
from agile.serve.guard import Guard
from agile.serve.memory import DeskMemory
from agile.serve.metrics import Metrics
from agile.serve.runner import Runner
from agile.show import page_environment

HERE = Path(__file__).parent
SWAP_LOOK_S = 1.0
TELL_LOOK_S = 1.0
logger = logging.getLogger(__name__)


def create_app(
    config: ServeConfig,
    database: Database,
    runner: Runner,
    memory: DeskMemory,
    metrics: Metrics,
    access: Access,
) -> FastAPI:
    """The application of one server; starting and stopping it starts and stops the runner."""
    templates = templates_of()
    desk = Desk(config, database, runner, memory, metrics, access, templates, Watch(database))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(runner.start)
        tasks = (desk.watch.look(), swapping(runner), telling(desk))
        looking = [asyncio.create_task(task) for task in tasks]
        yield
        for task in looking:
            task.cancel()
        await asyncio.to_thread(runner.stop)

    app = FastAPI(
        title="AGILE",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.desk = desk
    app.include_router(api.router)
    app.include_router(pages.router, include_in_schema=False)
    app.include_router(review_pages.router, include_in_schema=False)
    app.include_router(figures_page.router, include_in_schema=False)
    app.add_api_route("/healthz", healthz, methods=["GET"], include_in_schema=False)
    app.add_api_route("/metrics", prometheus, methods=["GET"], include_in_schema=False, response_model=None)
    app.add_exception_handler(ApiError, _api_error)  # type: ignore[arg-type]
    app.add_exception_handler(DatabaseAway, _away)
    app.add_exception_handler(DataError, _unfit)
    app.add_exception_handler(Exception, _broken)
    app.add_exception_handler(RequestValidationError, _malformed)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_middleware(Guard, max_body_bytes=config.max_body_bytes, secure=access.secure)
    return app


async def swapping(runner: Runner) -> None:
    """For the life of the server: serve the agent that it is told to."""
    while True:
        with contextlib.suppress(DatabaseAway):
            await asyncio.to_thread(runner.look)
        await asyncio.sleep(SWAP_LOOK_S)


async def telling(desk: Desk) -> None:
    """For the life of the server: tell answers to webhooks."""
    while True:
        try:
            states = await asyncio.to_thread(
                webhooks.deliver, desk.database, api.answer_body, desk.config.webhook_hosts
            )
            for state in states:
                desk.metrics.webhooks.labels(state).inc()
        except DatabaseAway:
            pass
        except Exception:  # one that is odd must not keep the others waiting
            logger.exception("webhooks")
        await asyncio.sleep(TELL_LOOK_S)


def templates_of() -> jinja2.Environment:
    """Templates of the desk and of the pages of `agile show`; everything is escaped."""
    environment = page_environment()
    shared = environment.loader
    assert shared is not None
    environment.loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(HERE / "templates"), shared])
    environment.filters["when"] = lambda s: datetime.datetime.fromtimestamp(s).strftime("%Y-%m-%d %H:%M")
    return environment


def healthz(request: Request) -> dict[str, str]:
    """Whether the server and its database answer."""
    desk_of(request).database.check()
    return {"status": "ok"}


def prometheus(request: Request, user: object = Depends(administrator)) -> Response:
    """What Prometheus reads."""
    return Response(desk_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def queue_length(database: Database) -> float:
    """For the metrics; not a number while the database is away."""
    try:
        return requests.num_waiting(database)
    except DatabaseAway:
        return float("nan")


def accuracy(database: Database, *, sampled: bool) -> float:
    """The share of reviewed answers that are right, for the metrics; not a number while there is none."""
    try:
        share = reviews.accuracy(database, sampled=sampled).share
    except DatabaseAway:
        share = None
    return float("nan") if share is None else share


def _is_api(request: Request) -> bool:
    return request.url.path.startswith("/v1/")


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _away(request: Request, error: Exception) -> Response:
    message = "The database is away. Nothing of this request was kept; try again in a moment."
    if _is_api(request):
        return JSONResponse(ApiError(503, message, type="server_error", code="database_away").body, 503)
    return PlainTextResponse(message, 503)


async def _unfit(request: Request, error: Exception) -> Response:
    """What no database can look for, such as a NUL in PostgreSQL."""
    logger.warning("a request held what the database cannot read: %s", type(error.__cause__).__name__)
    message = "The request holds characters or numbers that cannot be read."
    if _is_api(request):
        return JSONResponse(ApiError(400, message).body, 400)
    return _page(request, 400, message)


async def _broken(request: Request, error: Exception) -> Response:
    return JSONResponse(
        ApiError(500, "Something is wrong in the server; its log says what.", type="server_error").body, 500
    )


async def _malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    if not _is_api(request):
        return _page(request, 422, f"The form cannot be read: {where}: {first['msg']}.")
    return JSONResponse(ApiError(400, f"{where or 'the body'}: {first['msg']}.", param=where or None).body, 400)


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 303:
        return Response(status_code=303, headers=dict(error.headers or {}))
    if _is_api(request):
        return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)
    return _page(request, error.status_code, str(error.detail))


def _page(request: Request, status: int, message: str) -> Response:
    page = desk_of(request).templates.get_template("message.html.j2")
    return HTMLResponse(page.render(login=None, title=str(status), message=message), status)
