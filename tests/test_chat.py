"""`agile chat`: the agent answers in a terminal, whoever types is its expert, and it remembers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from agile.agents.product_qa import SPEC
from agile.memory.encoders import make_encoder
from agile.memory.store import SqliteMemory
from agile.policies import ScriptedPolicy
from agile.tokens import ActionCodec
from agile.types import Action, MemoryKind
from tests.tiny import TinyRun, agile

QUESTION = "is it heavy ?"


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run.path, tmp_path / "run")


@pytest.fixture
def scripted(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], Action]], None]:
    """Puts a script in the place of the trained model."""
    codec = ActionCodec(PreTrainedTokenizerFast.from_pretrained(run / "ppo"), SPEC)

    def install(decide: Callable[[str], Action]) -> None:
        monkeypatch.setattr("agile.build.Setup.policy", lambda *args, **kwargs: ScriptedPolicy(codec, decide))

    return install


def ask_once(context: str) -> Action:
    """Say what memory holds of this product's same question, else ask; reflect nothing."""
    if context.rstrip().endswith("[Reflection]"):
        return Action("Reflection", "none")
    known = [line for line in context.splitlines() if "same" in line.split() and QUESTION in line]
    if "answer:" in context:
        return Action("PredictAnswer", context.rsplit("answer:", 1)[1].split()[0])
    if "1.00 same" in context or known:
        return Action("PredictAnswer", context.rsplit("->", 1)[1].split()[0])
    return Action("SeekAdvice")


def remembered(path: Path) -> list[tuple[str, str, str]]:
    with SqliteMemory(make_encoder("hashing"), path) as memory:
        return [(e.text, e.origin, e.session_id) for e in memory.items() if e.kind is MemoryKind.HISTORY]


def questions(run: Path) -> list[dict[str, str]]:
    path = min((run / "minishop" / "test").iterdir()) / "qa.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_asks_its_expert_once_and_remembers_in_the_next_talk(
    run: Path, scripted: Callable[[Callable[[str], Action]], None]
) -> None:
    scripted(ask_once)
    first = agile("chat", run, stdin=f"{QUESTION}\nyes\n{QUESTION}\n")
    assert first.exit_code == 0, first.output
    assert first.output.count("Your advice, please") == 1
    assert "It asked you, and wrote 1 entries" in first.output
    assert "did not ask" in first.output
    assert remembered(run / "chat.sqlite") == [(f"{QUESTION} -> yes", "advice", "chat/0")]

    second = agile("chat", run, stdin=f"{QUESTION}\n/memory\n/quit\nis it read ?\n")
    assert second.exit_code == 0, second.output
    assert "Your advice, please" not in second.output
    assert f"{QUESTION} -> yes" in second.output
    assert "is it read" not in second.output and second.output.count("did not ask") == 1


def test_what_it_learns_of_one_product_is_of_this_product(
    run: Path, scripted: Callable[[Callable[[str], Action]], None]
) -> None:
    scripted(ask_once)
    names = list(dict.fromkeys(item["asin"] for item in questions(run)))
    result = agile("chat", run, stdin=f"{QUESTION}\nyes\n/product {names[1]}\n{QUESTION}\nno\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("Your advice, please") == 2
    assert [text for text, _, _ in remembered(run / "chat.sqlite")] == [f"{QUESTION} -> yes", f"{QUESTION} -> no"]


@pytest.mark.parametrize("reply", ["\n", ""], ids=["empty line", "end of file"])
def test_expert_who_does_not_know(run: Path, scripted: Callable[[Callable[[str], Action]], None], reply: str) -> None:
    def decide(context: str) -> Action:
        if context.rstrip().endswith("[Reflection]"):
            return Action("Reflection", "none")
        return Action("PredictAnswer", "no") if "no advice" in context else Action("SeekAdvice")

    scripted(decide)
    result = agile("chat", run, stdin=f"{QUESTION}\n{reply}")
    assert result.exit_code == 0, result.output
    assert "goes on without your advice" in result.output
    assert remembered(run / "chat.sqlite") == []


def test_malformed_session_is_reported_calmly(run: Path, scripted: Callable[[Callable[[str], Action]], None]) -> None:
    scripted(lambda context: Action("SubmitAnswer"))
    result = agile("chat", run, stdin=f"{QUESTION}\n{QUESTION}\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("It has no answer (invalid_action:") == 2
    assert "Traceback" not in result.output


def test_search_is_shown(run: Path, scripted: Callable[[Callable[[str], Action]], None]) -> None:
    def decide(context: str) -> Action:
        if "[SearchProduct]" not in context:
            return Action("SearchProduct", "SELECT product_id FROM products WHERE color = 'red' LIMIT 1")
        return Action("PredictAnswer", "none")

    scripted(decide)
    result = agile("chat", run, stdin="find me a red one\n")
    assert "[SearchProduct] SELECT product_id" in " ".join(result.output.split())


def test_commands(run: Path, scripted: Callable[[Callable[[str], Action]], None]) -> None:
    scripted(ask_once)
    rows = questions(run)
    result = agile("chat", run, stdin="/help\n/examples\n/products\n/product nowhere\n/nonsense\n\n/memory\n")
    assert result.exit_code == 0, result.output
    own = next(row["question"] for row in rows if row["asin"] == rows[0]["asin"])
    assert own in result.output
    assert "There are " + rows[0]["asin"] in result.output
    assert result.output.count("/product NAME") == 3  # at the start, /help, /nonsense
    assert "0 entries in" in result.output


def test_what_is_typed_is_text_not_markup(run: Path, scripted: Callable[[Callable[[str], Action]], None]) -> None:
    scripted(ask_once)
    result = agile("chat", run, stdin="is it [bold]frobnic[/bold] :smile: ?\n[red]yes\n/memory\n")
    assert result.exit_code == 0, result.output
    assert "It has never seen: [bold]frobnic[/bold] :smile:" in result.output
    assert "is it [bold]frobnic[/bold] :smile: ? -> [red]yes" in result.output


def test_trained_model_talks(run: Path) -> None:
    """Ten steps of imitation: whatever it emits, the talk goes on and nothing else is printed."""
    result = agile("chat", run, "--memory", run / "other.sqlite", stdin=f"{QUESTION}\n\n{QUESTION}\n\n/memory\n")
    assert result.exit_code == 0, result.output
    assert "entries in" in result.output and "Traceback" not in result.output
    assert (run / "other.sqlite").exists() and not (run / "chat.sqlite").exists()


def test_run_folder_by_out(run: Path) -> None:
    assert agile("chat", f"out={run}", stdin="/quit\n").exit_code == 0


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def refused(*words: str | Path) -> str:
    result = agile("chat", *words, stdin="")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_no_trained_agent(tmp_path: Path) -> None:
    assert "no trained agent" in refused(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sft").mkdir()
    assert "agile demo" in refused(tmp_path)


def test_run_of_another_version(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "tsak: {}\n")
    message = refused(run)
    assert f"{run / 'config.yaml'}" in message and "Did you mean task?" in message


def test_memory_of_another_encoder(run: Path) -> None:
    class Other:
        name = "other"
        dim = 256
        encode = staticmethod(make_encoder("hashing").encode)

    SqliteMemory(Other(), run / "chat.sqlite").close()
    assert "was written with the encoder 'other'" in refused(run)


def test_memory_that_is_none(run: Path) -> None:
    (run / "notes.txt").write_text("not a database, but longer than the header of one" * 10)
    assert "notes.txt" in refused(run, "--memory", run / "notes.txt")


def test_imitation_alone_can_be_talked_to(run: Path) -> None:
    shutil.rmtree(run / "ppo")
    assert str(run / "sft") in agile("chat", run, stdin="").output.replace("\n", "")
