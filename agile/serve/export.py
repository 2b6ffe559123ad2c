"""From the desk to training: served sessions, and what people said of them, as the files of `agile.tasks.desk`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from agile.config import RunConfig, load_config
from agile.config.task import DeskConfig
from agile.errors import AgileError
from agile.protocols import Task
from agile.run_folder import write_atomically, writing
from agile.serve import deployments, terms
from agile.serve.agreement import normalised
from agile.serve.database import Database, database_url
from agile.serve.models import Asker, Question, Request, Review, User
from agile.serve.reviews import CORRECTED, RIGHT
from agile.subjects import meaning, question_about, subjects
from agile.types import Item

# of a served run's config, what a run from the desk takes over; what it does itself it says itself
TAKEN_OVER = ("seed", "threads", "task", "agent", "memory", "model", "lora", "prompt", "rollout", "vllm", "engine")
TRAINING = ("sft", "ppo")
About = tuple[str, str]  # product, and the words of a question


@dataclass(frozen=True, slots=True)
class Word:
    """What a person said of a question: an answer, or of an answer that it is wrong."""

    at: float
    answer: str
    right: bool
    how: str
    who: str
    explanation: str = ""


def from_desk_config(given: RunConfig) -> RunConfig:
    """The config of a run from the desk: that of the run that is served, with what is given in its place.

    It starts from the checkpoint that is served now.

    Raises:
        AgileError: There is no server's folder.
    """
    desk = given.task.desk
    assert desk is not None
    if not (desk.served / "config.yaml").exists():
        raise AgileError(
            f"{desk.served} is no folder of agile serve. Start agile serve once, or name its folder: "
            "task.desk.served=DIR."
        )
    served = load_config(desk.served / "config.yaml")
    run = served.serve.run
    assert run is not None, "a server notes what it serves"
    values = served.model_dump(mode="json", include={*TAKEN_OVER, *TRAINING})
    values["sft"] |= {"data": None, "teacher": None, "stronger_model": None}
    if served.task.name == "minishop" and served.task.data is None:
        values["task"]["data"] = str(run / "minishop")
    with closing(Database(database_url(served.serve.database, desk.served))) as database:
        deployed, held = deployments.newest(database), terms.current(database)
    if deployed is not None:
        values["model"]["path"] = str(Path(deployed.run) / deployed.agent)
    if held is not None:
        values["task"]["advice_price"] = held.advice_price
    for key, value in given.model_dump(mode="json", exclude_unset=True).items():
        values[key] = values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    return RunConfig.model_validate(values)


def export_desk(desk: DeskConfig, shop: Task, questions: Path, sessions: Path) -> dict[str, int]:
    """Write what was asked and what people say of it to two files; returns counts, by how people said it.

    Args:
        shop: The task that is served: it tells what is known of each product.

    Raises:
        AgileError: There is no server's folder, or nobody said anything of a question in that time.
    """
    if not (desk.served / "config.yaml").exists():
        raise AgileError(f"{desk.served} is no folder of agile serve; name it: task.desk.served=DIR.")
    url = database_url(load_config(desk.served / "config.yaml").serve.database, desk.served)
    products = subjects(shop, desk.served.name)
    with closing(Database(url)) as database:
        rows = _rows(database, desk, products)
    if not rows:
        raise AgileError(
            f"In {desk.served} nobody answered or reviewed a question "
            f"{'in that time' if desk.since or desk.until else 'yet'}: there is nothing to learn from. Review answers "
            "at /desk/review, or choose another time, task.desk.since and task.desk.until."
        )
    with writing(questions.parent):
        questions.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(sessions, _lines({"answer": row["answer"], "session": s} for row, s in rows if s is not None))
        write_atomically(questions, _lines(row for row, _ in rows))
    return dict(Counter(row["how"] for row, _ in rows))


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _rows(
    database: Database, desk: DeskConfig, products: Mapping[str, Item]
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Questions with answers that people gave or confirmed, in the order in which they were asked, and sessions."""
    asked = select(Question).where(Question.product.in_(list(products))).order_by(Question.number)
    if desk.since is not None:
        asked = asked.where(Question.created_at >= desk.since.timestamp())
    if desk.until is not None:
        asked = asked.where(Question.created_at < desk.until.timestamp())
    known = truth(words(database))
    found = []
    with database.reading() as session:
        for question in session.scalars(asked):
            word = known.get(about(question.product, meaning(question.text, json.loads(question.context))))
            if word is None:
                continue
            try:
                item = question_about(products[question.product], "", question.text, "", json.loads(question.context))
            except AgileError:  # asked when another kind of agent was served
                continue
            played = None if question.session is None else json.loads(question.session)
            row = {
                "id": f"served/{question.number}",
                "question": question.text,
                "answer": word.answer,
                "group": item.group,
                "product": question.product,
                "context": {**item.context, "long_answer": word.explanation},
                "how": word.how,
                "who": word.who,
            }
            found.append((row, played))
    return found


def about(product: str, question: str) -> About:
    return product, normalised(question)


def words(database: Database) -> dict[About, list[Word]]:
    """All that people said of the agent's own answers, and all that experts answered it, by what it is about."""
    found: dict[About, list[Word]] = {}
    with database.reading() as session:
        reviews = session.execute(
            select(Review, Question, User.name)
            .join(Question, Question.number == Review.question)
            .join(User, User.id == Review.user_id)
        )
        for review, question, name in reviews:
            answer = review.answer if review.verdict == CORRECTED else question.answer
            word = Word(
                review.at, answer or "", review.verdict in (RIGHT, CORRECTED), "review", name, review.explanation
            )
            text = meaning(question.text, json.loads(question.context))
            found.setdefault(about(question.product, text), []).append(word)
        answers = session.execute(
            select(Request, Asker.question, User.name)
            .join(Asker, Asker.request_id == Request.id)
            .join(User, User.id == Request.answered_by)
            .where(Request.scope == "served", Request.status == "answered")
        )
        for request, text, name in answers:
            word = Word(request.answered_at or 0.0, request.answer or "", True, "expert", name, request.explanation)
            text = meaning(text, json.loads(request.detail))
            found.setdefault(about(request.product, text), []).append(word)
    return found


def truth(said: Mapping[About, Sequence[Word]]) -> dict[About, Word]:
    """What is right, as far as people say: the newest answer that nobody called wrong afterwards."""
    known: dict[About, Word] = {}
    for key, of_key in said.items():
        for word in sorted(of_key, key=lambda w: w.at):
            if word.right:
                known[key] = word
            elif key in known and known[key].answer.casefold().split() == word.answer.casefold().split():
                del known[key]
    return known
