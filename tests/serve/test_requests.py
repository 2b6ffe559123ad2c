"""Questions to the experts: one claims, one answers, everybody who waits is told."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from agile.serve import accounts, questions, requests
from agile.serve.advisor import DeskAdvisor
from agile.serve.database import Database
from agile.serve.memory import DeskMemory
from agile.serve.requests import Outcome, Said
from agile.types import Advice, AdviceRequest, AdviceStatus, MemoryItem, MemoryKind
from tests.serve.desk import ENCODER, open_desk
from tests.worlds import item

CUST, ANN, BOB, ROOT = 1, 2, 3, 4


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_desk(tmp_path)


def post(database: Database, session: str, question: str = "is it warm ?", product: str = "p1", **more: object) -> int:
    key = f"served:{session}"
    given = {"scope": "served", "session_key": key, "group": "g", "detail": {}, "price": 0.3, "reuse": False}
    return requests.post(database, session_id=session, question=question, product=product, **{**given, **more})  # type: ignore[arg-type]


def only(database: Database) -> str:
    (waiting,) = requests.queue(database, ANN)
    return waiting.id


def test_of_many_who_claim_at_once_one_has_it(database: Database) -> None:
    post(database, "s/1")
    request, start, taken = only(database), threading.Barrier(8), []

    def claim(user: int) -> None:
        start.wait()
        if requests.claim(database, request, user, claim_s=60):
            taken.append(user)

    threads = [threading.Thread(target=claim, args=(1 + n % 4,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 1
    (seen,) = requests.queue(database, ANN)
    assert seen.mine is (taken[0] == ANN) and seen.claimed_by


def test_an_answer_counts_once_and_from_who_claimed(database: Database) -> None:
    asker = post(database, "s/1")
    request = only(database)
    assert requests.answer(database, request, ANN, "yes", "", "k") is Said.LOST
    requests.claim(database, request, ANN, claim_s=60)
    assert requests.answer(database, request, BOB, "no", "", "k") is Said.LOST
    assert requests.outcomes(database, [asker]) == {}
    assert requests.answer(database, request, ANN, "yes", "it is", "k") is Said.TAKEN
    assert requests.answer(database, request, ANN, "yes", "it is", "k") is Said.AGAIN
    assert requests.answer(database, request, ANN, "no", "", "other") is Said.LOST
    assert requests.outcomes(database, [asker]) == {asker: Outcome("yes", "it is", "ann")}
    assert requests.queue(database, BOB) == []


def test_the_same_session_is_the_same_asker_and_the_same_words_one_request(database: Database) -> None:
    first = post(database, "s/1", "Is it WARM?")
    assert post(database, "s/1", "Is it WARM?") == first
    second = post(database, "s/2", "is it  warm ?")
    elsewhere = post(database, "s/3", "is it warm ?", product="p2")
    by_likeness = post(database, "s/4", "is this warm ?", similar=lambda question, others: 0)
    (waiting, other) = requests.queue(database, ANN)
    assert waiting.asked == ("Is it WARM?", "is it  warm ?", "is this warm ?") and other.product == "p2"
    requests.claim(database, waiting.id, ANN, claim_s=60)
    requests.answer(database, waiting.id, ANN, "yes", "", "k")
    assert set(requests.outcomes(database, [first, second, elsewhere, by_likeness])) == {first, second, by_likeness}
    assert post(database, "s/5") != first and len(requests.queue(database, ANN)) == 2  # memory answers repeats


def test_who_could_not_have_read_an_answer_takes_it_and_who_could_asks_anew(database: Database) -> None:
    memory = DeskMemory(database, ENCODER)

    def asked() -> str:
        return f"served/{questions.ask(database, CUST, 'is it warm ?', 'p1').result().number}"

    def told(session: str) -> bool:
        asker = post(database, session)
        return asker in requests.outcomes(database, [asker])

    first, early, later = asked(), asked(), asked()
    assert not told(first)
    request = only(database)
    requests.claim(database, request, ANN, claim_s=60)
    requests.answer(database, request, ANN, "yes", "", "k")
    between = asked()
    assert told(early) and told(between), "the answer is not in memory yet"
    same = MemoryItem(MemoryKind.HISTORY, "is it warm ?", "is it warm ? -> yes", "yes", "g", "p1", first, "advice")
    (entry,) = memory.write([same])
    assert told(asked()), "its session has not ended: nobody knows whether this one has read it"
    questions.finish(database, requests.number_of(first), answer="yes", error="", played=None).result()
    assert told(later) and not told(asked()), "memory told the last one, and it asked all the same"
    requests.claim(database, only(database), ANN, claim_s=60)
    requests.answer(database, only(database), ANN, "yes", "", "k2")
    with database.reading() as session:
        assert not requests.is_mended(session, later)
    memory.retire(entry, BOB)
    with database.reading() as session:
        assert requests.is_mended(session, later), "what a person retired is not written again"


def test_an_answer_that_a_person_mended_is_not_taken(database: Database) -> None:
    memory = DeskMemory(database, ENCODER)
    numbers = [questions.ask(database, CUST, "is it warm ?", "p1").result().number for _ in range(2)]
    post(database, f"served/{numbers[0]}")
    request = only(database)
    requests.claim(database, request, ANN, claim_s=60)
    requests.answer(database, request, ANN, "yes", "", "k")
    same = MemoryItem(
        MemoryKind.HISTORY, "is it warm ?", "is it warm ? -> yes", "yes", "g", "p1", f"served/{numbers[0]}", "advice"
    )
    memory.retire(memory.write([same])[0], BOB)
    post(database, f"served/{numbers[1]}")
    assert only(database) != request


def test_who_does_not_know_leaves_it_to_the_next_and_the_last_to_nobody(database: Database) -> None:
    asker = post(database, "s/1")
    request = only(database)
    assert not requests.unknown(database, request, ANN)
    for expert in (ANN, BOB):
        assert requests.outcomes(database, [asker]) == {}
        assert requests.claim(database, request, expert, claim_s=60)
        assert requests.unknown(database, request, expert)
    assert requests.outcomes(database, [asker]) == {asker: Outcome(None)}
    assert requests.num_waiting(database) == 0


def test_skipped_and_forgotten_claims_go_to_others(database: Database) -> None:
    post(database, "s/1")
    request = only(database)
    requests.claim(database, request, ANN, claim_s=60)
    assert not requests.claim(database, request, BOB, claim_s=60)
    assert requests.skip(database, request, ANN) and not requests.skip(database, request, ANN)
    assert requests.queue(database, ANN)[0].passed == "skipped"
    requests.claim(database, request, BOB, claim_s=60)
    assert requests.claim(database, request, ANN, claim_s=-1)  # bob has gone home
    assert requests.answer(database, request, BOB, "yes", "", "k") is Said.LOST


def test_a_request_that_nobody_waits_for_goes_unless_an_expert_is_at_it(database: Database) -> None:
    asker, late = post(database, "s/1"), post(database, "s/2", "is it red ?")
    for waiting in requests.queue(database, ANN):
        if waiting.question == "is it red ?":
            requests.claim(database, waiting.id, ANN, claim_s=60)
    assert requests.expire(database, asker) and not requests.expire(database, asker)
    assert requests.expire(database, late)
    (left,) = requests.queue(database, ANN)
    assert requests.answer(database, left.id, ANN, "yes", "", "k") is Said.LATE


def request(session: str = "s/0") -> AdviceRequest:
    return AdviceRequest(session, item(), "", 0.3)


def advise(advisor: DeskAdvisor, database: Database, answer: str | None) -> Advice:
    """What the advisor says if ann answers as soon as she sees it."""

    async def run() -> Advice:
        asking = asyncio.create_task(advisor.advise(request()))
        while answer is not None and not asking.done():
            for waiting in requests.queue(database, ANN):
                requests.claim(database, waiting.id, ANN, claim_s=60)
                requests.answer(database, waiting.id, ANN, answer, "because", "k")
            await asyncio.sleep(0.02)
        return await asking

    return asyncio.run(asyncio.wait_for(run(), 100))


def test_a_run_asks_the_desk_once_for_the_same_question(database: Database) -> None:
    advisor = DeskAdvisor(database, "run")
    expected = Advice("yes", "because", "ann", 0.3)
    assert advise(advisor, database, "yes") == expected
    assert advise(advisor, database, None) == expected  # nobody is asked again, also in another event loop


def test_without_an_answer_in_time_the_fallback_is_asked_or_nobody(database: Database) -> None:
    class Fallback:
        async def advise(self, request: AdviceRequest) -> Advice:
            return Advice("no", expert="model", price=request.price)

    assert advise(DeskAdvisor(database, "run", timeout_s=0.05), database, None).status is AdviceStatus.TIMEOUT
    assert requests.num_waiting(database) == 0
    assert advise(DeskAdvisor(database, "run", timeout_s=0.05, fallback=Fallback()), database, None).answer == "no"


def test_accounts(database: Database) -> None:
    key = accounts.add_key(database, "cust")
    user = accounts.by_key(database, key)
    assert user is not None and user.name == "cust" and accounts.by_key(database, key + "x") is None
    assert accounts.by_password(database, "ann", "correct horse") is not None
    assert accounts.by_password(database, "ann", "wrong") is accounts.by_password(database, "nobody", "wrong") is None
    accounts.disable_user(database, "ann")
    assert accounts.by_password(database, "ann", "correct horse") is None
    assert accounts.revoke_keys(database, "cust") == 1 and accounts.by_key(database, key) is None


def test_who_waits_no_more_does_not_hold_up_the_others(database: Database) -> None:
    async def leave() -> None:
        asyncio.wrap_future(questions.ask(database, CUST, "is it red ?", "p1")).cancel()

    asyncio.run(leave())
    assert questions.ask(database, CUST, "is it warm ?", "p1").result(60).number == 2
