"""Questions in HotPotQA's format, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row(number: int = 0, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "_id": f"q{number}",
        "question": "Which river runs through the capital of France?",
        "answer": "the Seine",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [["France", 0], ["Paris", 1], ["Paris", 0]],
        "context": [
            ["Berlin", ["Berlin is the capital of Germany.", " The Spree runs through it."]],
            ["France", ["France is a country.", " Its capital is Paris."]],
            ["Paris", ["Paris is a city.", " The Seine runs  through it."]],
        ],
    }
    return made | fields


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
