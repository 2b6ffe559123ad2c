"""The desk: pages for experts and administrators."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from agile.conversation import TURNS
from agile.serve import accounts, questions, requests, reviews, webhooks
from agile.serve.access import COOKIE, LOGIN_COOKIE, Login, Needs, NeedsForm
from agile.serve.accounts import ADMINISTRATOR, EXPERT, USER
from agile.serve.database import new_id
from agile.serve.desk import desk_of, page, to
from agile.serve.requests import Said
from agile.show import describe, page_environment

router = APIRouter()
AnyUser = Annotated[Login, Depends(NeedsForm(USER))]
Expert = Annotated[Login, Depends(Needs(EXPERT))]
ExpertForm = Annotated[Login, Depends(NeedsForm(EXPERT))]
Line = Annotated[str, Form(max_length=2000)]
Text = Annotated[str, Form(max_length=8000)]
STATIC = {"desk.css": "text/css; charset=utf-8", "desk.js": "text/javascript; charset=utf-8"}
SHOWN = 50  # questions of the queue on a page
NO_ENTRY = "There is no such entry."
MESSAGES = {
    "taken": "Thank you. Your answer is on its way.",
    "noted": "Thank you. Another expert is asked too, for several must say the same.",
    "again": "Your answer was here already.",
    "late": "Who asked had stopped waiting. The agent remembers your answer.",
    "lost": "This question is no longer yours: somebody else has it, or nobody needs it any more.",
    "empty": "Write an answer first.",
    "unknown": "Noted. The next expert is asked, or the agent hears that nobody knows.",
    "skip": "Left to others.",
    "saved": "Saved.",
    "gone": "There is nothing to undo.",
}


# --------------------------------------------------------------------------------------------------------------------
# Coming in


@router.get("/")
def home() -> Response:
    return to("/desk/queue")


@router.get("/static/{name}")
def static(name: str) -> Response:
    if name not in STATIC:
        raise HTTPException(404, "There is no such file.")
    return Response(_static(name), media_type=STATIC[name], headers={"cache-control": "max-age=300"})


@lru_cache
def _static(name: str) -> str:
    own = (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")
    shared = page_environment().get_template("page.css.j2").render() if name.endswith(".css") else ""
    return shared + own


@router.get("/login")
def login_page(request: Request) -> Response:
    token = secrets.token_urlsafe(24)
    desk = desk_of(request)
    form = page(desk, "login", None, token=token, name="", error="")
    form.set_cookie(LOGIN_COOKIE, token, 3600, httponly=True, samesite="strict", secure=desk.access.secure)
    return form


@router.post("/login")
def log_in(
    request: Request,
    name: Annotated[str, Form(max_length=64)],
    password: Annotated[str, Form(max_length=1024)],
    token: Annotated[str, Form(max_length=64)] = "",
) -> Response:
    desk = desk_of(request)
    limits, keys = desk.access.logins, (("name", name), ("address", request.client.host if request.client else ""))
    known = request.cookies.get(LOGIN_COOKIE, "")
    if not known or not hmac.compare_digest(known.encode(), token.encode()):
        raise HTTPException(403, "The form was not of this browser. Load the login page again.")
    if any(limits.full(key) for key in keys):
        raise HTTPException(429, "Too many failed logins. Try again in a few minutes.")
    user = accounts.by_password(desk.database, name, password)
    if user is None:
        for key in keys:
            limits.add(key)
        again = page(desk, "login", None, token=token, name=name, error="The name or the password is wrong.")
        again.status_code = 401
        return again
    limits.forget(keys[0])
    answer = to("/desk/queue")
    access = desk.access
    answer.set_cookie(
        COOKIE, access.new_cookie(user), access.seconds, httponly=True, samesite="lax", secure=access.secure
    )
    answer.delete_cookie(LOGIN_COOKIE)
    return answer


@router.post("/logout")
def log_out(request: Request, login: AnyUser) -> Response:
    """Of every browser: a cookie that somebody copied ends too."""
    accounts.end_sessions(desk_of(request).database, login.user.id)
    answer = to("/login")
    answer.delete_cookie(COOKIE)
    return answer


# --------------------------------------------------------------------------------------------------------------------
# Queue


@router.get("/desk/queue")
def queue(request: Request, login: Expert, said: str = "") -> Response:
    return _queue(request, login, "queue", said)


@router.get("/desk/queue/list")
def queue_list(request: Request, login: Expert) -> Response:
    """What waits, without the page around it, for a page that is open."""
    return _queue(request, login, "queue_list", "")


def _queue(request: Request, login: Login, template: str, said: str) -> Response:
    desk = desk_of(request)
    waiting = requests.queue(desk.database, login.user.id)
    free = [w for w in waiting if not w.mine]
    return page(
        desk,
        template,
        login,
        mine=[w for w in waiting if w.mine],
        free=free[:SHOWN],
        more=max(0, len(free) - SHOWN),
        number=sum(not w.claimed_by and w.passed != "answered" for w in free),
        decides=login.may(ADMINISTRATOR),
        new_key=new_id,
        said=MESSAGES.get(said, ""),
    )


@router.get("/desk/events")
async def events(request: Request, login: Expert) -> Response:
    """Server-sent events: one for each change of the queue."""
    desk = desk_of(request)

    async def stream() -> AsyncIterator[str]:
        yield "retry: 2000\n\n"
        async for changed in desk.watch.changes():
            if await run_in_threadpool(accounts.by_id, desk.database, login.user.id, login.user.epoch) is None:
                return  # logged out meanwhile
            yield "event: queue\ndata: changed\n\n" if changed else ": nothing new\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


@router.post("/desk/requests/{request_id}/claim")
def claim(request: Request, request_id: str, login: ExpertForm) -> Response:
    desk = desk_of(request)
    taken = requests.claim(desk.database, request_id, login.user.id, claim_s=desk.config.claim_s)
    return to("/desk/queue", said="" if taken else "lost")


@router.post("/desk/requests/{request_id}/answer")
def answer(
    request: Request,
    request_id: str,
    login: ExpertForm,
    answer: Line = "",
    explanation: Text = "",
    key: Annotated[str, Form(max_length=64)] = "",
) -> Response:
    desk = desk_of(request)
    if not answer.strip() or "\0" in answer + explanation:
        return to("/desk/queue", said="empty")
    words = " ".join(answer.split()), explanation.strip()
    said = requests.answer(desk.database, request_id, login.user.id, *words, key)
    if said is Said.LATE:
        desk.runner.learn(request_id)
    return to("/desk/queue", said=said)


@router.post("/desk/requests/{request_id}/unknown")
def unknown(request: Request, request_id: str, login: ExpertForm) -> Response:
    done = requests.unknown(desk_of(request).database, request_id, login.user.id)
    return to("/desk/queue", said="unknown" if done else "lost")


@router.post("/desk/requests/{request_id}/skip")
def skip(request: Request, request_id: str, login: ExpertForm) -> Response:
    done = requests.skip(desk_of(request).database, request_id, login.user.id)
    return to("/desk/queue", said="skip" if done else "lost")


# --------------------------------------------------------------------------------------------------------------------
# Memory


@router.get("/desk/memory")
def memory(request: Request, login: Expert, q: str = "") -> Response:
    desk = desk_of(request)
    return page(desk, "memory", login, query=q, entries=desk.memory.search(q[:2000]), number=len(desk.memory))


@router.get("/desk/memory/{entry_id}")
def memory_entry(request: Request, entry_id: int, login: Expert, said: str = "") -> Response:
    desk = desk_of(request)
    found = desk.memory.entry(_number(entry_id))
    if found is None:
        raise HTTPException(404, NO_ENTRY)
    entry, retired, changes = found
    session = questions.id_of(desk.database, entry.session_id)
    reads, accuracy = reviews.use_of(desk.database, entry_id)
    return page(
        desk,
        "memory_entry",
        login,
        entry=entry,
        retired=retired,
        changes=changes,
        session=session,
        reads=reads,
        accuracy=accuracy,
        said=MESSAGES.get(said, ""),
    )


@router.post("/desk/memory/{entry_id}/edit")
def edit(request: Request, entry_id: int, login: ExpertForm, key: Line, text: Text, answer: Line = "") -> Response:
    if not key.strip() or not text.strip() or "\0" in key + text + answer:
        raise HTTPException(422, "An entry needs what it is found by, and a text.")
    texts = {"key": key.strip(), "text": text.strip(), "answer": answer.strip()}
    return _changed(entry_id, desk_of(request).memory.edit(_number(entry_id), login.user.id, **texts))


@router.post("/desk/memory/{entry_id}/retire")
def retire(request: Request, entry_id: int, login: ExpertForm) -> Response:
    return _changed(entry_id, desk_of(request).memory.retire(_number(entry_id), login.user.id))


@router.post("/desk/memory/{entry_id}/undo")
def undo(request: Request, entry_id: int, login: ExpertForm) -> Response:
    return _changed(entry_id, desk_of(request).memory.undo(_number(entry_id), login.user.id))


def _number(entry_id: int) -> int:
    """Raises HTTPException for a number that no database counts up to."""
    if abs(entry_id) >= 2**62:
        raise HTTPException(404, NO_ENTRY)
    return entry_id


def _changed(entry_id: int, done: bool) -> Response:
    return to(f"/desk/memory/{entry_id}", said="saved" if done else "gone")


# --------------------------------------------------------------------------------------------------------------------
# Sessions


@router.get("/desk/sessions")
def sessions(request: Request, login: Expert, before: int | None = None) -> Response:
    desk = desk_of(request)
    before = None if before is None else max(0, min(before, 2**62))
    return page(
        desk,
        "sessions",
        login,
        asked=questions.newest(desk.database, before=before),
        troubled=webhooks.troubled(desk.database),
    )


@router.get("/desk/sessions/{question_id}")
def session(request: Request, question_id: str, login: Expert) -> Response:
    desk = desk_of(request)
    question = questions.by_id(desk.database, question_id)
    if question is None:
        raise HTTPException(404, "There is no such session.")
    played = questions.session_of(desk.database, question.number)
    view = None if played is None else describe(played, desk.runner.served.executor.codec)
    turns = json.loads(question.context).get(TURNS, ())
    told = webhooks.of(desk.database, [question.number])
    words = reviews.history(desk.database, [question.number]).get(question.number, [])
    return page(desk, "desk_session", login, question=question, view=view, words=words, told=told, turns=turns)


@router.post("/desk/webhooks/{webhook_id}/again")
def webhook_again(request: Request, webhook_id: int, login: ExpertForm) -> Response:
    known = abs(webhook_id) < 2**62 and webhooks.again(desk_of(request).database, webhook_id)
    return to("/desk/sessions", said="" if known else "gone")
