import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agile.agents.own_qa import OwnQAAgent, own_spec
from agile.errors import AgileError
from agile.tasks.jsonl import JsonlTask, is_correct
from agile.tools.tables import open_table
from agile.types import Advice, AdviceStatus, Item, MemoryKind, Session, SessionStatus

CSV = "name,color,price\nMerlot,red,12\nRiesling,white,15.5\nChianti,red,\n"
ROWS: list[dict[str, Any]] = [
    {
        "question": "Which are red?",
        "answer": ["Merlot", "Chianti"],
        "sql": "SELECT name FROM products WHERE color='red'",
    },
    {"question": "With fish?", "answer": "yes", "product": "Riesling", "explanation": "White wines do."},
    {"question": "How?", "answer": "b", "options": ["warm", "cool"], "context": {"kind": "dry"}, "id": "x"},
    {"question": "Who?", "answer": "The Vintner", "context": "A riddle."},
]


def write(folder: Path, rows: list[Any], name: str = "q.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "wines.csv"
    path.write_text(CSV)
    return path


@pytest.fixture
def choice(tmp_path: Path) -> tuple[JsonlTask, Item]:
    """A question with the options warm and cool, the gold one."""
    path = write(tmp_path, ROWS[2:3])
    task = JsonlTask(path, path)
    return task, task.streams("test")[0].items[0]


def test_items_hold_what_the_files_say(tmp_path: Path, table: Path) -> None:
    path = write(tmp_path, ROWS)
    task = JsonlTask(path, path, database=table)
    red, fish, how, who = task.streams("test")[0].items
    assert [i.id for i in (red, fish, how, who)] == ["1", "2", "x", "4"]
    assert [i.kind for i in (red, fish, how, who)] == ["search", "text", "choice", "text"]
    assert {i.group for i in (red, fish, how, who)} == {"products"}
    assert fish.context["metadata"] == {"name": "Riesling", "color": "white", "price": "15.5"}
    assert (fish.product, fish.context["knowledge"], fish.context["columns"]) == (
        "Riesling",
        "White wines do.",
        ("name", "color", "price"),
    )
    assert (how.answer, how.context["metadata"]) == ("cool", {"kind": "dry", "A": "warm", "B": "cool"})
    assert who.context["metadata"] == {"context": "A riddle."}
    assert task.tool_answer(red) == "Merlot , Chianti" and task.tool_answer(fish) is None
    assert task.is_correct(red, task.tool_answer(red), True)


def test_without_a_table_there_is_no_search(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path, ROWS[2:] * 1 + [{"question": "?", "answer": "a"}]), stream_length=1)
    assert task.tools == {} and task.table is None
    assert [s.id for s in task.streams("train")] == ["train-0", "train-1"]
    assert [i.question for s in task.streams("test") for i in s.items] == ["?"]


@pytest.mark.parametrize(
    ("index", "answer", "right"),
    [
        (0, "chianti", True),
        (0, "Merlot ,Chianti", True),
        (0, "Merlot , Riesling", False),
        (0, "none", False),
        (0, None, False),
        (1, " YES", True),
        (1, "yes.", False),
        (2, "B", True),
        (2, "(b)", True),
        (2, "B: cool", True),
        (2, "cool", True),
        (2, "A", False),
        (2, "C", False),
        (2, "warm or cool", False),
        (3, "the  vintner", True),
    ],
)
def test_what_is_right(tmp_path: Path, table: Path, index: int, answer: str | None, right: bool) -> None:
    path = write(tmp_path, ROWS)
    task = JsonlTask(path, path, database=table)
    assert task.is_correct(task.streams("test")[0].items[index], answer, False) is right


def test_an_empty_list_is_answered_by_none(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "Which?", "answer": []}])
    task = JsonlTask(path, path)
    item = task.streams("test")[0].items[0]
    assert [task.is_correct(item, a, False) for a in ("none", "", "Merlot")] == [True, True, False]


def done(answer: str | None, advice: str | None = None, status: AdviceStatus = AdviceStatus.ANSWERED) -> Session:
    told = None if advice is None else Advice(advice, price=0.4, status=status)
    return Session("s/0", "s", 0, "x", "choice", 0, (), (), (), (), told, answer, SessionStatus.COMPLETED)


@pytest.mark.parametrize(
    ("session", "components"),
    [
        (done("B"), {"correct": 1.0}),
        (done("no idea"), {"correct": 0.0, "unreadable": 0.0}),
        (done(None), {"correct": 0.0}),
        (done("A", "cool"), {"correct": 1.0, "advice": -0.4}),
        (done("A", "who knows"), {"correct": 1.0, "advice": -0.4, "unreadable advice": 0.0}),
        (done("A", "", AdviceStatus.REFUSED), {"correct": 0.0}),
    ],
)
def test_what_cannot_be_read_as_an_option_is_counted(
    choice: tuple[JsonlTask, Item], session: Session, components: dict[str, float]
) -> None:
    task, item = choice
    assert task.score(item, session).components == components


def test_an_answer_in_words_of_its_own_can_always_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "Who?", "answer": "The Vintner"}])
    task = JsonlTask(path, path)
    assert task.score(task.streams("test")[0].items[0], done("no idea")).components == {"correct": 0.0}


@pytest.mark.parametrize(
    ("advice", "history"),
    [
        (Advice("cool"), ["How? -> cool"]),
        (Advice("(b)", "Cellar cold."), ["How? -> cool"]),  # a letter means another option elsewhere
        (Advice("who knows"), []),
        (Advice("", status=AdviceStatus.TIMEOUT), []),
        (None, []),
    ],
)
def test_what_is_remembered_of_advice_about_options(
    choice: tuple[JsonlTask, Item], advice: Advice | None, history: list[str]
) -> None:
    agent = OwnQAAgent(spec=own_spec(table=False))
    entries = agent.remember(choice[1], "s/0", advice, "Serve it cold." if history else "")
    assert [e.text for e in entries if e.kind is MemoryKind.HISTORY] == history
    assert [e.text for e in entries if e.kind is MemoryKind.KNOWLEDGE] == ["Serve it cold."] * len(history)


def test_advice_without_options_is_remembered_as_it_was_said() -> None:
    agent = OwnQAAgent(spec=own_spec(table=False))
    (entry,) = agent.remember(Item("1", "Who?", "The Vintner", "text"), "s/0", Advice("the vintner!"), "")
    assert entry.text == "Who? -> the vintner!"


GOOD = {"question": "?", "answer": "yes"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": "yes"}, "line 2, field 'question': expected text, found no such field"),
        ({"question": "?"}, "line 2, field 'answer': expected text, found no such field"),
        ({**GOOD, "question": 7}, "line 2, field 'question': expected text, found 7"),
        ({**GOOD, "answer": 7}, "line 2, field 'answer': expected text, found 7"),
        ({**GOOD, "answer": " "}, "line 2, field 'answer': expected text that is not empty, found ' '"),
        ({**GOOD, "question": " "}, "line 2, field 'question': expected text that is not empty, found ' '"),
        ({**GOOD, "answer": ["a", 1]}, "line 2, field 'answer': expected text, or a list of texts, found"),
        ({**GOOD, "answr": "x"}, "line 2, field 'answr': no such field; expected some of question, answer"),
        ({**GOOD, "options": ["no", "never"]}, "line 2, field 'answer': expected one of the options .*, found 'yes'"),
        ({**GOOD, "options": ["yes"]}, "line 2, field 'options': expected 2 to 26 texts"),
        ({**GOOD, "options": {"1": "yes", "2": "no"}}, "field 'options': expected 2 to 26 texts, or an object of the"),
        ({**GOOD, "options": ["yes", 1]}, "line 2, field 'options': expected texts that are not empty"),
        ({**GOOD, "options": ["yes", "Yes "]}, "line 2, field 'options': expected texts that differ"),
        ({**GOOD, "context": 7}, "line 2, field 'context': expected text, or an object of names and texts, found 7"),
        ({**GOOD, "product": "Port"}, "line 2, field 'product': expected one of the 3 values of the column 'name'"),
        ({**GOOD, "id": "1"}, r"line 2, field 'id': expected an id that is not yet used \(line 1 has it\)"),
        ({**GOOD, "question": "x" * 1_000_001}, "line 2, field 'question': expected a row of at most 1,000,000 bytes"),
        ("x", "line 2: expected an object with the field 'question', found 'x'"),
    ],
)
def test_bad_lines_are_named_or_left_out_and_listed(tmp_path: Path, table: Path, bad: Any, message: str) -> None:
    path = write(tmp_path, [GOOD, bad, GOOD])
    with pytest.raises(AgileError, match=message) as error:
        JsonlTask(path, path, database=table).streams("train")
    assert str(error.value).startswith(str(path))
    task = JsonlTask(path, path, database=table, skip_bad_rows=True)
    assert [i.id for i in task.streams("train")[0].items] == ["1", "3"]
    assert task.skipped == [str(error.value)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"found an empty file. Write one question a line, see docs/your-own-data\.md"),
        (b'{"question": "\xff"}\n', r"line 1, field 'question': expected text in UTF-8, found '\\udcff'"),
        (b'\xef\xbb\xbf{"question": "?"}\n', "line 1, field 'answer': expected text, found no such field"),
        (b'{"question": "?"\n', "line 1: expected JSON in UTF-8"),
        (b'{"question": "?", "answer": "yes", "answer": "no"}\n', "line 1, field 'answer': expected it once, found it"),
        (b'{"question": "?", "options": {"A": "x", "A": "y"}}', "line 1, field 'A': expected it once, found it again"),
        (None, "no such file; expected a file of JSON lines"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AgileError, match=message):
        JsonlTask(path).streams("train")


def test_sql_needs_a_table(tmp_path: Path) -> None:
    with pytest.raises(AgileError, match=r"field 'sql': expected none, for there is no table \(task\.database\)"):
        JsonlTask(write(tmp_path, ROWS)).streams("train")


# --------------------------------------------------------------------------------------------------------------------
# Tables


def test_names_may_hold_commas(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('name,color\n"Merlot, 2019",red\nChianti,red\n', encoding="utf-8")
    sql = "SELECT name FROM products"
    path = write(tmp_path, [{"question": "Which are red?", "answer": ["Chianti", "Merlot, 2019"], "sql": sql}])
    task = JsonlTask(path, path, database=table)
    item = task.streams("test")[0].items[0]
    said = task.tool_answer(item)
    assert said == "Merlot, 2019 , Chianti"
    answers = (said, "Chianti, merlot,2019", "Merlot, 2019", "Merlot", "2019", "Chianti, Merlot", "none", "")
    assert [task.is_correct(item, answer, True) for answer in answers] == [True] * 3 + [False] * 5
    called_none = Item("1", "Which?", ["None", "a"], "search")
    assert [is_correct(called_none, text) for text in ("none", "a, none", "a", "")] == [True] * 3 + [False]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "db"])
def test_every_kind_of_table_file_gives_the_same_table(tmp_path: Path, table: Path, kind: str) -> None:
    import pandas

    frame, path = pandas.read_csv(table), tmp_path / f"t.{kind}"
    match kind:
        case "csv" | "tsv":
            frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
        case "json" | "jsonl":
            frame.to_json(path, orient="records", lines=kind == "jsonl")
        case "parquet":
            frame.to_parquet(path)
        case _:
            with closing(sqlite3.connect(path)) as connection:
                frame.to_sql("wines", connection, index=False)
    read = open_table(path)
    assert read.columns == ("name", "color", "price")
    assert read.rows["Merlot"] == {"name": "Merlot", "color": "red", "price": "12.0"}
    assert "price" not in read.rows["Chianti"]
    questions = write(tmp_path, ROWS)
    task = JsonlTask(questions, questions, database=path)
    assert task.tool_answer(task.streams("test")[0].items[0]) == "Merlot , Chianti"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "cannot be read as a table"),
        ("t.csv", b"name,color\n", "at least one column and one row, found an empty one"),
        (
            "t.csv",
            b"name,color\na,red\na,blue\n",
            "row 2, column 'name': expected a name that is not yet used, found 'a'",
        ),
        ("t.csv", b"name,color\n,red\n", "row 1, column 'name': expected the name of the row, found nothing"),
        ("t.csv", b"name,Name\na,b\n", "cannot be made a table .*duplicate column"),
        ("t.csv", b"name,color\na,red\nb,l\xf6ss\n", r"line 3: expected text in UTF-8, found b'b,l\\xf6ss'"),
        ("t.tsv", b"name\tl\xf6ss\na\tred\n", r"line 1: expected text in UTF-8, found b'name\\tl\\xf6ss'"),
        ("t.json", b'[{"name": "a"},\n{"name": "\xff"}]', "line 2: expected text in UTF-8, found b"),
        ("t.jsonl", b'{"name": "a"}\n{"name": "\xff"}\n', "line 2: expected text in UTF-8, found b"),
        (
            "t.csv",
            b"name,color\na,red\nb," + b"x" * 1_000_001 + b"\n",
            "row 2, column 'color': expected a row of at most 1,000,000 bytes, found 1,000,002, 1,000,001",
        ),
        ("t.csv", b"name,color\na,red,12\n", "a row has more cells than there are columns"),
        ("t.tsv", b"name\tcolor\na\tred\t12\n", "a row has more cells than there are columns"),
        ("t.json", b"nope", "cannot be read as a table"),
        ("t.json", b'[{"name": "a", "x": [1]}]', "cannot be made a table"),
        ("t.parquet", b"nope", "cannot be read as a table"),
        ("t.xml", b"<a/>", "a table of the kind '.xml'; expected .csv"),
        ("t.db", b"no database at all, whatever it is called", "cannot be read as a SQLite database"),
        ("t.csv", None, "no such file; task.database takes a table"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AgileError, match=message) as error:
        open_table(path)
    assert str(path) in str(error.value)


def test_a_database_with_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE wines (name, color)")
        connection.execute("INSERT INTO wines VALUES ('a', 'red'), ('b', CAST(x'6cf6' AS TEXT))")
    with pytest.raises(AgileError, match=r"t.sqlite, row 2, column 'color': expected text in UTF-8, found 'l\\udcf6'"):
        open_table(path)


def test_a_database_of_several_tables_says_which(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE a (name, price)")
        connection.execute("INSERT INTO a VALUES ('x', 1)")
        connection.execute("CREATE TABLE b (name)")
    with pytest.raises(AgileError, match=r"found \['a', 'b'\]. Make a view"):
        open_table(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE VIEW products AS SELECT * FROM a")
    assert open_table(path).rows == {"x": {"name": "x", "price": "1"}}
    questions = write(tmp_path, [{"question": "?", "answer": ["x"], "sql": "SELECT name FROM products"}])
    task = JsonlTask(questions, questions, database=path)
    assert task.tool_answer(task.streams("test")[0].items[0]) == "x"
