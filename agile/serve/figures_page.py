"""The desk's page of figures, where administrators set what advice costs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, HTTPException, Request, Response

from agile.serve import figures, terms
from agile.serve.access import Login, NeedsForm
from agile.serve.accounts import ADMINISTRATOR
from agile.serve.desk import desk_of, page, to
from agile.serve.pages import Expert

router = APIRouter()
Price = Annotated[float, Form(gt=0, le=1, allow_inf_nan=False)]


@router.get("/desk/figures")
def show(request: Request, login: Expert, said: str = "") -> Response:
    desk = desk_of(request)
    with desk.database.reading() as session:
        held = terms.newest(session)
        committed = terms.committed(session, "served")
    shown = figures.days(desk.database)
    return page(
        desk,
        "figures",
        login,
        days=shown,
        charts=figures.charts(shown),
        width=figures.WIDTH,
        height=figures.HEIGHT,
        price=desk.runner.served.executor.desk.price if held is None else held.advice_price,
        budget=None if held is None else held.daily_budget,
        committed=committed,
        changes=terms.history(desk.database),
        may_change=login.may(ADMINISTRATOR),
        said="It holds from now on." if said == "saved" else "",
    )


@router.post("/desk/figures/terms")
def change(
    request: Request,
    login: Annotated[Login, Depends(NeedsForm(ADMINISTRATOR))],
    price: Price,
    budget: Annotated[str, Form(max_length=32)] = "",
) -> Response:
    try:
        most = float(budget) if budget.strip() else None
    except ValueError:
        most = -1.0
    if most is not None and not 0 <= most < float("inf"):
        raise HTTPException(422, "The budget of a day is a number, at least 0, or nothing for any sum.")
    terms.change(desk_of(request).database, login.user.id, price, most)
    return to("/desk/figures", said="saved")
