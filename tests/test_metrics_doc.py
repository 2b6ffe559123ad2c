"""docs/metrics.md explains what runs log."""

import re
from pathlib import Path

from agile.session_log import read_lines
from agile.types import SessionStatus
from tests.tiny import TinyRun

TEXT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
NAMED = {name for row in re.findall(r"^\| (`.+?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}


def test_every_metric_of_a_run_is_explained(tiny_run: TinyRun) -> None:
    logged = {key for line in read_lines(tiny_run.path / "metrics.jsonl") for key in line}
    assert logged <= NAMED, f"docs/metrics.md lacks {sorted(logged - NAMED)}"


def test_every_status_is_explained() -> None:
    assert {f"status/{status}" for status in SessionStatus} <= NAMED


def test_every_metric_says_what_is_healthy_and_what_to_do() -> None:
    """But for those that name a line: `stage` and `step`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| `")]
    bare = [row[0] for row in rows if len(row) < 5 or not all(row[-3:])]
    assert bare == ["`stage`", "`step`"], f"docs/metrics.md: no meaning, healthy value or remedy for {bare}"


def test_remedies_name_keys_that_exist() -> None:
    from agile.config import RunConfig, flat

    keys = {key for key, _ in flat(RunConfig.model_construct().model_dump())}
    sections = set(RunConfig.model_fields)
    for name in re.findall(r"`([a-z]+\.[a-z_]+)`", TEXT):
        assert name in keys or name.split(".")[0] not in sections, f"docs/metrics.md names {name}"
