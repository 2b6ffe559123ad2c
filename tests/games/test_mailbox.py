import random
from typing import Any

import pytest

from agile.tasks.games import mailbox as game
from agile.tools.mailbox import Mailbox

WORLDS = [(mails, game.ask(mails, rng)) for rng in map(random.Random, range(100)) for mails in [game.write_mails(rng)]]


def test_every_question_is_answered_by_one_mail_alone() -> None:
    for mails, question in WORLDS:
        right = [m for m in mails if (m.sender, m.subject.split()[0]) == question.keywords]
        assert [m.id for m in right] == [question.mail]
        assert [word for word in right[0].body.split() if word in game.MONTHS] == [question.answer]
        assert set(question.keywords) <= set(question.text.split())
        assert question.answer not in question.text


def test_the_keywords_find_the_mail_and_fewer_others_than_one_of_them() -> None:
    first = {1: 0, 2: 0}
    for mails, question in WORLDS:
        mailbox = Mailbox(mails, max_hits=len(mails))
        both = [m.id for m in mailbox.search(" ".join(question.keywords))]
        one = [m.id for m in mailbox.search(question.keywords[0])]
        assert question.mail in both and set(both) <= set(one)
        first[2] += both[0] == question.mail
        first[1] += one[0] == question.mail
    assert first[2] >= 90 > 50 > first[1]


def test_questions_and_answers_vary() -> None:
    assert {q.answer for _, q in WORLDS} == set(game.MONTHS)
    assert len({tuple(mails) for mails, _ in WORLDS}) == len(WORLDS)
    assert len({q.text for _, q in WORLDS}) > 80


def test_tools_answer_whatever_is_called() -> None:
    mails, question = WORLDS[0]
    mailbox, (mail,) = Mailbox(mails), [m for m in mails if m.id == question.mail]
    assert mail.head in game.respond(mailbox, "search", {"query": f" {' '.join(question.keywords)} "})
    for id in (mail.id, str(mail.id), f" {mail.id} "):
        assert game.respond(mailbox, "read", {"id": id}) == f"{mail.head} {mail.body}"
    assert game.respond(mailbox, "read", {"id": 99}) == game.NONE
    assert game.respond(mailbox, "search", {"query": "nobody"}) == game.NONE


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("delete", {"id": 1}),
        ("read", '{"id": 1'),
        ("read", 7),
        ("read", [7]),
        ("read", None),
        ("read", {"query": "alice"}),
        ("read", {"id": "alice"}),
        ("read", {"id": None}),
        ("search", {"id": 1}),
        ("search", {}),
    ],
)
def test_bad_calls_are_told_so(name: str, arguments: Any) -> None:
    assert game.respond(Mailbox(WORLDS[0][0]), name, arguments) == game.BAD_CALL


def test_a_clumsy_searcher_is_seldom_right_and_searches_often() -> None:
    rng, right, searches = random.Random(0), 0, 0
    for mails, question in WORLDS:
        messages = game.clumsy(Mailbox(mails), question, rng, max_calls=8)
        calls = [m["tool_calls"][0]["function"] for m in messages if m.get("tool_calls")]
        shown = [m["content"] for m in messages if m["role"] == "tool"]
        assert len(calls) <= 8 and len(messages) == 2 + 2 * len(calls)
        for function, text in zip(calls, shown, strict=True):
            assert game.respond(Mailbox(mails), function["name"], function["arguments"]) == text != game.BAD_CALL
        right += messages[-1]["content"] == question.answer
        searches += sum(function["name"] == "search" for function in calls)
    assert right < 50
    assert searches > 200
