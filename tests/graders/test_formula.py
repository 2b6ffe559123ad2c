"""Formulas: the grammar, its precedence, and that nothing else gets through."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agile.tasks.graders.formula import FormulaError, evaluate, names_in, parse_formula

VALUES = {"a": 0.5, "b": 2.0, "zero": 0.0, "a_b1": 7.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 0.5),
        ("1", 1.0),
        (" 0.5 * a\n + 0.5 * b ", 1.25),
        ("a + b * 2 - 1 / 2", 4.0),
        ("2 ^ 3 ^ 2", 512.0),
        ("-2 ^ 2", -4.0),
        ("(-2) ^ 2", 4.0),
        ("2^-1", 0.5),
        ("+a - -b", 2.5),
        ("min(a, b)", 0.5),
        ("max(a, b, 3)", 3.0),
        ("min(a)", 0.5),
        ("abs(-b)", 2.0),
        ("floor(a) + ceil(a)", 1.0),
        ("exp(0) + log(exp(1)) + sqrt(4)", 4.0),
        ("a_b1 / b", 3.5),
        ("1e-3 * 1000", 1.0),
        (" + ".join(["a"] * 300), 150.0),
    ],
)
def test_formulas_have_their_value(text: str, expected: float) -> None:
    assert evaluate(parse_formula(text, VALUES), VALUES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no formula"),
        ("a +", "is no formula"),
        ("a b", "is no formula"),
        ("a ** b", "write ^ for a power"),
        ("a // b", "expected numbers"),
        ("c", "uses 'c'; the graders are a, b"),
        ("min", "uses 'min'"),
        ("sum(a, b)", "calls 'sum'"),
        ("abs(a, b)", "gives abs 2 arguments"),
        ("min()", "gives min 0 arguments"),
        ("__import__('os')", 'holds "\'"'),
        ("a.real", "holds 'a.real'"),
        ("a if b else 1", "holds 'a if b else 1'"),
        ("a, b", "holds '(a, b)'"),
        ("a < b", "holds '<'"),
        ("a or b", "holds 'a or b'"),
        ("not a", "holds 'not a'"),
        ("True", "holds 'True'"),
        ("1j", "holds '1j'"),
        ("lambda: 1", "holds ':'"),
        ("min(*a)", "expected numbers"),
        ("[a][0]", "holds '['"),
        ("a % b", "holds '%'"),
        ("(" * 500 + "a" + ")" * 500, ""),
        ("-" * 20_000 + "a", "at most 10,000"),
    ],
)
def test_what_is_no_formula_is_refused(text: str, said: str) -> None:
    with pytest.raises(FormulaError) as caught:
        parse_formula(text, VALUES)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["1 / zero", "log(zero)", "sqrt(-1)", "(-8) ^ 0.5", "9 ^ 9 ^ 9", "exp(1000)", "1e999"])
def test_what_has_no_finite_value_is_an_error(text: str) -> None:
    with pytest.raises(FormulaError):
        evaluate(parse_formula(text, VALUES), VALUES)


def test_names_are_those_of_graders() -> None:
    assert names_in(parse_formula("min(a, b) + a", VALUES)) == {"a", "b"}


@given(st.text(alphabet="ab.,()+-*/^ 019emin", max_size=30))
def test_any_text_gives_a_finite_number_or_a_formula_error(text: str) -> None:
    try:
        result = evaluate(parse_formula(text, VALUES), VALUES)
    except FormulaError:
        return
    assert math.isfinite(result)
