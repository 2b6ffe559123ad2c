"""Several experts who must say the same, working hours, and who is asked where the desk has no answer."""

from __future__ import annotations

import asyncio
import datetime
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from agile.config.hours import HoursConfig
from agile.serve import accounts, requests
from agile.serve.advisor import DeskAdvisor
from agile.serve.database import Database
from agile.serve.requests import NobodyAsked, Outcome, Said
from agile.types import Advice, AdviceRequest, AdviceStatus
from tests.serve.desk import PEOPLE, Counted, an_app, asks_once, open_desk, running, until
from tests.worlds import item

CUST, ANN, BOB, ROOT, EVE = 1, 2, 3, 4, 5
MONDAY = datetime.datetime(2026, 7, 6, tzinfo=datetime.UTC)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_desk(tmp_path, {**PEOPLE, "eve": "expert"})


def post(database: Database, agree: int = 2, session: str = "s", closed: bool = False) -> tuple[int, str]:
    asker = requests.post(
        database,
        scope="served",
        session_id=session,
        session_key=session,
        question="is it warm ?",
        group="g",
        product="p1",
        detail={},
        price=0.3,
        reuse=False,
        agree=agree,
        closed=closed,
    )
    return asker, requests.queue(database, ANN)[0].id


def says(database: Database, request: str, user: int, answer: str, why: str = "", key: str = "k") -> Said:
    assert requests.claim(database, request, user, claim_s=60)
    return requests.answer(database, request, user, answer, why, key)


def test_two_who_say_the_same_answer_it(database: Database) -> None:
    asker, request = post(database)
    before = requests.snapshot(database)
    assert says(database, request, ANN, "Yes.", "it glows") is Said.NOTED
    assert requests.snapshot(database) != before, "who watches the queue sees that somebody answered"
    assert requests.answer(database, request, ANN, "Yes.", "it glows", "k") is Said.AGAIN, "sent twice"
    assert not requests.claim(database, request, ANN, claim_s=60), "nobody agrees with themselves"
    assert requests.outcomes(database, [asker]) == {}
    (seen,) = requests.queue(database, BOB)
    assert [(g.expert, g.answer) for g in seen.given] == [("ann", "Yes.")] and not seen.claimed_by
    assert requests.queue(database, ANN)[0].passed == "answered"
    assert says(database, request, BOB, "yes") is Said.TAKEN
    assert requests.outcomes(database, [asker]) == {asker: Outcome("yes", "it glows", "bob")}


def test_who_disagree_leave_it_to_a_further_expert(database: Database) -> None:
    asker, request = post(database)
    assert [says(database, request, ANN, "yes"), says(database, request, BOB, "no")] == [Said.NOTED] * 2
    assert says(database, request, EVE, "no", "I felt it") is Said.TAKEN
    assert requests.outcomes(database, [asker]) == {asker: Outcome("no", "I felt it", "eve")}


def test_where_no_expert_is_left_an_administrator_decides(database: Database) -> None:
    asker, request = post(database, 3)
    says(database, request, ANN, "yes")
    says(database, request, BOB, "no")
    requests.claim(database, request, EVE, claim_s=60)
    assert requests.unknown(database, request, EVE)
    assert requests.outcomes(database, [asker]) == {}, "it waits for an administrator"
    assert says(database, request, ROOT, "perhaps") is Said.TAKEN
    assert requests.outcomes(database, [asker]) == {asker: Outcome("perhaps", "", "root")}


def test_where_nobody_is_left_nobody_knows(database: Database) -> None:
    asker, request = post(database)
    accounts.disable_user(database, "root")
    for user, answer in ((ANN, "yes"), (BOB, "no"), (EVE, "maybe")):
        assert says(database, request, user, answer) is Said.NOTED
    assert requests.outcomes(database, [asker]) == {asker: Outcome(None)}
    assert requests.num_waiting(database) == 0


def test_what_nobody_waits_for_any_more_goes(database: Database) -> None:
    asker, request = post(database)
    requests.claim(database, request, ANN, claim_s=60)
    assert requests.expire(database, asker)
    assert requests.answer(database, request, ANN, "yes", "", "k") is Said.NOTED
    assert requests.num_waiting(database) == 0, "no second expert is asked for nobody"


def test_hours_by_weekday_and_time_zone() -> None:
    hours = HoursConfig(open={"mon-fri": "09:00-12:00 13:00-17:30", "sat": "22:00-24:00"}, time_zone="Asia/Tokyo")

    def there(day: int, hour: int, minute: int = 0) -> bool:
        return hours.are((MONDAY + datetime.timedelta(days=day, hours=hour - 9, minutes=minute)).timestamp())

    assert [there(0, 9), there(0, 8, 59), there(0, 12), there(4, 17, 29), there(4, 17, 30)] == [
        *(True, False, False),
        *(True, False),
    ]
    assert there(5, 23, 59) and not there(6, 0) and not there(6, 10)
    berlin = HoursConfig(open={"sun": "2:00-4:00"}, time_zone="Europe/Berlin")  # in March it goes from 2 to 3 o'clock
    assert berlin.are(datetime.datetime(2026, 3, 29, 1, 30, tzinfo=datetime.UTC).timestamp())
    assert not berlin.are(datetime.datetime(2026, 3, 29, 2, 30, tzinfo=datetime.UTC).timestamp())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"open": {"monday": "09:00-17:00"}}, "expected one of mon, tue"),
        ({"open": {"fri-mon": "09:00-17:00"}}, "expected one of mon, tue"),
        ({"open": {"mon": "17:00-09:00"}}, "two times"),
        ({"open": {"mon": "9 to 5"}}, "09:00-12:00"),
        ({"open": {"mon": ""}}, "expected days and times"),
        ({"open": {"mon": "09:00-17:00"}, "time_zone": "Berlin"}, "Europe/Berlin"),
    ],
)
def test_hours_that_cannot_be_read(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HoursConfig.model_validate(given)


def closed_now() -> HoursConfig:
    """Hours of a day that is neither today nor tomorrow."""
    day = time.gmtime(time.time() + 3 * 86400).tm_wday
    return HoursConfig(open={("mon", "tue", "wed", "thu", "fri", "sat", "sun")[day]: "00:00-24:00"})


class Model:
    async def advise(self, request: AdviceRequest) -> Advice:
        return Advice("no", expert="model", price=request.price)


def ask(advisor: DeskAdvisor) -> Advice:
    return asyncio.run(asyncio.wait_for(advisor.advise(AdviceRequest("s/0", item(), "", 0.3)), 100))


def test_out_of_hours_the_fallback_is_asked_or_nobody(database: Database) -> None:
    assert ask(DeskAdvisor(database, "run", hours=closed_now(), fallback=Model())).expert == "model"
    told = ask(DeskAdvisor(database, "run", hours=closed_now()))
    assert told.status is AdviceStatus.REFUSED and "at this time" in told.explanation
    assert requests.num_waiting(database) == 0
    asker, _ = post(database, 1)
    with pytest.raises(NobodyAsked):
        post(database, session="t", closed=True)
    assert post(database, closed=True)[0] == asker, "what was asked in time is waited for, after a restart too"


def test_where_nobody_knows_the_fallback_is_asked(database: Database) -> None:
    async def run() -> Advice:
        asking = asyncio.create_task(
            DeskAdvisor(database, "run", fallback=Model()).advise(AdviceRequest("s/0", item(), "", 0.3))
        )
        while not asking.done():
            for user in (ANN, BOB, EVE):
                for waiting in requests.queue(database, user):
                    requests.claim(database, waiting.id, user, claim_s=60)
                    requests.unknown(database, waiting.id, user)
            await asyncio.sleep(0.02)
        return await asking

    assert asyncio.run(asyncio.wait_for(run(), 100)).expert == "model"


@pytest.mark.slow
def test_the_desk_shows_who_must_agree(tmp_path: Path) -> None:
    with running(an_app(tmp_path, open_desk(tmp_path), Counted(asks_once), wait_s=0, agree=2)) as server:
        ann, bob, root = (server.person(name) for name in ("ann", "bob", "root"))
        body = {"model": "agile/p1", "messages": [{"role": "user", "content": "is it warm ?"}]}
        asked = ann.client.post("/v1/chat/completions", json=body, headers=server.key()).json()["agile"]["answer_id"]
        (request,) = until(lambda: ann.waiting() or None)
        ann.send(f"/desk/requests/{request}/claim")
        said = ann.send(f"/desk/requests/{request}/answer", answer="yes <b>", key="k").headers["location"]
        assert said.endswith("said=noted") and "must say the same" in ann.client.get(said).text
        assert "you answered; another expert is asked too" in ann.client.get("/desk/queue").text
        assert ann.waiting() == []
        shown = bob.client.get("/desk/queue").text
        assert "1 so far; 2 experts must say the same" in shown and "yes &lt;b&gt;" not in shown, "each for themselves"
        assert "yes &lt;b&gt;" in root.client.get("/desk/queue").text, "who decides sees what was said"
        bob.answers("YES <b>")
        answer = f"{server.url}/v1/answers/{asked}"
        headers = {**server.key("root")}
        assert until(lambda: ann.client.get(answer, headers=headers).json()["answer"]) == "YES <b>"
