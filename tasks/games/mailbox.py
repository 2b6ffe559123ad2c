"""A mailbox to search: generated mails about appointments, questions with one answer, and a clumsy searcher.

Every mail tells of one appointment, with a sender and a subject that no other mail has together, and mentions another
person and another topic: a search for one word finds several mails, one for the sender and the topic the right one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agile.tools.mailbox import Mail, Mailbox

PEOPLE = ("alice", "bruno", "carol", "david", "emma", "frank", "grace", "henry")
TOPICS = ("audit", "budget", "contract", "garden", "hiring", "launch", "moving", "travel")
EVENTS = ("call", "meeting", "review")
ANSWERS = {
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday"),
    "city": ("athens", "berlin", "london", "madrid", "oslo", "paris"),
}
QUESTIONS = ("which {kind} is the {topic} {event} with {person} ?", "{person} wants a {topic} {event} , which {kind} ?")
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
    kind: str
    answer: str
    keywords: tuple[str, str]
    mail: int


def write_mails(rng: random.Random, num: int = NUM_MAILS) -> list[Mail]:
    """Mails of different senders and topics, numbered from 1."""
    pairs = rng.sample([(person, topic) for person in PEOPLE for topic in TOPICS], num)
    mails = []
    for id, (person, topic) in enumerate(pairs, 1):
        event, (day, city) = rng.choice(EVENTS), (rng.choice(values) for values in ANSWERS.values())
        other = rng.choice([p for p in PEOPLE if p != person])
        papers = rng.choice([t for t in TOPICS if t != topic])
        body = f"we meet on {day} in {city} , {other} brings the {papers} papers"
        mails.append(Mail(id, person, f"{topic} {event}", body))
    return mails


def ask(mails: Sequence[Mail], rng: random.Random) -> Question:
    """A question that exactly one of the mails answers."""
    mail, kind = rng.choice(mails), rng.choice(list(ANSWERS))
    topic, event = mail.subject.split()
    text = rng.choice(QUESTIONS).format(kind=kind, topic=topic, event=event, person=mail.sender)
    (answer,) = (word for word in mail.body.split() if word in ANSWERS[kind])
    return Question(text, kind, answer, (mail.sender, topic), mail.id)


def respond(mailbox: Mailbox, name: str, arguments: str) -> str:
    """What a tool answers to a call, whatever was called.

    Args:
        arguments: As JSON, as OpenAI's API has them.
    """
    try:
        value = str(json.loads(arguments)[ARGUMENTS[name]])
        if name == SEARCH:
            return " | ".join(mail.head for mail in mailbox.search(value)) or NONE
        mail = mailbox.read(int(value))
    except (ValueError, KeyError, TypeError):  # no JSON, no such tool or argument, no number
        return BAD_CALL
    return NONE if mail is None else f"{mail.head} : {mail.body}"


def tool_call(name: str, value: str) -> dict[str, Any]:
    """A turn of the assistant's that calls a tool, as OpenAI's API has it."""
    function = {"name": name, "arguments": json.dumps({ARGUMENTS[name]: value})}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": name, "type": "function", "function": function}]}


def clumsy(mailbox: Mailbox, question: Question, rng: random.Random, *, max_calls: int) -> list[dict[str, Any]]:
    """The conversation of a weak searcher.

    It searches for one or two words of the question, whichever they are, searches again though it has hits, reads any
    hit, and reads on or searches on though it has the answer.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    hits: list[str] = []
    known: list[str] = []

    def call(name: str, value: str) -> str:
        messages.append(tool_call(name, value))
        function = messages[-1]["tool_calls"][0]["function"]
        messages.append({"role": "tool", "content": respond(mailbox, name, function["arguments"])})
        return str(messages[-1]["content"])

    for _ in range(max_calls):
        if known and rng.random() < 0.5:
            break
        if hits and rng.random() < 0.5:
            known = [word for word in call(READ, rng.choice(hits)).split() if word in ANSWERS[question.kind]]
        else:
            words = [word for word in question.text.split() if word.isalpha()]
            shown = call(SEARCH, " ".join(rng.sample(words, rng.choice((1, 1, 2)))))
            hits = [word for word in shown.split() if word.isdigit()] or hits
    messages.append({"role": "assistant", "content": known[-1] if known else rng.choice(ANSWERS[question.kind])})
    return messages
