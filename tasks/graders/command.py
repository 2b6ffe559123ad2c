"""`agile grade`: what it reads and prints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agile.errors import AgileError
from agile.tasks.graders.grading import Function, Grading, complete_sample, import_function
from agile.tasks.graders.models import Grader, LabelModel, Multi, ScoreModel, load_grader, notes, read_json
from agile.tasks.graders.result import Grade
from agile.tasks.graders.sandbox import Limits

Case = tuple[dict[str, Any], dict[str, Any]]  # sample, item


def validate(path: Path, console: Console, *, as_json: bool) -> None:
    """Say that a grader file can be used, and what of it may not be meant.

    Raises:
        AgileError: It cannot.
    """
    grader = load_grader(path)
    remarks = list(notes(grader))
    if as_json:
        console.print_json(json.dumps({"grader": grader.model_dump(mode="json", exclude_none=True), "notes": remarks}))
        return
    what = f"multi of {', '.join(grader.graders)}" if isinstance(grader, Multi) else grader.type
    console.print(Text.assemble(("Valid: ", "bold green"), f"{path}, {grader.name} ({what})"), soft_wrap=True)
    for remark in remarks:
        console.print(Text.assemble(("Note: ", "bold yellow"), remark), soft_wrap=True)


def run(
    grader: Grader | Function,
    cases: Sequence[Case],
    *,
    base_url: str,
    api_key_env: str | None,
    cache: Path | None,
    limits: Limits,
) -> list[Grade]:
    """The grades of samples, in their order.

    Raises:
        AgileError: See `Grading.grade`.
    """

    async def grade_all() -> list[Grade]:
        endpoint = None
        if asks_model(grader):
            from agile.policies.endpoint import Endpoint  # takes a second to import

            endpoint = Endpoint(base_url, "", api_key_env=api_key_env, cache=cache, section="the endpoint's settings")
        async with Grading(endpoint, limits) as grading:
            return list(await asyncio.gather(*(grading.grade(grader, sample, item) for sample, item in cases)))

    return asyncio.run(grade_all())


def find_grader(name: str) -> Grader | Function:
    """The grader in a file, or the function of a dotted path, `module.function`.

    Raises:
        AgileError: There is neither, or it cannot be used.
    """
    path = Path(name).expanduser()
    if path.suffix != ".json" and not path.exists() and "." in name and all(p.isidentifier() for p in name.split(".")):
        return import_function(name)
    return load_grader(path)


def read_cases(path: Path) -> list[Case]:
    """Samples of a JSON file or of JSON lines, `{"model_sample": TEXT, "item": {...}}`; `sample` is the same.

    Raises:
        AgileError: The file cannot be read, or holds something else; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AgileError(f"Cannot read the sample {path}: {error}. Give a JSON file, or JSON lines.") from None
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        lines = [(str(path), text)]
    if not lines:
        raise AgileError(f'{path} is empty: expected lines such as {{"model_sample": "...", "item": {{}}}}.')
    return [_case(read_json(line, where), where) for where, line in lines]


def _case(value: Any, where: str) -> Case:
    keys = {"sample", "model_sample"} & value.keys() if isinstance(value, dict) else set()
    if len(keys) != 1:
        raise AgileError(
            f'{where}: expected an object with model_sample, such as {{"model_sample": "what the model wrote", "item": '
            '{"answer": "..."}}.'
        )
    if strange := value.keys() - {"sample", "model_sample", "item"}:
        raise AgileError(f"{where}: {min(strange)!r} is unknown; what templates read as item.X stands in item.")
    item = value.get("item", {})
    if not isinstance(item, dict):
        raise AgileError(f"{where}: item is {json.dumps(item)[:80]}, expected an object.")
    try:
        return complete_sample(value[keys.pop()]), item
    except AgileError as error:
        raise AgileError(f"{where}: {error}") from None


def print_grades(grades: Sequence[Grade], console: Console) -> None:
    """One grade in full, or a line for each of several and their mean."""
    if len(grades) > 1:
        table = Table("", "reward", "errors")
        for number, grade in enumerate(grades, 1):
            table.add_row(str(number), f"{grade.reward:.4g}", Text("; ".join(grade.errors.details), "red"))
        console.print(table)
        wrong = sum(bool(g.errors.kinds) for g in grades)
        mean = sum(g.reward for g in grades) / len(grades)
        console.print(f"{len(grades):,} samples, mean reward {mean:.4g}, {wrong:,} with errors", highlight=False)
        return
    (grade,) = grades
    console.print(
        Text.assemble(("reward ", "bold"), (f"{grade.reward:.6g}", "bold cyan"), f"  {grade.name} ({grade.type})")
    )
    if grade.sub_rewards:
        table = Table("", "reward", "")
        for name, reward in grade.sub_rewards.items():
            score = grade.to_json()["metadata"]["scores"].get(name, {})
            table.add_row(name, f"{reward:.4g}", Text(", ".join(f"{k} {_brief(v)}" for k, v in score.items())))
        console.print(table)
    elif grade.scores:
        console.print(Text(", ".join(f"{k} {_brief(v)}" for k, v in grade.scores.items())))
    tokens = f", {grade.to_json()['metadata']['token_usage']:,} tokens" if grade.token_usage else ""
    console.print(f"{grade.execution_time_s:.2f} s{tokens}", style="dim")
    for kind in grade.errors.kinds:
        console.print(Text(kind, "bold red"))
    for detail in grade.errors.details:
        console.print(Text(f"  {detail}"), soft_wrap=True)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_brief(v)}" for k, v in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def asks_model(grader: Grader | Function) -> bool:
    """Whether a grader needs an endpoint."""
    parts = grader.graders.values() if isinstance(grader, Multi) else [grader]
    return any(isinstance(part, ScoreModel | LabelModel) for part in parts)
