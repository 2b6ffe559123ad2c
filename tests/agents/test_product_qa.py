"""The product QA agent: what it shows, what it remembers, and what its teacher does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from agile.agents.product_qa import NO_KNOWLEDGE, SPEC, ProductQAAgent, ProductQATeacher, gold, random_memory
from agile.executor import Limits
from agile.memory.encoders import HashingEncoder
from agile.memory.store import SqliteMemory
from agile.tasks.productqa import ProductQA
from agile.tokens import ActionCodec, build_tokenizer
from agile.types import (
    Action,
    Advice,
    AdviceStatus,
    Fn,
    Item,
    MemoryItem,
    MemoryKind,
    Retrieved,
    Session,
    SessionStatus,
)
from tests.worlds import ListMemory, item, make_executor, play, write_shop

LESSON = ProductQAAgent.lesson


def history(question: str, answer: str, product: str = "p1", group: str = "shop") -> MemoryItem:
    return LESSON(replace(item(question), product=product, group=group), "", answer, "", "initial")[0]


def knowledge(text: str, group: str = "shop") -> MemoryItem:
    return MemoryItem(MemoryKind.KNOWLEDGE, text, text, group=group)


MEMORY = [
    history("is it washable ?", "yes", product="p2"),
    history("is it washable ?", "no", product="p3"),
    history("is it heavy ?", "no"),
    history("what is it ?", "pan"),
    history("is it washable ?", "maybe", group="other"),
    knowledge("red is washable"),
    knowledge("blue is not"),
    knowledge("is it washable ? red", group="other"),
]


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def test_golden_prompt() -> None:
    """Metadata without the unknown, entries with similarities to 0.05 and marks, and the count of similar ones."""
    agent = ProductQAAgent(product_k=1, group_k=2, knowledge_k=1)
    question = item(columns=("price", "color"), metadata={"title": "Red Pan", "color": "red", "size": None})
    entries, recalled = agent.recall(question, ListMemory(MEMORY))
    assert (
        agent.question(question, 0.57, 0.3) + recalled
        == """\
round 5
table shop columns: price , color
title: Red Pan
color: red
question: is it washable ?
history 0.60 same is it heavy ? -> no
history 1.00 other is it washable ? -> yes
history 1.00 other is it washable ? -> no
knowledge 0.60 red is washable
similar 4
"""
    )
    assert [e.item.id for e in entries] == [3, 1, 2, 6]


@pytest.mark.parametrize(
    ("agent", "shown"),
    [
        (ProductQAAgent(product_k=0, knowledge_k=0), []),
        (ProductQAAgent(product_k=2, knowledge_k=0), [3, 4]),
        (ProductQAAgent(product_k=9, group_k=9, knowledge_k=9), [3, 4, 1, 2, 6, 7]),
        (ProductQAAgent(product_k=1, group_k=3, knowledge_k=0), [3, 1, 2, 4]),
        (ProductQAAgent(product_k=0, group_k=1, knowledge_k=2), [1, 6, 7]),
    ],
)
def test_shows_at_most_k_of_each_and_nothing_twice(agent: ProductQAAgent, shown: list[int]) -> None:
    entries, _ = agent.recall(item(), ListMemory(MEMORY))
    assert [e.item.id for e in entries] == shown


def test_this_product_is_marked() -> None:
    agent = ProductQAAgent(product_k=0, group_k=4, knowledge_k=0)
    _, text = agent.recall(item(), ListMemory(MEMORY))
    assert [line.split()[2] for line in text.splitlines()[:-1]] == ["other", "other", "same", "same"]


@pytest.mark.parametrize(("similarity", "shown"), [(1.0, "1.00"), (0.974, "0.95"), (0.976, "1.00"), (-0.01, "0.00")])
def test_similarities_are_shown_to_the_nearest_twentieth(similarity: float, shown: str) -> None:
    class Fixed(ListMemory):
        def retrieve(self, *args: object) -> list[Retrieved]:
            return [Retrieved(e, similarity) for e in self.items]

    _, text = ProductQAAgent(knowledge_k=0).recall(item(), Fixed([history("a", "b")]))
    assert text.startswith(f"history {shown} same")


@pytest.mark.parametrize(
    ("advice", "text"),
    [
        (Advice("yes", "steel is washable"), "expert: steel is washable\nanswer: yes\n"),
        (Advice("yes"), "expert: yes\nanswer: yes\n"),
        (Advice("", "the budget is spent", status=AdviceStatus.REFUSED), "no advice ( refused )\n"),
    ],
)
def test_advice_is_shown(advice: Advice, text: str) -> None:
    assert ProductQAAgent().advice(advice) == text


def test_only_advice_is_remembered() -> None:
    agent, silent = ProductQAAgent(), Advice("", status=AdviceStatus.TIMEOUT)
    assert agent.remember(item(), "s/0", None, "steel is washable") == []
    assert agent.remember(item(), "s/0", silent, "steel is washable") == []
    for reflection in ("", NO_KNOWLEDGE):
        (entry,) = agent.remember(item(), "s/0", Advice("yes"), reflection)
        assert (entry.kind, entry.key, entry.answer, entry.product) == ("history", "is it washable ?", "yes", "p1")


# --------------------------------------------------------------------------------------------------------------------
# The teacher, on a shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> ProductQA:
    return write_shop(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def items(shop: ProductQA) -> list[Item]:
    return [question for stream in shop.streams("train") for question in stream.items]


@pytest.fixture(scope="module")
def kinds(items: Sequence[Item]) -> dict[str, Item]:
    found = {question.kind: question for question in items}
    assert {*found} == {"search", "metadata", "history", "knowledge", "skewed"}
    return found


@pytest.fixture(scope="module")
def codec(items: Sequence[Item]) -> ActionCodec:
    return ActionCodec(build_tokenizer("word", ProductQAAgent().corpus(items), SPEC), SPEC)


def teach(
    shop: ProductQA, codec: ActionCodec, question: Item, known: Sequence[MemoryItem] = (), judge_yes: float = 0.0
) -> Session:
    agent = ProductQAAgent(show_schema=False)
    memory = SqliteMemory(HashingEncoder())
    memory.write(known)
    policy = ProductQATeacher(codec, agent, judge_yes).policy(question, memory, 0.3, np.random.default_rng(0))
    executor = make_executor(
        agent, codec=codec, tools={"SearchProduct": shop.search}, score=shop.score, limits=Limits()
    )
    return play(executor, policy, question, memory)


def test_the_judge_goes_by_the_price_where_the_agent_sees_it(codec: ActionCodec, items: Sequence[Item]) -> None:
    question = next(item for item in items if item.kind == "skewed")
    assert question.context["prior"] == 0.95

    def asks(price: float, judge_yes: float) -> bool:
        teacher = ProductQATeacher(codec, ProductQAAgent(show_price=True), judge_yes)
        policy = teacher.policy(question, SqliteMemory(HashingEncoder()), price, np.random.default_rng(0))
        decision = asyncio.run(policy.complete(codec.encode("question"), max_tokens=9, stop=(), seed=0))
        return codec.decode(decision.token_ids).startswith(f"[{Fn.SEEK_ADVICE}]")

    assert not asks(0.3, judge_yes=1.0) and asks(0.04, judge_yes=1.0)
    assert asks(0.3, judge_yes=0.0) and not asks(0.04, judge_yes=0.0)


def actions(session: Session) -> list[str]:
    assert session.status == SessionStatus.COMPLETED, session.error
    opening, *between, submit = [step.action.name for step in session.steps if step.action.name != Fn.GET_QUESTION]
    assert (opening, submit) == (Fn.RETRIEVE_MEMORY, Fn.SUBMIT_ANSWER)
    return between


ASKING = [Fn.SEEK_ADVICE, Fn.REFLECTION, Fn.UPDATE_MEMORY, Fn.PREDICT_ANSWER]


def test_the_teacher_searches_by_the_gold_sql(shop: ProductQA, codec: ActionCodec, items: Sequence[Item]) -> None:
    for question in items:
        if question.kind == "search":
            session = teach(shop, codec, question)
            assert actions(session) == ["SearchProduct", Fn.PREDICT_ANSWER]
            assert session.steps[2].action.argument == question.context["sql"]
            assert session.reward is not None and session.reward.total == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("metadata", [Fn.PREDICT_ANSWER]), ("history", ASKING), ("knowledge", ASKING), ("skewed", ASKING)],
)
def test_the_teacher_asks_about_what_nothing_in_sight_settles(
    shop: ProductQA, codec: ActionCodec, kinds: Mapping[str, Item], kind: str, expected: list[str]
) -> None:
    question = kinds[kind]
    unrelated = [
        history("is it green ?", "yes", question.product, question.group),
        knowledge("wool is warm", question.group),
    ]
    session = teach(shop, codec, question, unrelated)
    assert actions(session) == expected
    assert session.answer == question.answer
    if expected == ASKING:
        assert session.steps[3].action == Action(Fn.REFLECTION, question.context["knowledge"] or NO_KNOWLEDGE)
        assert len(session.written) == (2 if kind == "knowledge" else 1)
    # A judge who calls everything answerable does not call a toss-up so.
    sure = [Fn.PREDICT_ANSWER] if kind in ("metadata", "skewed") else ASKING
    assert actions(teach(shop, codec, question, unrelated, judge_yes=1.0)) == sure
    no_prior = replace(question, context={k: v for k, v in question.context.items() if k != "prior"})
    assert actions(teach(shop, codec, no_prior, unrelated, judge_yes=1.0)) == [Fn.PREDICT_ANSWER]


def other_product(question: Item) -> Item:
    return replace(question, product="p999")


@pytest.mark.parametrize(
    ("kind", "known", "settled"),
    [
        ("history", lambda q: LESSON(q, "", q.answer, "", "initial"), True),
        ("history", lambda q: LESSON(other_product(q), "", q.answer, "", "initial"), False),
        ("knowledge", lambda q: LESSON(other_product(q), "", q.answer, q.context["knowledge"], "initial"), True),
        ("knowledge", lambda q: LESSON(other_product(q), "", q.answer, "", "initial"), False),
        ("knowledge", lambda q: LESSON(q, "", q.answer, "", "initial"), True),
        ("skewed", lambda q: LESSON(q, "", q.answer, "", "initial"), True),
    ],
)
def test_the_teacher_answers_what_memory_settles(
    shop: ProductQA, codec: ActionCodec, kinds: Mapping[str, Item], kind: str, known: type, settled: bool
) -> None:
    session = teach(shop, codec, kinds[kind], known(kinds[kind]))
    assert actions(session) == ([Fn.PREDICT_ANSWER] if settled else ASKING)
    assert session.answer == kinds[kind].answer


def test_the_corpus_holds_every_word_that_is_shown_or_said(
    shop: ProductQA, codec: ActionCodec, items: Sequence[Item]
) -> None:
    """In sessions with errors, with advice and without."""
    unknown = codec.tokenizer.unk_token_id
    rng = np.random.default_rng(1)
    for stream in shop.streams("train"):
        for question in stream.items:
            session = teach(shop, codec, question, random_memory(question, stream.items, rng), judge_yes=0.5)
            words = [codec.decode(span.token_ids) for g in session.segments for span in g.spans]
            assert unknown not in [i for g in session.segments for i in g.token_ids], words
    for reason in ("did not end", "takes no argument", "holds another action"):
        assert unknown not in codec.encode(f"error : SearchProduct {reason}")
    assert unknown not in codec.encode("error : expected one of " + " ".join(codec.action_ids))
    for status in AdviceStatus:
        assert unknown not in codec.encode(ProductQAAgent().advice(Advice("yes", status=status)))


# --------------------------------------------------------------------------------------------------------------------
# Randomised initial memory


def test_random_memory_is_a_function_of_its_generator(items: Sequence[Item], kinds: Mapping[str, Item]) -> None:
    def draw(seed: int) -> list[MemoryItem]:
        return random_memory(kinds["history"], items, np.random.default_rng(seed))

    assert draw(3) == draw(3)
    assert len({len(draw(seed)) for seed in range(20)}) > 5


def test_random_memory_holds_what_asking_would_have_taught(items: Sequence[Item], kinds: Mapping[str, Item]) -> None:
    asked = {q.question for q in items if q.kind in ("history", "knowledge", "skewed")}
    corrected = {q.question for q in items} - asked
    for seed in range(20):
        entries = random_memory(kinds["skewed"], items, np.random.default_rng(seed))
        lessons = [e.text for e in entries if e.kind is MemoryKind.KNOWLEDGE]
        assert len({*lessons}) == len(lessons), "nobody reflects on the same twice"
        for entry in entries:
            assert entry.origin == "initial" and entry.session_id == ""
            assert entry.kind is MemoryKind.KNOWLEDGE or entry.key in asked or entry.key in corrected


def test_random_memory_holds_a_few_corrections_of_what_nobody_asks(
    items: Sequence[Item], kinds: Mapping[str, Item]
) -> None:
    settled = [q for q in items if q.kind in ("search", "metadata")]
    texts = {f"{q.question} -> {gold(q)}" for q in settled}
    shares = []
    for seed in range(100):
        entries = random_memory(kinds["skewed"], items, np.random.default_rng(seed))
        shares.append(sum(e.text in texts for e in entries) / len(settled))
    assert min(shares) == 0 < max(shares) and 0.1 < sum(shares) / len(shares) < 0.2


def test_random_memory_keeps_or_omits_together_what_settles_the_question() -> None:
    question = item(knowledge="steel is washable")
    same = replace(question, id="again")
    taught = replace(item("can I wash it ?", knowledge="steel is washable"), id="taught", product="p2")
    other = replace(item("is it heavy ?", "no"), id="other")
    counts: dict[tuple[bool, bool], int] = {}
    for seed in range(200):
        found = random_memory(question, [question, same, taught, other], np.random.default_rng(seed))
        keys = {e.key for e in found}
        settling = {"is it washable ?", "can I wash it ?", "steel is washable"}
        assert keys & settling in (set(), settling)
        case = bool(keys & settling), "is it heavy ?" in keys
        counts[case] = counts.get(case, 0) + 1
    assert len(counts) == 4 and min(counts.values()) > 20
