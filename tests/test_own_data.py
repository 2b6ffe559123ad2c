"""The example of docs/your-own-data.md, as it stands there, run by a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agile.build import Setup
from agile.config import load_config

ROOT = Path(__file__).parents[1]


def example() -> str:
    (script,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "your-own-data.md").read_text(), re.DOTALL)
    return str(script)


def shell(script: str, folder: Path) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    command = f'agile() {{ "{sys.executable}" -m agile.cli "$@"; }}\nset -e\n{script}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_of_the_example_make_a_task(tmp_path: Path) -> None:
    assert len(example().splitlines()) <= 20
    shell(example().partition("agile bench")[0], tmp_path)
    words = [f"task.data={tmp_path / 'questions.jsonl'}", f"task.database={tmp_path / 'wines.csv'}"]
    setup = Setup(load_config(ROOT / "configs" / "own-data.yaml", words), tmp_path / "run")
    items = [i for split in ("train", "test") for s in setup.task.streams(split) for i in s.items]
    assert len(items) == 6
    for item in items[:2]:
        assert setup.task.is_correct(item, setup.task.tool_answer(item), True)
    shown = setup.agent.question(items[2], 0.0, 0.3)
    assert "columns: name , color , country , price" in shown and "name: Riesling" in shown
    assert "B: cool" in setup.agent.question(items[4], 0.0, 0.3)
    rows = setup.imitation_rows(setup.executor(setup.tokenizer()))
    assert len(rows) >= 5 * 4


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    shell(example(), tmp_path)
    report = json.loads((tmp_path / "runs" / "wines" / "report.json").read_text())
    assert {"sft", "ppo", "always_ask", "router"} <= set(report["agents"])
    assert all(agent["n"] == 1 for agent in report["agents"].values())
