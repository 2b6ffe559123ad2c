"""Grader files: what each type holds, and errors that name field, value, what was expected, and a remedy."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from agile.errors import AgileError
from agile.tasks.graders.formula import FUNCTIONS, names_in, parse_formula
from agile.tasks.graders.template import parse

MAX_SOURCE_BYTES = 256 * 1000


def _template(text: str) -> str:
    parse(text)
    return text


Template = Annotated[str, AfterValidator(_template)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Metric = Literal[
    "cosine",
    "fuzzy_match",
    "bleu",
    "gleu",
    "meteor",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StringCheck(_Part):
    """1 if the check holds, else 0."""

    type: Literal["string_check"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    input: Template = Field(description="the text that is checked, such as {{ sample.output_text }}")
    reference: Template = Field(description="the text it is compared with, such as {{ item.answer }}")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="equal, not equal, contains the reference, or contains it in any case"
    )


class TextSimilarity(_Part):
    """Likeness in [0, 1]."""

    type: Literal["text_similarity"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    input: Template = Field(description="the text that is graded, such as {{ sample.output_text }}")
    reference: Template = Field(description="the text it is compared with, such as {{ item.answer }}")
    evaluation_metric: Metric = Field(description="how likeness is measured")
    pass_threshold: Finite | None = Field(None, description="from where on metadata.scores says that it passed")


class TextContent(_Part):
    type: Literal["input_text", "output_text", "text"]
    text: Template


class ImageContent(_Part):
    type: Literal["input_image"]
    image_url: Template
    detail: Literal["auto", "low", "high"] | None = None


class AudioContent(_Part):
    type: Literal["input_audio"]
    input_audio: Mapping[str, str]


Content = Annotated[TextContent | ImageContent | AudioContent, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    """A text, a part, or a list of either, as a list of parts."""
    contents = content if isinstance(content, list) else [content]
    return [{"type": "text", "text": c} if isinstance(c, str) else c for c in contents]


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="system, user or assistant")
    content: Annotated[tuple[Content, ...], BeforeValidator(_parts)] = Field(
        min_length=1, description="text, or a list of parts"
    )
    type: Literal["message"] | None = None


class SamplingParams(_Part):
    max_completions_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None
    seed: int | None = None
    temperature: Finite | None = Field(None, ge=0)
    top_p: Finite | None = Field(None, gt=0, le=1)


class _ModelGrader(_Part):
    name: str = Field(min_length=1, description="what the grader is called in results")
    model: str = Field(min_length=1, description="the model that grades, as its endpoint names it")
    input: tuple[Message, ...] = Field(
        min_length=1, description='messages, such as [{"role": "user", "content": "Rate {{ sample.output_text }}"}]'
    )
    sampling_params: SamplingParams | None = None


class ScoreModel(_ModelGrader):
    """The number that a model gives, held within the range."""

    type: Literal["score_model"]
    range: Annotated[tuple[Finite, Finite], BeforeValidator(lambda given: given or (0.0, 1.0))] = (0.0, 1.0)
    pass_threshold: Finite | None = Field(None, description="from where on metadata.scores says that it passed")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.range
        if low >= high:
            raise _at("range", f"is [{low:g}, {high:g}]: expected the lower end first, as [0, 1]")
        return self


class LabelModel(_ModelGrader):
    """1 if a model gives a passing label, else 0."""

    type: Literal["label_model"]
    labels: tuple[str, ...] = Field(min_length=1, description="what the model chooses from")
    passing_labels: tuple[str, ...] = Field(min_length=1, description="which of the labels are worth 1")

    @model_validator(mode="after")
    def _labels(self) -> Self:
        if strange := [label for label in self.passing_labels if label not in self.labels]:
            raise _at("passing_labels", f"holds {strange[0]!r}: expected some of labels, {', '.join(self.labels)}")
        if len({label.strip().lower() for label in self.labels}) < len(self.labels):
            raise _at("labels", f"is {list(self.labels)}: expected labels that differ by more than case and spaces")
        return self


def _check_source(source: str) -> str:
    size = len(source.encode("utf-8", "replace"))
    if size >= MAX_SOURCE_BYTES:
        raise ValueError(f"it has {size:,} bytes; expected less than {MAX_SOURCE_BYTES:,}: move data into the items")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise ValueError(f"it is no Python ({line}{getattr(error, 'msg', error)}); mend it") from None
    found = [node for node in ast.walk(tree) if _defines_grade(node)]
    if not found:
        raise ValueError("it does not define grade; add `def grade(sample, item) -> float:` at its top level")
    last = found[-1]
    if isinstance(last, ast.AsyncFunctionDef):
        raise ValueError(
            f"line {last.lineno}: grade is async; expected `def grade(sample, item)`, which may await by asyncio.run"
        )
    if isinstance(last, ast.FunctionDef) and not _takes_two(last.args):
        given = ast.unparse(last.args)
        raise ValueError(f"line {last.lineno}: grade takes ({given}); expected `def grade(sample, item)`")
    return source


def _defines_grade(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(name="grade") | ast.AsyncFunctionDef(name="grade"):
            return node.col_offset == 0
        case ast.Assign(targets=targets):
            return node.col_offset == 0 and any(isinstance(t, ast.Name) and t.id == "grade" for t in targets)
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return node.col_offset == 0 and any((n.asname or n.name) == "grade" for n in names)
    return False


def _takes_two(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    needed = positional - len(arguments.defaults)
    keywords = sum(default is None for default in arguments.kw_defaults)
    return needed <= 2 and keywords == 0 and (positional >= 2 or arguments.vararg is not None)


class PythonGrader(_Part):
    """What `grade(sample, item)` of its source returns, run in a confined process."""

    type: Literal["python"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    source: Annotated[str, AfterValidator(_check_source)] = Field(
        description="Python that defines grade(sample, item) -> float"
    )
    image_tag: str | None = Field(None, description="of the hosted service; here this environment's Python runs it")


class FieldRule(_Part):
    """How one field counts."""

    weight: Finite = Field(1.0, ge=0, description="share in the total, beside those of the other fields")
    tolerance: Finite = Field(0.0, ge=0, description="most by which two equal numbers differ")


class Structured(_Part):
    """Weighted mean of the fields' F1."""

    type: Literal["structured"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    input: Template = "{{ sample.output_json }}"
    reference: Template = Field(description="the right object, such as {{ item.answer }}, or JSON text")
    fields: Mapping[str, FieldRule] | None = Field(
        None, description="dotted paths that count; by default every field that either object has"
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.fields is not None and not any(rule.weight for rule in self.fields.values()):
            raise _at("fields", f"is {dict(self.fields)}: expected one with a weight above 0; leave it out for all")
        return self


class FunctionGrader(_Part):
    """What a Python function of yours returns for (sample, item), run in this process."""

    type: Literal["function"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    function: str = Field(description="dotted path, such as my_rewards.grade")

    @model_validator(mode="after")
    def _path(self) -> Self:
        module, _, name = self.function.rpartition(".")
        if not module or not all(part.isidentifier() for part in (*module.split("."), name)):
            raise _at("function", f"is {self.function!r}: expected MODULE.FUNCTION, such as my_rewards.grade")
        try:
            found = importlib.util.find_spec(module.partition(".")[0])
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise _at(
                "function",
                f"is {self.function!r}: there is no module {module.partition('.')[0]}; install it, "
                "or start in its folder with PYTHONPATH=.",
            )
        return self


Single = StringCheck | TextSimilarity | ScoreModel | LabelModel | PythonGrader | Structured | FunctionGrader


class Multi(_Part):
    """What a formula makes of several graders."""

    type: Literal["multi"]
    name: str = Field(min_length=1, description="what the grader is called in results")
    graders: Mapping[str, Annotated[Single, Field(discriminator="type")]] = Field(
        min_length=1, description="the graders by the names that the formula uses"
    )
    calculate_output: str = Field(description="the formula, such as 0.5 * a + 0.5 * b")

    @model_validator(mode="after")
    def _formula(self) -> Self:
        for name in self.graders:
            if not name.isidentifier() or name in FUNCTIONS:
                what = "the name of a function" if name in FUNCTIONS else "no name that a formula can hold"
                raise _at("graders", f"holds {name!r}: {what}; expected letters, digits and _, such as my_grader")
        try:
            parse_formula(self.calculate_output, list(self.graders))
        except ValueError as error:
            raise _at("calculate_output", str(error)) from None
        return self


Grader = StringCheck | TextSimilarity | ScoreModel | PythonGrader | Structured | FunctionGrader | Multi
TYPES: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in (StringCheck, TextSimilarity, ScoreModel, LabelModel, PythonGrader, Multi, Structured, FunctionGrader)
}
_INNER: dict[str, type[BaseModel]] = {"sampling_params": SamplingParams}


class _GraderError(ValueError):
    """Of one field, which is named."""


def _at(field: str, problem: str) -> ValueError:
    return _GraderError(f"{field} {problem}")


# --------------------------------------------------------------------------------------------------------------------


def load_grader(path: Path) -> Grader:
    """Read and check a grader file.

    Raises:
        AgileError: The file cannot be read, is no JSON, or holds no usable grader: see `parse_grader`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise AgileError(f"Cannot read the grader {path}: {error.strerror}. Give a JSON file.") from None
    except UnicodeDecodeError:
        raise AgileError(f"{path} is not UTF-8; save it as UTF-8.") from None
    return parse_grader(read_json(text, str(path)), str(path))


def read_json(text: str, where: str) -> Any:
    """JSON as the standard has it: no key twice in an object, no NaN.

    Raises:
        AgileError: It is not; with the line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise AgileError(
                f"{where}: the key {twice!r} stands twice in one object; only one would count. Rename one."
            )
        return found

    def no_constant(name: str) -> Any:
        raise AgileError(f"{where}: {name} is no JSON; expected a finite number.")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except ValueError as error:
        at = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        raise AgileError(f"{where} is no JSON ({at}). Mend it there.") from None
    except RecursionError:
        raise AgileError(f"{where} is nested too deeply to be read.") from None


def parse_grader(value: Any, where: str = "The grader") -> Grader:
    """A grader of its JSON value.

    Raises:
        AgileError: A line for each problem: the path of the field, what it holds, what was expected, the remedy.
    """
    if not isinstance(value, dict):
        raise AgileError(f"{where} is {_short(value)}: expected an object with type, one of {', '.join(TYPES)}.")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise AgileError(f"{where} cannot be used:\n  type {_type_problem(value)}")
    if kind == "label_model":
        raise AgileError(
            f"{where} is a label_model, which stands inside a multi only: write "
            '{"type": "multi", "name": "...", "graders": {"label": {...}}, "calculate_output": "label"}.'
        )
    try:
        grader: Grader = TypeAdapter[Any](TYPES[kind]).validate_python(value)
        return grader
    except ValidationError as error:
        # of a list whose members have problems pydantic also says that it is too short
        found = [dict(e) for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        problems = dict.fromkeys(_explain(e, value) for e in found)
        raise AgileError(f"{where} cannot be used:\n" + "\n".join(f"  {p}" for p in problems)) from None


def notes(grader: Grader) -> Iterator[str]:
    """What is allowed and may still not be meant."""
    parts: Mapping[str, Any] = grader.graders if isinstance(grader, Multi) else {"": grader}
    for name, part in parts.items():
        at = f"graders.{name}." if name else ""
        if isinstance(part, PythonGrader) and part.image_tag:
            yield f"{at}image_tag is not used: the Python of this environment runs the grader."
        if isinstance(part, FunctionGrader):
            yield f"{at}function is imported and run in this process, unconfined, when a sample is graded."
        for text in templates(part):
            if "{{" in "".join(p for p in parse(text) if isinstance(p, str)):
                yield f"{at}{_short(text)} holds {{{{ without }}}}: it stays as it is."
    if isinstance(grader, Multi):
        used = names_in(parse_formula(grader.calculate_output, list(grader.graders)))
        for name in grader.graders:
            if name not in used:
                yield f"graders.{name} is run, but calculate_output does not use it."


def templates(part: Any) -> Iterator[str]:
    """All templates of a grader."""
    for found in (getattr(part, "input", None), getattr(part, "reference", None)):
        if isinstance(found, str):
            yield found
        for message in found if isinstance(found, tuple) else ():
            yield from (getattr(content, "text", "") for content in message.content)


def _type_problem(value: Mapping[str, Any]) -> str:
    if "type" not in value:
        return f"is missing: expected one of {', '.join(TYPES)}."
    kind = value["type"]
    near = difflib.get_close_matches(str(kind), TYPES, n=1)
    return f"is {_short(kind)}: expected one of {', '.join(TYPES)}." + (f" Did you mean {near[0]!r}?" if near else "")


def _explain(error: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """One problem in a line."""
    path, kind = _path(error, value)
    name = ".".join(path).replace(".[", "[") or "the grader"
    given, what, context = error["input"], error["type"], error.get("ctx", {})
    if what == "missing":
        described = kind.model_fields[path[-1]].description if path[-1] in kind.model_fields else None
        return f"{name} is missing: add it" + (f", {described}." if described else ".")
    if what == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], kind.model_fields, n=1, cutoff=0.6)
        return f"{name} is unknown: " + (
            f"did you mean {near[0]}?" if near else f"expected {', '.join(kind.model_fields)}."
        )
    if what in ("union_tag_invalid", "union_tag_not_found"):
        if path[0] == "input":
            return f"{name}.type is {_short(given.get('type'))}: expected input_text, input_image or input_audio."
        if given.get("type") == "multi":
            return f"{name} is a multi inside a multi: put its graders and its formula into the outer one."
        return f"{name}.type {_type_problem(given)}"
    if isinstance(context.get("error"), _GraderError):  # of a field below, which it names
        return f"{name}.{context['error']}." if path else f"{context['error']}."
    message = error["msg"].removeprefix("Value error, ").partition(", unable")[0]
    message = re.sub("(Input|String|Tuple|Dictionary) should (be|have)", "expected", message).partition(" after")[0]
    if what == "literal_error":
        options = re.findall("'(.*?)'", context["expected"])
        near = difflib.get_close_matches(str(given), options, n=1, cutoff=0.4)
        message += f"; did you mean {near[0]!r}" if near else ""
    return f"{name} is {_short(given)}: {message}."


def _path(error: Mapping[str, Any], value: Mapping[str, Any]) -> tuple[list[str], type[BaseModel]]:
    """Where in the file (pydantic also names members of unions), and the model that holds it."""
    path: list[str] = []
    found: Any = value
    kind = TYPES[value["type"]]
    for step in error["loc"]:
        if step in (found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()):
            found = found[step]
        elif not (error["type"] == "missing" and step == error["loc"][-1]):
            continue
        path.append(f"[{step}]" if isinstance(step, int) else step)
        kind = _INNER.get(path[-1], kind) if isinstance(step, str) else (Message if path[-2] == "input" else kind)
        if len(path) == 2 and path[0] == "graders" and isinstance(found, dict):
            kind = TYPES.get(found.get("type", ""), Multi)
        if path[0] == "fields" and len(path) == 2:
            kind = FieldRule
    return path, kind


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
