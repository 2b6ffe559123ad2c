"""`agile rft`: what it is told, what it refuses, and that it learns."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from agile.errors import AgileError
from agile.rft_files import Files, hyperparameters, rft_config
from agile.tasks.graders.http import graders_app
from benchmarks.rft import write_files
from tests.graders.serving import serving
from tests.tiny import agile

ROOT = Path(__file__).parents[1]
TINY = (
    "threads=1", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "sft.num_steps=4",
    "rollout.max_action_tokens=20", "rollout.max_context_tokens=64",
)  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Files:
    write_files(tmp_path / "files", 0, num_rows=6, num_imitated=20)
    at = tmp_path / "files"
    return Files(at / "train.jsonl", at / "validation.jsonl", str(at / "grader.json"), imitate=at / "imitate.jsonl")


def options(files: Files) -> list[str]:
    given = {"train": files.train, "validation": files.validation, "grader": files.grader, "imitate": files.imitate}
    return [word for name, path in given.items() if path for word in (f"--{name}", str(path))]


def test_hyperparameters_of_the_hosted_api(files: Files) -> None:
    config = rft_config(
        files, ["n_epochs=7", "batch_size=4", "compute_multiplier=0.5", "learning_rate_multiplier=2", "eval_samples=3"]
    )
    ppo, validation = config.ppo, config.validation
    assert (ppo.num_iterations, ppo.streams_per_iteration, ppo.rollouts_per_stream, ppo.lr) == (14, 4, 4, 6e-4)
    assert (validation.every, validation.num_streams, config.sft.num_steps) == (2, 3, 1000)
    auto = rft_config(files, ["n_epochs=auto", "eval_interval=3"])
    assert (auto.ppo.num_iterations, auto.ppo.streams_per_iteration, auto.validation.every) == (20, 6, 3)
    assert (auto.ppo.estimator, auto.ppo.value_coef) == ("group", 0.0)


def test_words_of_the_config_win(files: Files) -> None:
    config = rft_config(files, ["n_epochs=7", "ppo.num_iterations=3", "rollout.max_context_tokens=99"])
    assert (config.ppo.num_iterations, config.rollout.max_session_tokens) == (3, 99)
    critic = rft_config(files, ["ppo.estimator=gae"]).ppo
    assert (critic.value_coef, critic.value_warmup_epochs) == (0.5, 4)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("n_epochs=0", "expected a whole number from 1"),
        ("batch_size=2.5", "expected a whole number from 1"),
        ("eval_interval=many", 'expected a whole number from 1, or "auto"'),
        ("compute_multiplier=-1", "expected a number above 0"),
        ("learning_rate_multiplier=inf", "expected a number above 0"),
    ],
)
def test_hyperparameters_that_are_none(word: str, said: str) -> None:
    with pytest.raises(AgileError, match=word) as caught:
        hyperparameters([word])
    assert said in str(caught.value)


def test_large_models_learn_slowly(files: Files, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 4096}')
    given: Any = {name: getattr(files, name) for name in Files.__slots__}
    assert rft_config(Files(**given | {"model": str(model)}), []).ppo.lr == 1e-6


def test_check_says_that_files_are_valid_or_what_is_not(files: Files) -> None:
    result = agile("rft", *options(files), "--check")
    assert (result.exit_code, result.output) == (0, "Valid: all rows, and the grader.\n")
    with files.train.open("a") as file:
        file.write('{"messages": []}\n')
    result = agile("rft", *options(files), "--check")
    assert result.exit_code == 2
    assert "train.jsonl, line 7: messages: expected a list of messages, found []" in result.output


def test_a_model_from_scratch_needs_something_to_imitate(files: Files, tmp_path: Path) -> None:
    result = agile("rft", *options(files)[:6], f"out={tmp_path / 'run'}")
    assert result.exit_code == 2
    assert "Give --model DIR, or --imitate FILE" in result.output


def test_what_does_not_fit_the_model_is_named_before_it_trains(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = agile("rft", *options(files), *TINY, "rollout.max_context_tokens=12", f"out={out}")
    assert result.exit_code == 2
    assert "more than rollout.max_context_tokens=12. Raise it" in result.output
    assert not out.exists()


@pytest.mark.slow
def test_a_run_from_files_to_a_report(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("n_epochs=2", "compute_multiplier=0.25", *TINY, f"out={out}")
    result = agile("rft", *options(files), *words)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert [point["iteration"] for point in report["course"]] == [0, 1, 2]
    assert all(point["validation"] is not None for point in report["course"])
    assert (report["rows"], report["iterations"]) == (6, 2)
    assert report["before"]["unfinished"] == 6 or report["before"]["errors"]
    assert "Mean reward" in (out / "report.html").read_text()
    assert (out / "rewards.png").stat().st_size > 1000
    assert "iteration    train  validation" in result.output
    again = agile("rft", *options(files), *words)
    assert again.exit_code == 2 and "holds a run already" in again.output
    assert agile("rft", *options(files), *words, "--resume").exit_code == 0
    assert json.loads((out / "report.json").read_text()) == report
    assert agile("replay", out).exit_code == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_script_ported_from_trl_learns_and_its_control_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_example(monkeypatch, "from_trl.py", tmp_path / "out")
    assert report["after"]["reward"] - report["before"]["reward"] > 0.2
    assert sampled(report, -2) - sampled(report, 0) > 0.2
    control = run_example(
        monkeypatch, "from_trl.py", tmp_path / "control", "--model", tmp_path / "out" / "run" / "sft", *SHUFFLED
    )
    assert sampled(control, -2) - sampled(control, 0) < 0.1


SHUFFLED = ("demo.shuffle_rewards=true",)


def sampled(report: dict[str, Any], at: int) -> float:
    """Mean reward of what was sampled in two iterations: each is of another half of the rows."""
    course: list[float] = [point["train"] for point in report["course"] if point["train"] is not None]
    return sum(course[at:][:2]) / 2


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, out: Path, *words: str | Path) -> dict[str, Any]:
    """What the report of a script says that is run as its users do, in this process."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *map(str, words)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    report: dict[str, Any] = json.loads((out / "run" / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_ported_from_the_hosted_api_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "sft.num_steps=20", "ppo.num_iterations=2"
    with serving(graders_app(lambda: pytest.fail("no model grades"))) as address:
        report = run_example(monkeypatch, "hosted_rft.py", tmp_path / "out", "--graders", f"{address}/v1", *few)
    assert report["iterations"] == 2
    assert "half of it is right: 0.5, {'device': 1.0, 'urgent': 0.0}" in capsys.readouterr().out
