"""The command line: help that teaches, errors on one screen, the demo from its first line to its last."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agile import __version__
from agile.config import load_config
from agile.demo import headline
from agile.tasks.productqa import ProductQA
from agile.types import to_json
from tests.tiny import TINY, TinyRun, agile

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "train", "bench", "chat", "show", "replay", "vllm-server", "minishop")


def one_line(text: str) -> str:
    return " ".join(text.split())


def refused(*words: str | Path) -> str:
    """The message of a command that a user can mend: exit code 2, one screen, no traceback."""
    result = agile(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 24
    return one_line(result.output)


# --------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_teaches(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = agile(command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert re.search(rf"• agile {command}\b", result.output), "no example"


def test_examples_of_the_help_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it tells users to type is understood, as far as it goes without their files."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    for command in COMMANDS:
        for example in re.findall(r"• (agile .+)", agile(command, "--help").output):
            words = [w for w in example.split()[2:] if "=" in w and not w.startswith("out=")]
            load_config(None, words)
            for path in re.findall(r"configs/\S+", example):
                assert (ROOT / path).exists(), example


def test_first_help_lists_the_commands() -> None:
    for result in (agile("--help"), agile()):
        assert [c for c in COMMANDS if c not in result.output] == []
        assert "agile demo" in one_line(result.output)


def test_version() -> None:
    assert agile("--version").output == f"agile {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, agile.cli; heavy = {'torch', 'transformers', 'deepspeed', 'faiss', 'numpy', 'yaml', 'pydantic'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "nowhere.yaml"], ["Cannot read the config nowhere.yaml", "configs/"]),
        (["train", "configs/demo.yaml", "ppo.lrr=1"], ["Unknown key ppo.lrr", "Did you mean ppo.lr?"]),
        (["demo", "ppo.lr=-1"], ["ppo.lr is -1", "greater than 0"]),
        (["demo", "ppo.lr"], ["'ppo.lr' is not of the form a.b=value"]),
        (["demo", "out="], ["out=DIR"]),
        (["bench", "configs/productqa-baselines.yaml"], ["task.data=DIR"]),
        (["bench", "configs/demo.yaml", "evaluate.baselines=[routr]"], ["'router'"]),
        (["minishop", "task.num_questions=0"], ["task.num_questions is 0"]),
        (["train"], ["Missing argument"]),
        (["demo", "--sed", "1"], ["No such option", "--seed"]),
        (["demmo"], ["No such command"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input(words: list[str], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    message = refused(*words)
    assert [part for part in parts if part not in message] == []
    assert [p.name for p in tmp_path.iterdir()] == ["configs"], "something was written"


def test_mistyped_config_is_answered_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from tests.tiny import agile; result = agile('train', 'nowhere.yaml'); "
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "2 False\n"


def test_error_text_is_text_not_markup(tmp_path: Path) -> None:
    assert "[bold]x[/bold]:smile:" in refused("train", "[bold]x[/bold]:smile:")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["task.name=productqa", "task.data={tmp}/none"], ["product_qa.db: no such file"]),
        (["model.path={tmp}/none"], ["Cannot load a tokenizer from", "none"]),
        (["rollout.max_context_tokens=8"], ["No imitation session was completed", "rollout.max_context_tokens (8)"]),
        (["out={tmp}/file/run"], ["Cannot write to", "out=DIR"]),
    ],
    ids=["data", "model", "limits", "folder"],
)
def test_training_that_cannot_start(words: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [word.format(tmp=tmp_path) for word in words]
    message = refused("train", "configs/demo.yaml", *TINY, f"out={tmp_path / 'run'}", *words)
    assert [part for part in parts if part not in message] == []


def test_interrupt_says_what_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agile.training.train", interrupted)
    result = agile("train", "configs/demo.yaml", f"out={tmp_path}")
    assert result.exit_code == 130
    assert "--resume" in result.output and "Traceback" not in result.output


# --------------------------------------------------------------------------------------------------------------------
# The demo


def test_demo_says_what_it_does_and_what_came_of_it(tiny_run: TinyRun) -> None:
    text = one_line(tiny_run.output)
    assert "learns on 3 small shops: 10 steps of imitation, 1 rounds of PPO" in text
    assert "under 12 minutes on 2 CPU cores" in text
    for name in ("oracle", "router", "PPO", "SFT", "never ask"):
        assert name in text
    assert "In a new shop the agent asks about" in text
    assert f"Report: {tiny_run.path / 'report.html'} Talk to it: agile chat {tiny_run.path}" in text


def test_demo_leaves_a_whole_run(tiny_run: TinyRun) -> None:
    left = {p.name for p in tiny_run.path.iterdir() if not p.name.startswith(".")}
    assert left == {
        *("config.yaml", "minishop", "sessions-0.jsonl", "metrics.jsonl", "tensorboard", "checkpoints", "sft", "ppo"),
        *("tracking.json", "report.json", "report.html", "report.png", "test-sft.jsonl", "test-ppo.jsonl"),
    }
    assert not [p for p in tiny_run.path.rglob(".*") if p.name != ".lock"], "a draft was left"


@pytest.mark.slow
def test_demo_again_needs_resume_which_makes_the_report_anew(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run.path, tmp_path / "run")
    assert "holds a run already" in refused("demo", f"out={run}", *TINY)
    before = json.loads((run / "report.json").read_text())
    (run / "report.json").unlink()
    result = agile("demo", f"out={run}", *TINY, "--resume")
    assert result.exit_code == 0, result.output
    after = json.loads((run / "report.json").read_text())
    for report in (before, after):
        for timed in (report, *report["agents"].values()):
            timed.pop("seconds", None)
    assert after == before
    assert "seed was 0, is now 1" in refused("demo", "--seed", "1", f"out={run}", *TINY, "--resume")


@pytest.mark.parametrize(
    ("words", "seed"),
    [([], 0), (["--seed", "3"], 3), (["seed=4"], 4), (["--seed", "3", "seed=4"], 4)],
    ids=lambda value: str(value),
)
def test_seed_of_the_demo(words: list[str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("agile.demo.run_demo", lambda config, out, console, resume: seen.append((config.seed, out)))
    assert agile("demo", *words, f"out={tmp_path}").exit_code == 0
    assert seen == [(seed, tmp_path)]


def test_out_is_expanded_and_the_last_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("agile.demo.run_demo", lambda config, out, console, resume: seen.append(out))
    for words in (["out=a", "out=~/b"], []):
        assert agile("demo", *words).exit_code == 0
    assert seen == [Path.home() / "b", Path("runs/demo")]


def summary(score: float, rates: list[float]) -> dict[str, object]:
    eighths = [
        {"from": i / 8, "to": (i + 1) / 8, "advice_rate": rate, "n": 10 * (i + 1)} for i, rate in enumerate(rates)
    ]
    return {"score": score, "by_position": eighths}


def test_headline_weighs_the_eighths_of_a_quarter() -> None:
    # first quarter: (.9 * 10 + .6 * 20) / 30, last: (.2 * 70 + .05 * 80) / 150
    ppo, sft = summary(0.85, [0.9, 0.6, 0, 0, 0, 0, 0.2, 0.05]), summary(0.8, [0.5] * 8)
    assert headline({"agents": {"sft": sft, "ppo": ppo, "router": {}}}) == (
        "In a new shop the agent asks about 70% of the first questions and 12% of the last (before PPO: 50% and 50%), "
        "and scores 0.850 (before: 0.800)."
    )
    assert headline({"agents": {"sft": sft}}).endswith("50% of the last; it scores 0.800.")
    assert headline({"agents": {"router": {}}}) == "No agent was scored."


# --------------------------------------------------------------------------------------------------------------------
# MiniShop


SMALL = ("task.num_train_worlds=1", "task.num_test_worlds=1", "task.num_questions=4")


def test_minishop_writes_worlds_that_can_be_read(tmp_path: Path) -> None:
    for words in (
        [tmp_path / "a"],
        [f"out={tmp_path / 'b'}"],
        [tmp_path / "c", "--seed", "0"],
        [tmp_path / "d", "seed=7"],
    ):
        result = agile("minishop", *words, *SMALL)
        assert result.exit_code == 0, result.output
        assert "1 train and 1 test worlds" in one_line(result.output)
    worlds = {name: to_json(ProductQA(tmp_path / name).streams("test")) for name in "abcd"}
    assert worlds["a"] == worlds["b"] == worlds["c"] != worlds["d"]


def test_minishop_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert agile("minishop", *SMALL).exit_code == 0
    assert (tmp_path / "runs" / "minishop" / "product_qa.db").exists()


def test_minishop_leaves_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        assert "is not an empty folder" in refused("minishop", target, *SMALL)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "mine")]


# --------------------------------------------------------------------------------------------------------------------
# Noise


@pytest.mark.slow
def test_users_see_only_our_own_lines(tmp_path: Path) -> None:
    """A run in a process of its own, with the real encoder: no library prints a bar, a warning or advice."""
    words = [w for w in TINY if not w.startswith("memory.encoder")]
    done = subprocess.run(
        [sys.executable, "-m", "agile.cli", "train", "configs/demo.yaml", *words, f"out={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert list(dict.fromkeys(line.split()[0] for line in lines)) == ["imitation", "PPO", "Trained:"]
