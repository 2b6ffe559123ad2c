"""Templates of graders: `{{ item.answer }}`, `{{ sample.output_json.total }}`, `{{ sample.choices[0].message }}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMESPACES = ("item", "sample")
SAMPLE_VARIABLES = ("output_text", "output_json", "output_tools", "choices")

_BRACES = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_STEP = re.compile(r"""\.(?P<name>[\w-]+)|\[(?P<index>\d+)\]|\[(?P<quote>['"])(?P<key>.*?)(?P=quote)\]""")


class TemplateError(ValueError):
    """A template that no item and no sample could fill."""


class MissingVariable(LookupError):
    """A variable that this item or sample does not have."""


class UnreadableSample(ValueError):
    """`sample.output_json` of a sample that is no JSON."""


@dataclass(frozen=True, slots=True)
class Variable:
    """What stands between braces: `source` as written, and the steps from the namespace to the value."""

    source: str
    namespace: str
    path: tuple[str, ...]


def parse(text: str) -> tuple[str | Variable, ...]:
    """Literal text and variables in order; empty text is left out.

    >>> parse("It is {{ item.price[0] }}.")
    ('It is ', Variable(source='{{ item.price[0] }}', namespace='item', path=('price', '0')), '.')

    Raises:
        TemplateError: Unknown namespace, no variable, an unknown variable of the sample, or no path.
    """
    parts: list[str | Variable] = []
    end = 0
    for match in _BRACES.finditer(text):
        parts += [text[end : match.start()], _variable(match[0], match[1].strip())]
        end = match.end()
    return tuple(part for part in [*parts, text[end:]] if part != "")


def render(text: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """The text with its variables filled in: text as it is, all else as JSON. What was filled in is not read again.

    Raises:
        TemplateError: See `parse`.
        MissingVariable: The item or the sample lacks a variable.
        UnreadableSample: The sample is no JSON, and its `output_json` is asked for.
    """
    values = (part if isinstance(part, str) else _look_up(part, item, sample) for part in parse(text))
    return "".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)


def value(text: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> Any:
    """The value itself where the template is a single variable; otherwise what `render` gives."""
    parts = parse(text.strip())
    if len(parts) == 1 and isinstance(parts[0], Variable):
        return _look_up(parts[0], item, sample)
    return render(text, item, sample)


def _variable(source: str, inside: str) -> Variable:
    namespace = re.match(r"[\w-]*", inside)
    assert namespace is not None  # it matches nothing at all, too
    rest, path = inside[namespace.end() :], []
    if namespace[0] not in NAMESPACES:
        raise TemplateError(
            f"{source} has the namespace {namespace[0]!r}; there are item and sample: write {{{{ item.NAME }}}} for a "
            "column of the data, {{ sample.output_text }} for what the model wrote"
        )
    while rest:
        step = _STEP.match(rest)
        if step is None:
            raise TemplateError(
                f"{source} cannot be read at {rest!r}; expected steps .name, [0] or ['name'] and nothing else, such as "
                "{{ item.answers[0].text }}"
            )
        path.append(next(step[group] for group in ("name", "index", "key") if step[group] is not None))
        rest = rest[step.end() :]
    if not path:
        raise TemplateError(f"{source} names no variable of {namespace[0]}; expected {{{{ {namespace[0]}.NAME }}}}")
    if namespace[0] == "sample" and path[0] not in SAMPLE_VARIABLES:
        raise TemplateError(f"{source}: a sample has {', '.join(SAMPLE_VARIABLES)}, not {path[0]!r}")
    return Variable(source, namespace[0], tuple(path))


def _look_up(variable: Variable, item: Mapping[str, Any], sample: Mapping[str, Any]) -> Any:
    found: Any = item if variable.namespace == "item" else sample
    if variable.namespace == "sample" and variable.path[0] == "output_json" and "output_json" not in sample:
        raise UnreadableSample(f"{variable.source}: the sample is no JSON, {str(sample.get('output_text'))[:200]!r}")
    for i, step in enumerate(variable.path):
        if isinstance(found, Mapping) and step in found:
            found = found[step]
        elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            where = ".".join((variable.namespace, *variable.path[:i]))
            has = f"has {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, Mapping) else _kind(found)
            raise MissingVariable(f"{variable.source}: {where} {has[:300]}, not {step!r}")
    return found


def _kind(found: Any) -> str:
    return f"is a list of {len(found)}" if isinstance(found, list) else f"is {json.dumps(found)}"
