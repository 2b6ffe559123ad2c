import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.tasks.productqa import ProductQA, is_correct
from agile.tools.sql import write_products
from agile.types import Action, Advice, AdviceStatus, Item, Observation, Session, SessionStatus, Source

ROWS: list[dict[str, Any]] = [
    {
        "id": "search_qa_0",
        "asin": "B1",
        "question": "Which are red?",
        "short_answer": [{"asin": "B1", "title": "One"}, {"asin": "B2", "title": "Two"}],
        "long_answer": "One or Two.",
        "type": "search_qa",
        "extra_data": {"sql": 'SELECT product_id FROM `pans` WHERE color = "red" LIMIT 1;'},
    },
    {
        "id": "fact_qa_0",
        "asin": "B2",
        "question": "Is it heavy?",
        "short_answer": "yes",
        "long_answer": "Buyers say so.",
        "type": "fact_qa",
        "extra_data": None,
    },
    {
        "id": "reasoning_qa_0",
        "asin": "B3",
        "question": "Is it safe?",
        "short_answer": "no",
        "long_answer": "No, it rusts.",
        "type": "reasoning_qa",
        "extra_data": {
            "knowledge": "iron rusts",
            "kind": "rule",
            "settled_by": "pans/iron",
            "prior": 0.9,
            "guess": "no",
        },
    },
]
METADATA: dict[str, dict[str, str | None]] = {
    "B1": {"title": "One", "color": "red"},
    "B2": {"title": "Two", "color": "red", "weight": None},
    "B3": {"title": "Three", "color": "blue"},
}
SCHEMA = {"color": {"type": "choice", "choices": ["red", "blue"]}}


def write_group(folder: Path, rows: Sequence[Any] = ROWS) -> None:
    folder.mkdir(parents=True)
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps(METADATA), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    for split, group in (("test", "pans"), ("test", "lids"), ("train", "cups")):
        write_group(folder / split / group)
        products = [{"asin": asin, "title": m["title"], "color": m["color"]} for asin, m in METADATA.items()]
        write_products(folder / "product_qa.db", group, {"color": "VARCHAR(50)"}, products)
    return folder


@pytest.fixture
def shop(template: Path, tmp_path: Path) -> Path:
    """Two test groups and a train group of three questions each, for this test to break."""
    return Path(shutil.copytree(template, tmp_path / "shop"))


def question(answer: str | list[str]) -> Item:
    return Item("i", "?", answer, "search" if isinstance(answer, list) else "fact")


@pytest.mark.parametrize(
    ("gold", "answer", "used_search", "right"),
    [
        (["B1", "B2"], "B1", True, True),
        (["B1", "B2"], "B2 , B1", True, True),
        (["B1", "B2"], "B2,B1", True, True),
        (["B1", "B2"], "B1 B2", True, True),
        (["B1", "B2"], "\tB1\n,, B1 ,", True, True),
        (["B1", "B2"], "B1 , B3", True, False),
        (["B1", "B2"], "B3", True, False),
        (["B1", "B2"], "", True, False),
        (["B1", "B2"], "none", True, False),
        (["B1", "B2"], "none , B1", True, False),
        (["B1"], "b1", True, False),
        (["B1"], "B11", True, False),
        (["B1"], "B", True, False),
        (["B1"], "B1 | One", True, False),
        (["B1"], "error : no such column", True, False),
        (["B1"], "B1", False, True),
        (["B1"], None, True, False),
        ([], "", True, True),
        ([], "  ,\n", True, True),
        ([], "none", True, True),
        ([], " None ", True, True),
        ([], "B1", True, False),
        ([], None, True, False),
        ("yes", "yes", False, True),
        ("Yes", " yES\n", False, True),
        ("a  big   pan", "A big\tpan", False, True),
        ("yes", "yes.", False, False),
        ("yes", "yes it is", False, False),
        ("yes", "no", False, False),
        ("yes", "", False, False),
        ("yes", None, False, False),
        ("yes", "yes", True, False),
        ("no", "none", False, False),
        ("none", "None", False, True),
        ("ja , nein", "ja,nein", False, False),
        ("Größe M", "GRÖSSE M", False, False),
        # a list where text is expected, and text where a list is
        (["B1", "B2"], "['B1', 'B2']", True, False),
        (["B1", "B2"], "[B1]", True, False),
        (["yes"], "yes", True, True),
        (["yes"], "yes", False, True),
        ("B1", "B1", True, False),
        ("['yes']", "yes", False, False),
        ("yes", "yes, no", False, False),
        # ties: an id twice, all of the gold set, one of it beside itself in another case
        (["B1"], "B1, B1, B1", True, True),
        (["B1", "B2", "B3"], "B3 B2 B1", True, True),
        (["B1"], "B1, b1", True, False),
        ([], "none none", True, False),
        ([], "", False, True),
        ("", "", False, True),
        ("yes\n", "\u00a0YES", False, True),
    ],
)
def test_official_scoring(gold: str | list[str], answer: str | None, used_search: bool, right: bool) -> None:
    assert is_correct(question(gold), answer, used_search) is right
    assert ProductQA.is_correct(question(gold), answer, used_search) is right


def session(
    answer: str | None,
    *,
    advised: AdviceStatus | None = None,
    search: bool = False,
    status: SessionStatus = SessionStatus.COMPLETED,
) -> Session:
    steps = (Observation(Action("SearchProduct", "SELECT"), Source.TOOL, "none"),) if search else ()
    advice = None if advised is None else Advice("yes", price=0.3, status=advised)
    return Session("s/0", "s", 0, "i", "fact", 0, (), steps, (), (), advice, answer, status)


@pytest.mark.parametrize(
    ("done", "components"),
    [
        (session("yes"), {"correct": 1.0}),
        (session("no"), {"correct": 0.0}),
        (session("yes", search=True), {"correct": 0.0}),
        (session("no", advised=AdviceStatus.ANSWERED), {"correct": 1.0, "advice": -0.3}),
        (session("no", advised=AdviceStatus.ANSWERED, search=True), {"correct": 1.0, "advice": -0.3}),
        (session("no", advised=AdviceStatus.TIMEOUT), {"correct": 0.0}),
        (session("yes", advised=AdviceStatus.REFUSED), {"correct": 1.0}),
        (session("yes", status=SessionStatus.TRUNCATED), {"correct": 0.0}),
        (session(None, status=SessionStatus.FAILED), {"correct": 0.0}),
        (
            session("yes", advised=AdviceStatus.ANSWERED, status=SessionStatus.INVALID_ACTION),
            {"correct": 0.0, "advice": -0.3},
        ),
    ],
)
def test_reward_components(shop: Path, done: Session, components: Mapping[str, float]) -> None:
    reward = ProductQA(shop).score(question("yes"), done)
    assert reward.components == components
    assert reward.total == pytest.approx(sum(components.values()))


def test_advice_after_a_search_is_judged_as_advice(shop: Path) -> None:
    """An answer to a fact that was searched for is wrong; what an expert said of it is not."""
    task = ProductQA(shop, advice_counts="if_right")
    done = session("no", advised=AdviceStatus.ANSWERED, search=True)
    assert task.score(question("yes"), done).components == {"correct": 1.0, "advice": -0.3}
    assert task.score(question("no"), done).components == {"correct": 0.0, "advice": -0.3}


def test_items_hold_what_the_files_say(shop: Path) -> None:
    search, fact, rule = ProductQA(shop, test_groups=["pans"]).streams("test")[0].items
    assert (search.id, search.question, search.answer) == ("pans/search_qa_0", "Which are red?", ["B1", "B2"])
    assert [i.kind for i in (search, fact, rule)] == ["search", "fact", "rule"]
    assert {i.group for i in (search, fact, rule)} == {"pans"}
    assert (fact.product, fact.answer) == ("B2", "yes")
    assert fact.context == {
        "sql": "",
        "knowledge": "",
        "long_answer": "Buyers say so.",
        "title": "Two",
        "metadata": {"title": "Two", "color": "red"},
        "schema": SCHEMA,
        "columns": ("color",),
    }
    assert rule.context["knowledge"] == "iron rusts"
    assert (rule.context["settled_by"], rule.context["prior"], rule.context["guess"]) == ("pans/iron", 0.9, "no")


def test_groups_are_sorted_or_as_named_and_can_be_cut(shop: Path) -> None:
    assert [s.id for s in ProductQA(shop).streams("test")] == ["lids", "pans"]
    assert [s.id for s in ProductQA(shop, test_groups=["pans", "lids"]).streams("test")] == ["pans", "lids"]
    task = ProductQA(shop, test_groups=["pans"], max_items=2)
    assert [len(s.items) for s in (*task.streams("test"), *task.streams("train"))] == [2, 2]


def test_a_split_is_read_once_and_only_when_asked_for(shop: Path) -> None:
    (shop / "train" / "cups" / "qa.jsonl").unlink()
    task = ProductQA(shop)
    assert task.streams("test") is task.streams("test")
    with pytest.raises(AgileError, match="no such file"):
        task.streams("train")


def test_tool_answer_runs_the_gold_sql(shop: Path) -> None:
    task = ProductQA(shop, test_groups=["pans"])
    search, fact, _ = task.streams("test")[0].items
    assert task.tool_answer(search) == "B1"
    assert task.tool_answer(fact) is None
    assert task.tool_answer(Item("i", "?", ["B1"], "search", "pans", context={"sql": "SELECT nonsense"})) is None


def test_blank_lines_and_line_separators_within_text_are_no_lines(shop: Path) -> None:
    path = shop / "test" / "pans" / "qa.jsonl"
    row = json.dumps({**ROWS[1], "question": "Heavy?\u2028Or not?"}, ensure_ascii=False)
    path.write_text(f"\n{row}\n\n", encoding="utf-8")
    (item,) = ProductQA(shop, test_groups=["pans"]).streams("test")[0].items
    assert item.question == "Heavy?\u2028Or not?"


def changed(index: int, **fields: Any) -> list[dict[str, Any]]:
    return [row | fields if i == index else row for i, row in enumerate(ROWS)]


def without(index: int, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if (i, k) != (index, name)} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without(1, "question"), "line 2, field 'question': expected text, found no such field"),
        (without(0, "short_answer"), "line 1, field 'short_answer': expected a list, found no such field"),
        (changed(2, long_answer=7), "line 3, field 'long_answer': expected text, found 7"),
        (changed(1, short_answer=["B1"]), r"line 2, field 'short_answer': expected text, found \['B1'\]"),
        (changed(0, short_answer="B1"), "line 1, field 'short_answer': expected a list, found 'B1'"),
        (changed(0, short_answer=["B1"]), "line 1, short_answer 0: expected an object with the field 'asin'"),
        (changed(0, short_answer=[{"title": "One"}]), "line 1, short_answer 0, field 'asin': expected text"),
        (changed(0, extra_data=None), "line 1, extra_data, field 'sql': expected text, found no such field"),
        (changed(2, extra_data={}), "line 3, extra_data, field 'knowledge': expected text"),
        (changed(2, extra_data={"knowledge": "", "kind": 3}), "field 'kind': expected text, found 3"),
        (
            changed(0, short_answer=[{"asin": "B1"}, {"asin": "B9"}]),
            "line 1, short_answer 1, field 'asin': expected a product of metadata.json .*, found 'B9'",
        ),
        (changed(1, question="x" * 1_000_000), "line 2, field 'question': expected a row of at most 1,000,000 bytes"),
        (changed(1, extra_data="x"), "line 2, field 'extra_data': expected an object or null, found 'x'"),
        (changed(1, type="trivia_qa"), "line 2, field 'type': expected one of search_qa, fact_qa, reasoning_qa, found"),
        (changed(1, asin="B9"), "line 2, field 'asin': expected a product of metadata.json .*, found 'B9'"),
        (changed(2, id="fact_qa_0"), "line 3, field 'id': expected an id that is not yet used .line 2 has it"),
        ([ROWS[0], "x"], "line 2: expected a JSON object, found 'x'"),
        ([], "found an empty file"),
    ],
)
def test_bad_rows_name_file_line_field_expectation_and_finding(shop: Path, rows: Sequence[Any], message: str) -> None:
    shutil.rmtree(shop / "test" / "pans")
    write_group(shop / "test" / "pans", rows)
    with pytest.raises(AgileError, match=message) as error:
        ProductQA(shop).streams("test")
    assert str(shop / "test" / "pans" / "qa.jsonl") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qa.jsonl", b'{"id": \n', "line 1: expected JSON in UTF-8, found '{\"id\": '"),
        ("qa.jsonl", b"\xff\xfe\xfa\n", "line 1: expected JSON in UTF-8"),
        ("qa.jsonl", b"[" * 100_000, "line 1: expected JSON in UTF-8"),
        ("metadata.json", b"[]", "expected a JSON object with one object per product, found"),
        ("metadata.json", b"{}", "expected a JSON object with one object per product, found"),
        ("metadata.json", b'{"B1": "One"}', "product 'B1': expected an object, found 'One'"),
        ("metadata.json", b"", "expected a JSON object with one object per product, found an empty file"),
        (
            "metadata.json",
            b'{"B1": {"title": "a"}, "B1": {"title": "b"}}',
            "product 'B1': expected it once, found it again",
        ),
        ("metadata.json", b'{"B1": {"title": "a", "title": "b"}}', "product 'B1', field 'title': expected it once"),
        (
            "metadata.json",
            b'{"B1": {"title": "a", "x": "' + b"x" * 1_000_000 + b'"}}',
            "product 'B1', field 'x': expected a row of at most 1,000,000 bytes",
        ),
        (
            "metadata.json",
            b'{"B1": {"title": "a", "x": "l\xf6ss"}}',
            r"product 'B1', field 'x': expected text in UTF-8, found 'l\\udcf6ss'",
        ),
        ("schema.json", b'{"color": {}, "color": {}}', "feature 'color': expected it once"),
        (
            "qa.jsonl",
            b'{"id": "a", "question": "l\xf6ss"}\n',
            r"line 1, field 'question': expected text in UTF-8, found 'l\\udcf6ss'",
        ),
        ("metadata.json", b'{"B1": {}}', "product 'B1', field 'title': expected text, found no such field"),
        ("metadata.json", b'{"B1": {"title": "a", "x": 1}}', "product 'B1', field 'x': expected text or null, found 1"),
        ("schema.json", b"nope", "expected JSON in UTF-8, found 'nope'"),
        ("schema.json", None, "no such file"),
        ("metadata.json", None, "no such file"),
        ("qa.jsonl", None, "no such file"),
    ],
)
def test_bad_files_are_named(shop: Path, name: str, content: bytes | None, message: str) -> None:
    path = shop / "test" / "pans" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AgileError, match=message) as error:
        ProductQA(shop).streams("test")
    assert str(path) in str(error.value)


def test_bad_products_are_left_out_with_the_questions_about_them(shop: Path) -> None:
    path = shop / "test" / "pans" / "metadata.json"
    path.write_text(json.dumps({**METADATA, "B2": {"title": 2}}), encoding="utf-8")
    task = ProductQA(shop, test_groups=["pans"], skip_bad_rows=True)
    assert [item.id for item in task.streams("test")[0].items] == ["pans/reasoning_qa_0"]
    product, search, fact = task.skipped
    assert product == f"{path}, product 'B2', field 'title': expected text, found 2."
    assert "line 1, short_answer 1, field 'asin'" in search and "line 2, field 'asin'" in fact


def test_missing_folders_groups_and_databases_are_named(shop: Path) -> None:
    with pytest.raises(AgileError, match="did you mean 'pans'"):
        ProductQA(shop, test_groups=["pan"]).streams("test")
    with pytest.raises(AgileError, match="dev: expected a folder with one folder per product group, found none"):
        ProductQA(shop).streams("dev")
    with pytest.raises(AgileError, match="max_items is 0"):
        ProductQA(shop, max_items=0)
    with pytest.raises(AgileError, match=r"product_qa\.db: no such file"):
        ProductQA(shop / "test")
    write_group(shop / "test" / "unsold")
    with pytest.raises(AgileError, match="expected a table 'unsold'"):
        ProductQA(shop).streams("test")


@pytest.fixture
def real(data: Path) -> ProductQA:
    return ProductQA(data / "productqa")


def test_gold_sql_is_right_on_every_real_search_question(real: ProductQA) -> None:
    items = [item for stream in real.streams("test") for item in stream.items if item.kind == "search"]
    assert len(items) > 2500
    assert [item.id for item in items if not real.is_correct(item, real.tool_answer(item), True)] == []


def test_real_streams_hold_every_line_in_file_order(real: ProductQA) -> None:
    for stream in real.streams("test"):
        lines = (real.data / "test" / stream.id / "qa.jsonl").read_text(encoding="utf-8").strip().split("\n")
        assert [item.id for item in stream.items] == [f"{stream.id}/{json.loads(line)['id']}" for line in lines]
