"""YAML files and `a.b=value` overrides into a `RunConfig`, and errors that name the nearest right key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agile.config.run import RunConfig
from agile.errors import AgileError

C = TypeVar("C", bound=BaseModel)

_PACKAGE = Path(__file__).parent.parent


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file of a run, apply `a.b=value` overrides and check the result.

    `configs/NAME.yaml` is the file of the package where the folder that one works in has none.

    Raises:
        AgileError: The file is missing or not YAML, a key is unknown (with the nearest right one), a value is wrong.
    """
    return load_section(RunConfig, path, overrides)


def load_section(kind: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """`load_config` for a config of another kind."""
    values = {} if path is None else _read(kind, path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise AgileError(f"{override!r} is not of the form a.b=value, for example ppo.lr=1e-4.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise AgileError(f"{override!r}: {text!r} is not YAML; write a list as [a, b], quote odd text.") from None
        _set(values, key.split("."), value, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        source = "The config" if path is None else f"The config {path}"
        changed = " with " + " ".join(overrides) if overrides else ""
        raise AgileError(f"{source}{changed} cannot be used:\n{explained(kind, error)}") from None


def explained(kind: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with a config of this kind, a problem a line."""
    return "\n".join(f"  {_explain(kind, e)}" for e in error.errors())


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """`key was ..., is now ...` of every value that differs between two configs of one kind."""
    before, after = (dict(flat(c.model_dump(mode="json"))) for c in (old, new))
    keys = dict.fromkeys([*before, *after])  # a section that may be null has keys in one of them only
    return [f"{k} was {before.get(k)!r}, is now {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(a.b, value)` of every value of a config, as `model_dump` gives it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-4 is a number and that no key may stand twice: one of the two would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789")


def _read(kind: type[BaseModel], path: Path) -> dict[str, Any]:
    shipped = path.parts[:1] == ("configs",) and not path.exists() and (_PACKAGE / path).is_file()
    try:
        loaded = yaml.load((_PACKAGE / path if shipped else path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise AgileError(f"Cannot read the config {path}: {error.strerror}. Give a YAML file, see configs/.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AgileError(f"{path} is not YAML: {error}. Expected sections of keys, see configs/.") from None
    if not isinstance(loaded, dict | None):
        raise AgileError(f"{path} holds a {type(loaded).__name__}, expected a mapping of sections (task:, ppo:, ...).")
    # a section whose keys are all commented out is read as null
    empty: dict[str, Any] = {k: {} for k, f in kind.model_fields.items() if isinstance(f.default, BaseModel)}
    return {k: empty.get(k) if v is None else v for k, v in (loaded or {}).items()}


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise AgileError(f"{override!r}: {key} is a value, not a section. See configs/ for what a config holds.")
    values[keys[-1]] = value


def _explain(kind: type[BaseModel], error: Any) -> str:
    """One problem in a line: the key, its value, what was expected, and what to write instead."""
    keys = [str(k) for k in error["loc"] if not isinstance(k, int)]
    name = ".".join(keys) or "the file"
    if error["type"] == "extra_forbidden":
        return f"Unknown key {name}. {_nearest(kind, keys)}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "value_error":  # of several keys; it says itself which
        return f"{name}: {message}."
    if error["type"] == "model_type":
        fields = list(_section(kind, keys).model_fields)
        return (
            f"{name} is {error['input']!r}: expected a section of keys, {', '.join(fields)}; for example "
            f"{name}.{fields[0]}=..."
        )
    section = _section(kind, keys[:-1])
    default = section.model_fields[keys[-1]].default if keys else None
    if error["type"] == "tuple_type":
        message = "expected a list, [a, b]"
    message = message.partition(", unable to")[0]  # to parse or interpret: the value says so itself
    default = list(default) if isinstance(default, tuple) else default
    return f"{name} is {error['input']!r}: {message}." + ("" if default is None else f" The default is {default!r}.")


def _section(kind: type[BaseModel], keys: Sequence[str]) -> Any:
    """The model of a section, one that may be null included."""
    section: Any = kind
    for key in keys:
        if key not in section.model_fields:  # a name in a dict of sections
            continue
        found = section.model_fields[key].annotation
        section = next((k for k in get_args(found) if isinstance(k, type) and issubclass(k, BaseModel)), found)
    return section


# what other trainers call it
OTHER_NAMES = {"micro_batch_size": "micro_batch_tokens", "learning_rate": "lr", "epochs": "num_epochs"}


def _nearest(kind: type[BaseModel], keys: Sequence[str]) -> str:
    """Which key may have been meant: one of that name in another section, else a similar one in this section."""
    section = _section(kind, keys[:-1])
    here = [name for name in [OTHER_NAMES.get(keys[-1], "")] if name in section.model_fields]
    elsewhere = [key for key, _ in flat(kind.model_construct().model_dump()) if key.split(".")[-1] == keys[-1]]
    similar = here or difflib.get_close_matches(keys[-1], section.model_fields, n=1, cutoff=0.5)
    near = elsewhere if elsewhere and not here else [".".join([*keys[:-1], key]) for key in similar]
    return f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(section.model_fields)}."
