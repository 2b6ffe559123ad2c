import asyncio
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agile.agents.hotpot_qa import KNOWN, SEARCH, SPEC, UNKNOWN, HotPotQAAgent
from agile.errors import AgileError
from agile.executor import Executor, Limits
from agile.memory.encoders import make_encoder
from agile.tasks.hotpotqa import HotPotQA, exact_match, f1, normalise
from agile.tokens import ActionCodec, build_tokenizer
from agile.tools.passages import MAX_SEARCHES, PassageSearch, Rank, bm25, dense
from agile.types import Action, Advice, AdviceStatus, Fn, Item, Observation, Reward, Session, SessionStatus, Source
from tests.hotpot import row, write
from tests.worlds import ListMemory, make_executor, play, script

# gold, answer, EM, F1 by the official rules, worked out by hand
PAIRS = [
    ("Paris", "Paris", True, 1.0),
    ("Paris", "paris", True, 1.0),
    ("Paris", " PARIS \n", True, 1.0),
    ("Paris", "Paris.", True, 1.0),
    ("Paris", "the Paris", True, 1.0),
    ("The Beatles", "Beatles", True, 1.0),
    ("a spirit", "spirit", True, 1.0),
    ("a spirit", "an spirit", True, 1.0),
    ("a spirit", "spirits", False, 0.0),
    ("Chief of Protocol", "Chief  of\tProtocol", True, 1.0),
    ("Chief of Protocol", "chief of protocol, United States", False, 0.75),
    ("Chief of Protocol", "protocol of chief", False, 1.0),
    ("Chief of Protocol", "ambassador", False, 0.0),
    ("Chief of Protocol", "of", False, 0.5),
    ("New York City", "New York", False, 0.8),
    ("New York", "New York City", False, 0.8),
    ("New York", "New York New York", False, 2 / 3),
    ("New York New York", "New York", False, 2 / 3),
    ("Duran Duran", "Duran", False, 2 / 3),
    ("Rock 'n' Roll", "rock n roll", True, 1.0),
    ("Rock-n-Roll", "rock n roll", False, 0.0),
    ("Rock-n-Roll", "rocknroll", True, 1.0),
    ("3,677 seated", "3677 seated", True, 1.0),
    ("3,677", "3677 seats", False, 2 / 3),
    ("1,000", "1 000", False, 0.0),
    ("U.S.", "US", True, 1.0),
    ("U.S.", "U S", False, 0.0),
    ("Jean-Luc", "JeanLuc", True, 1.0),
    ("the cat and the hat", "cat and hat", True, 1.0),
    ("theatre", "atre", False, 0.0),
    ("a", "the", True, 0.0),
    ("yes", "yes", True, 1.0),
    ("yes", "Yes.", True, 1.0),
    ("yes", "the yes", True, 1.0),
    ("yes", "no", False, 0.0),
    ("yes", "yes it is", False, 0.0),
    ("no", "no", True, 1.0),
    ("no", "no one", False, 0.0),
    ("No One", "no", False, 0.0),
    ("No One", "one", False, 2 / 3),
    ("noanswer", "noanswer", True, 1.0),
    ("noanswer", "no answer", False, 0.0),
    ("Yes Minister", "yes", False, 0.0),
    ("Yes Minister", "yes prime minister", False, 0.8),
    ("Café Zürich", "café zürich", True, 1.0),
    ("Café", "Cafe", False, 0.0),
    ("“Help”", "Help", False, 0.0),
    ('"Help"', "Help", True, 1.0),
    ("from 1986 to 2013", "1986 to 2013", False, 6 / 7),
    ("from 1986 to 2013", "", False, 0.0),
    ("Kansas", "a\u00a0Kansas", True, 1.0),
    ("Greenwich Village, New York City", "Greenwich Village", False, 4 / 7),
]


@pytest.mark.parametrize(("gold", "answer", "same", "overlap"), PAIRS)
def test_em_and_f1_follow_the_official_rules(gold: str, answer: str, same: bool, overlap: float) -> None:
    assert exact_match(gold, answer) is same
    assert f1(gold, answer) == pytest.approx(overlap)
    assert published_em(gold, answer) is same
    assert published_f1(gold, answer) == pytest.approx(overlap)


# The definitions as published (SQuAD's metrics, and HotPotQA's rule for closed answers), written out step by step. The
# pairs above were checked against the official script itself too: the answer functions of hotpot_evaluate_v1.py in
# hotpotqa/hotpot, commit 4c0fa5ea, give the same EM and F1 for all of them.


def published_tokens(text: str) -> list[str]:
    text = text.lower().translate({ord(mark): None for mark in string.punctuation})
    return [token for token in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", text)) if token]


def published_em(gold: str, answer: str) -> bool:
    return published_tokens(gold) == published_tokens(answer)


def published_f1(gold: str, answer: str) -> float:
    expected, found = published_tokens(gold), published_tokens(answer)
    for closed in (["yes"], ["no"], ["noanswer"]):
        if (expected == closed) != (found == closed):
            return 0.0
    rest, common = list(expected), 0
    for token in found:
        if token in rest:
            rest.remove(token)
            common += 1
    return 0.0 if not common else 2 * common / (len(expected) + len(found))


def test_both_implementations_agree_on_texts_of_all_kinds() -> None:
    rng = np.random.default_rng(0)
    words = ["a", "The", "an", "yes", "no", "noanswer", "Theme", "x-y", "U.S.", "3,677", "'", "é", "—", "yes.", "\t"]
    for _ in range(2000):
        gold, answer = (" ".join(rng.choice(words, rng.integers(0, 5))) for _ in range(2))
        assert exact_match(gold, answer) == published_em(gold, answer), (gold, answer)
        assert f1(gold, answer) == pytest.approx(published_f1(gold, answer)), (gold, answer)
        assert normalise(normalise(gold)) == normalise(gold) or "-" in gold or "." in gold or "'" in gold


# --------------------------------------------------------------------------------------------------------------------
# Files


def make(path: Path, rows: Sequence[Any], **options: Any) -> HotPotQA:
    return HotPotQA(write(path, rows), rank=bm25, **options)


def test_items_hold_what_the_file_says(tmp_path: Path) -> None:
    ((item,),) = (s.items for s in make(tmp_path / "f.json", [row(), row(1)]).streams("test"))
    assert (item.id, item.kind, item.answer) == ("q1", "bridge", "the Seine")
    assert item.context["passages"][2] == "Paris : Paris is a city. The Seine runs through it."
    assert list(item.context["supporting"]) == ["France", "Paris"]
    assert item.context["supporting"]["Paris"] == item.context["passages"][2]


def test_the_test_is_a_file_of_its_own_or_the_last_fifth(tmp_path: Path) -> None:
    task = make(tmp_path / "f.json", [row(i) for i in range(20)], stream_length=6)
    assert [(s.id, [i.id for i in s.items]) for s in task.streams("test")] == [("test-0", ["q16", "q17", "q18", "q19"])]
    assert [len(s.items) for s in task.streams("train")] == [6, 6, 4]
    other = write(tmp_path / "g.json", [row(30)])
    two = HotPotQA(task.data, other, rank=bm25, max_items=3)
    assert [i.id for s in (*two.streams("train"), *two.streams("test")) for i in s.items] == ["q0", "q1", "q2", "q30"]
    with pytest.raises(AgileError, match=r"give task\.test_data=FILE"):
        HotPotQA(other, rank=bm25).streams("test")


LONG = "x" * 1_000_001


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {k: v for k, v in row(1).items() if k != "question"},
            "entry 2, field 'question': expected text, found no such",
        ),
        (row(1, answer=7), "entry 2, field 'answer': expected text, found 7"),
        (row(1, answer=" "), "entry 2, field 'answer': expected text that is not empty, found ' '"),
        (row(1, type="trivia"), "entry 2, field 'type': expected one of bridge, comparison, found 'trivia'"),
        (row(0), r"entry 2, field '_id': expected an id that is not yet used \(entry 1 has it\), found 'q0'"),
        (row(1, context="x"), "entry 2, field 'context': expected a list, found 'x'"),
        (row(1, context=[["Paris"]]), r"entry 2, context 1: expected \[title, \[sentence, ...\]\], found \['Paris'\]"),
        (row(1, context=[["Paris", [1]]]), r"entry 2, context 1: expected sentences of text, found \[1\]"),
        (row(1, supporting_facts=[["Rome", 0]]), "entry 2, field 'supporting_facts': expected a title of the context"),
        (row(1, context=[]), r"entry 2, field 'context': expected a list that is not empty, found \[\]"),
        (row(1, supporting_facts=[]), "entry 2, field 'supporting_facts': expected a list that is not empty"),
        (
            row(1, context=[*row()["context"], ["Paris", ["Paris is a town in Texas."]]]),
            "entry 2, field 'supporting_facts': expected a title that one paragraph alone has, found 'Paris'",
        ),
        (row(1, supporting_facts=[["Paris", "0"]]), r"entry 2, supporting_facts 1: expected \[title, number"),
        (row(1, question=LONG), "entry 2, field 'question': expected a row of at most 1,000,000 bytes, found 1,0"),
        (row(1, question="\ud800?"), "entry 2, field 'question': expected text in UTF-8, found"),
        ("x", "entry 2: expected an object with the field '_id', found 'x'"),
    ],
)
def test_bad_entries_are_named_or_left_out_and_listed(tmp_path: Path, bad: Any, message: str) -> None:
    rows = [row(0), bad, row(2)]
    with pytest.raises(AgileError, match=message) as error:
        make(tmp_path / "f.json", rows).streams("train")
    assert str(error.value).startswith(str(tmp_path / "f.json"))
    task = make(tmp_path / "f.json", rows, skip_bad_rows=True)
    assert [i.id for split in ("train", "test") for s in task.streams(split) for i in s.items] == ["q0", "q2"]
    assert task.skipped == [str(error.value)]


def test_a_field_that_stands_twice_spoils_no_more_than_its_entry(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", [row(0), row(1), row(2)])
    path.write_bytes(path.read_bytes().replace(b'"_id": "q1"', b'"_id": "q1", "answer": "x"'))
    task = HotPotQA(path, rank=bm25, skip_bad_rows=True)
    assert [i.id for split in ("train", "test") for s in task.streams(split) for i in s.items] == ["q0", "q2"]
    assert task.skipped == [f"{path}, entry 2, field 'answer': expected it once, found it again."]


def test_the_number_of_a_sentence_may_be_out_of_range_as_once_in_the_official_dev_file(tmp_path: Path) -> None:
    facts = [["France", 902], ["Paris", 0]]
    task = make(tmp_path / "f.json", [row(), row(1, supporting_facts=facts)])
    assert list(task.streams("test")[0].items[0].context["supporting"]) == ["France", "Paris"]


def test_broken_utf8_spoils_no_more_than_its_entry(tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", [row(0), row(1, answer="l\u00f6ss"), row(2)])
    path.write_bytes(path.read_bytes().replace(rb"l\u00f6ss", b"l\xf6ss"))
    with pytest.raises(
        AgileError, match=r"f.json, entry 2, field 'answer': expected text in UTF-8, found 'l\\udcf6ss'"
    ):
        HotPotQA(path, rank=bm25).streams("train")
    task = HotPotQA(path, rank=bm25, skip_bad_rows=True)
    assert [i.id for split in ("train", "test") for s in task.streams(split) for i in s.items] == ["q0", "q2"]
    assert len(task.skipped) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON list, found an empty file"),
        (b"[]", "found an empty file"),
        (b"{}", "expected a JSON list, found {}"),
        (b'[{"_id": "\xff', "expected JSON in UTF-8"),
        (b'[{"_id": "\xff"}]', "found 1 bad ones, the last: .*, field '_id': expected text in UTF-8"),
        (None, "no such file; the distractor files are hotpot"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "f.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AgileError, match=message):
        HotPotQA(path, rank=bm25, skip_bad_rows=True).streams("train")


# --------------------------------------------------------------------------------------------------------------------
# Search


def search(tool: PassageSearch, item: Item, *queries: str) -> list[Observation]:
    steps: list[Observation] = []
    for query in queries:
        result = asyncio.run(tool(query, item, tuple(steps)))
        steps.append(Observation(Action(SEARCH, query), Source.TOOL, result.text, result.ok))
    return steps


@pytest.mark.parametrize("rank", [bm25, dense(make_encoder("hashing").encode)])
def test_a_search_shows_the_best_paragraph_that_is_not_yet_in_the_context(tmp_path: Path, rank: Rank) -> None:
    item = make(tmp_path / "f.json", [row(), row(1)]).streams("train")[0].items[0]
    steps = search(PassageSearch(rank), item, "Paris", "Paris", "Berlin", "Berlin", "more", "Paris")
    assert [step.text.partition(" : ")[0].strip() for step in steps[:4]] == ["Paris", "France", "Berlin", "none"]
    assert steps[2].text == "Berlin : Berlin is the capital of Germany. The Spree runs through it.\n"
    assert [step.ok for step in steps] == [True] * MAX_SEARCHES + [False]
    assert steps[-1].text == "error : all 5 searches are used up\n"


def test_bm25_takes_queries_and_paragraphs_without_words() -> None:
    assert bm25("?!", ["one", "two"]).tolist() == [0, 0]
    assert bm25("unknown", ["one", "two"]).tolist() == [0, 0]
    assert bm25("one", ["", "!"]).tolist() == [0, 0]
    assert bm25("one", ["two", "one", "three"]).argmax() == 1


# --------------------------------------------------------------------------------------------------------------------
# Sessions


def done(answer: str | None, advised: AdviceStatus | None = None, **fields: Any) -> Session:
    advice = None if advised is None else Advice("the Seine", price=0.3, status=advised)
    status = fields.get("status", SessionStatus.COMPLETED)
    return Session("s/0", "s", 0, "i", "bridge", 0, (), (), (), (), advice, answer, status)


@pytest.mark.parametrize(
    ("session", "components"),
    [
        (done("Seine"), {"correct": 1.0}),
        (done("Loire"), {"correct": 0.0}),
        (done("Loire", AdviceStatus.ANSWERED), {"correct": 1.0, "advice": -0.3}),
        (done("Loire", AdviceStatus.REFUSED), {"correct": 0.0}),
        (done(None, status=SessionStatus.TRUNCATED), {"correct": 0.0}),
    ],
)
def test_reward_components(tmp_path: Path, session: Session, components: Mapping[str, float]) -> None:
    task = make(tmp_path / "f.json", [row(), row(1)])
    assert task.score(task.streams("train")[0].items[0], session).components == components


def test_figures_of_sessions() -> None:
    """Right, half right, advised and so right, without an answer, and broken off with one."""

    def played(
        answer: str | None,
        *,
        right: float = 0.0,
        advised: bool = False,
        status: SessionStatus = SessionStatus.COMPLETED,
    ) -> tuple[Item, Session]:
        advice = Advice("x", price=0.3) if advised else None
        reward = Reward({"correct": right})
        session = Session("s/0", "s", 0, "i", "bridge", 0, (), (), (), (), advice, answer, status, reward=reward)
        return Item("i", "Which?", "Eiffel Tower", "bridge"), session

    found = HotPotQA.figures(
        [
            played("the Eiffel Tower", right=1.0),
            played("Tower of Eiffel, Paris"),
            played("no idea", right=1.0, advised=True),
            played(None),
            played("Eiffel Tower", status=SessionStatus.TRUNCATED),
        ]
    )
    assert found == {"exact match": 0.4, "f1": pytest.approx((1 + 2 / 3 + 1) / 5)}


def executor_of(task: HotPotQA) -> Executor:
    agent = HotPotQAAgent()
    texts = agent.corpus([i for split in ("train", "test") for s in task.streams(split) for i in s.items])
    codec = ActionCodec(build_tokenizer("bpe", texts, SPEC, 400), SPEC)
    return make_executor(agent, codec=codec, tools=task.tools, score=task.score, limits=Limits(max_turns=20))


def test_a_session_that_runs_out_of_searches_is_wrong_and_not_advised(tmp_path: Path) -> None:
    task = make(tmp_path / "f.json", [row(), row(1)])
    executor = executor_of(task)
    steps = [Action(Fn.REFLECTION, "more"), Action(SEARCH, "Paris")] * 20
    session = play(executor, script(executor.codec, *steps), task.streams("train")[0].items[0])
    assert session.status is SessionStatus.TRUNCATED and not session.advised
    assert session.reward is not None and session.reward.components == {"correct": 0.0}
    assert [s.text for s in session.steps if not s.ok] == ["error : all 5 searches are used up\n"] * 5


@pytest.mark.parametrize(
    ("judge", "answer", "asks"), [(0.0, "the Seine", False), (0.0, "no", True), (1.0, "no", False)]
)
def test_the_teacher_finds_the_paragraphs_and_answers_what_they_spell_out(
    tmp_path: Path, judge: float, answer: str, asks: bool
) -> None:
    task = make(tmp_path / "f.json", [row(answer=answer), row(1)])
    executor, item = executor_of(task), task.streams("train")[0].items[0]
    teacher = HotPotQAAgent().teacher(executor.codec, judge)
    session = play(executor, teacher.policy(item, ListMemory(), 0.3, np.random.default_rng(0)), item)
    chosen = [str(s.action) for s in session.steps if s.action.argument or s.action.name == Fn.SEEK_ADVICE]
    thought = UNKNOWN if asks else KNOWN
    assert chosen == [
        "[Reflection] I need France .",
        "[Search] France",
        "[Reflection] I need Paris .",
        "[Search] Paris",
        f"[Reflection] {thought}",
        *(["[SeekAdvice]"] if asks else []),
        f"[PredictAnswer] {answer}",
    ]
    assert session.reward is not None and session.reward.components["correct"] == 1.0


# --------------------------------------------------------------------------------------------------------------------
# Real questions


@pytest.fixture
def questions(data: Path) -> list[Item]:
    path = data / "hotpotqa" / "train_distractor_100.json"
    return [i for s in HotPotQA(path, path, rank=bm25).streams("test") for i in s.items]


def oracle_finds(tool: PassageSearch, item: Item) -> bool:
    """Whether searches for the titles of the supporting paragraphs, again while one is missing, show all of them."""
    steps: list[Observation] = []
    wanted = {title: f"{passage}\n" for title, passage in item.context["supporting"].items()}
    for _ in range(MAX_SEARCHES):
        missing = [title for title, text in wanted.items() if text not in [s.text for s in steps]]
        if not missing:
            return True
        result = asyncio.run(tool(missing[0], item, tuple(steps)))
        steps.append(Observation(Action(SEARCH, missing[0]), Source.TOOL, result.text, result.ok))
    return {s.text for s in steps} >= set(wanted.values())


def test_an_oracle_search_finds_every_supporting_paragraph_of_the_real_questions(questions: list[Item]) -> None:
    assert len(questions) == 100
    tool = PassageSearch(bm25)
    assert [item.id for item in questions if not oracle_finds(tool, item)] == []


@pytest.mark.slow
def test_so_does_a_dense_one_at_the_first_try(questions: list[Item]) -> None:
    rank = dense(make_encoder("all-MiniLM-L6-v2").encode)
    for item in questions:
        for title, passage in item.context["supporting"].items():
            (step,) = search(PassageSearch(rank), item, title)
            assert step.text == f"{passage}\n", (item.id, title)
