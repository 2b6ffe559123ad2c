"""A mailbox to search: generated mails about appointments, questions with one answer, and a clumsy searcher.

Every mail tells of one appointment: its sender and topic belong together in no other mail, and it mentions another
person. A search for one word of a question finds several mails or none; one for sender and topic finds the right one,
first of all but now and then.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agile.tools.mailbox import Mail, Mailbox

PEOPLE = ("alice", "bruno", "carol", "david", "emma", "frank", "grace", "henry")
TOPICS = ("audit", "budget", "contract", "garden", "hiring", "launch", "moving", "travel")
EVENTS = ("call", "meeting", "review")
MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august")
QUESTIONS = ("when is the {topic} {event} with {person} ?", "{person} wants a {topic} {event} , but when ?")
BODY = "in {month} , {other} comes too"
NUM_MAILS = 40
SEARCH, READ = "search", "read"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": does,
            "parameters": {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument]},
        },
    }
    for name, does, argument, kind in (
        (SEARCH, "Lists mails that hold all these words.", "query", "string"),
        (READ, "Shows the mail of this number.", "id", "integer"),
    )
]
ARGUMENTS = {SEARCH: "query", READ: "id"}
NONE, BAD_CALL = "no mail", "no such call"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a mailbox.

    Attributes:
        keywords: Sender and topic: the two words that find the mail.
        mail: The id of the mail that answers it.
    """

    text: str
    answer: str
    keywords: tuple[str, str]
    mail: int


def write_mails(rng: random.Random, num: int = NUM_MAILS) -> list[Mail]:
    """Mails of different senders and topics, numbered from 1."""
    pairs = rng.sample([(person, topic) for person in PEOPLE for topic in TOPICS], num)
    mails = []
    for id, (person, topic) in enumerate(pairs, 1):
        other = rng.choice([p for p in PEOPLE if p != person])
        mails.append(
            Mail(id, person, f"{topic} {rng.choice(EVENTS)}", BODY.format(month=rng.choice(MONTHS), other=other))
        )
    return mails


def ask(mails: Sequence[Mail], rng: random.Random) -> Question:
    """A question that exactly one of the mails answers."""
    mail = rng.choice(mails)
    topic, event = mail.subject.split()
    text = rng.choice(QUESTIONS).format(topic=topic, event=event, person=mail.sender)
    return Question(text, mail.body.split()[1], (mail.sender, topic), mail.id)


def respond(mailbox: Mailbox, name: str, arguments: Any) -> str:
    """What a tool answers to a call, whatever was called.

    Args:
        arguments: As parsed from JSON.
    """
    try:
        value = str(arguments[ARGUMENTS[name]])
        if name == SEARCH:
            return " | ".join(mail.head for mail in mailbox.search(value)) or NONE
        mail = mailbox.read(int(value))
    except (ValueError, KeyError, TypeError):  # no such tool, no such argument, no number
        return BAD_CALL
    return NONE if mail is None else f"{mail.head} {mail.body}"


def tool_call(name: str, value: str) -> dict[str, Any]:
    """A turn of the assistant's that calls a tool."""
    function = {"name": name, "arguments": {ARGUMENTS[name]: value}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def clumsy(mailbox: Mailbox, question: Question, rng: random.Random, *, max_calls: int) -> list[dict[str, Any]]:
    """The conversation of a weak searcher.

    It searches for one or two of sender, topic and event, whichever they are, searches again though it has hits, reads
    any of them, and goes on though it has an answer.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    hits: list[str] = []
    said = rng.choice(MONTHS)

    for _ in range(max_calls):
        if hits and rng.random() < 0.5:
            name, value = READ, rng.choice(hits)
        else:
            words = [word for word in question.text.split() if word in (*PEOPLE, *TOPICS, *EVENTS)]
            name, value = SEARCH, " ".join(rng.sample(words, rng.choice((1, 2))))
        shown = respond(mailbox, name, {ARGUMENTS[name]: value})
        messages += [tool_call(name, value), {"role": "tool", "content": shown}]
        if name == SEARCH:
            hits = [word for word in shown.split() if word.isdigit()]
        else:
            said = next(word for word in shown.split() if word in MONTHS)
            if rng.random() < 0.5:
                break
    return [*messages, {"role": "assistant", "content": said}]
