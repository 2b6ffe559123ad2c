"""The formula of a `multi` grader: parsed into a tree of numbers, names and nine functions, never run as Python."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_MAX_LENGTH = 10_000
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: math.pow,
}
_ALLOWED = "numbers, names of graders, + - * / ^, parentheses and " + " ".join(FUNCTIONS)


class FormulaError(ValueError):
    """A formula that cannot be read, or that has no finite value."""


def parse_formula(text: str, names: Collection[str]) -> ast.expr:
    """The tree of a formula over these names. `^` is a power: `2 ^ 3 ^ 2` is 512, `-2 ^ 2` is -4; `log` is natural.

    Raises:
        FormulaError: It says what is wrong, and what may stand there.
    """
    if len(text) > _MAX_LENGTH:
        raise FormulaError(f"has {len(text):,} characters; at most {_MAX_LENGTH:,} are read")
    odd = re.search(r"[^\w\s.,()+\-*/^]|\*\s*\*|/\s*/", text)
    if odd is not None:
        remedy = "write ^ for a power" if "*" in odd[0] else f"expected {_ALLOWED}"
        raise FormulaError(f"{text!r} holds {odd[0]!r}; {remedy}")
    try:
        tree = ast.parse(" ".join(text.split()).replace("^", "**"), mode="eval").body
        _check(tree, names)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, FormulaError):
            raise FormulaError(f"{text!r} {error}") from None
        raise FormulaError(f"{text!r} is no formula; expected {_ALLOWED}") from None
    except (RecursionError, MemoryError):
        raise FormulaError(f"{text[:100]!r}... is nested too deeply; write it flatter") from None
    return tree


def names_in(tree: ast.expr) -> set[str]:
    """Names of graders that a formula uses."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - FUNCTIONS.keys()


def evaluate(tree: ast.expr, values: Mapping[str, float]) -> float:
    """The value of a parsed formula.

    >>> evaluate(parse_formula("0.5 * a + min(b, 1) ^ 2", ["a", "b"]), {"a": 1.0, "b": 0.5})
    0.75

    Raises:
        FormulaError: A division by zero, a root or logarithm of a negative number, or a value beyond floats.
    """
    try:
        result = float(_value(tree, values))
    except (ArithmeticError, ValueError) as error:
        raise FormulaError(f"cannot be computed ({error}) with {dict(values)}") from None
    if not math.isfinite(result):
        raise FormulaError(f"is {result} with {dict(values)}")
    return result


def _check(node: ast.expr, names: Collection[str]) -> None:
    """Raise `FormulaError` for all that is not in the grammar."""
    children: Sequence[ast.expr] = ()
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            pass
        case ast.Name(id=name):
            if name not in names:
                raise FormulaError(f"uses {name!r}; the graders are {', '.join(names)}")
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            children = [operand]
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            children = [left, right]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name not in FUNCTIONS:
                raise FormulaError(f"calls {name!r}; the functions are {', '.join(FUNCTIONS)}")
            if not arguments or (len(arguments) > 1 and name not in ("min", "max")):
                raise FormulaError(f"gives {name} {len(arguments)} arguments; min and max take some, all others one")
            children = arguments
        case _:
            raise FormulaError(f"holds {ast.unparse(node)!r}; expected {_ALLOWED}")
    for child in children:
        _check(child, names)


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=sign, operand=operand):
            inner = _value(operand, values)
            return -inner if isinstance(sign, ast.USub) else inner
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            numbers = [_value(a, values) for a in arguments]
            return FUNCTIONS[name](numbers) if name in ("min", "max") else FUNCTIONS[name](*numbers)
    raise AssertionError(f"_check lets {ast.dump(node)} through")
