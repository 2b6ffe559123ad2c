"""What counts as choosing an option, case by case."""

from __future__ import annotations

import pytest

from agile.tasks.choices import read_choice

METALS = {"A": "Iron", "B": "Copper sulphate", "C": "Zinc", "D": "Iron and zinc"}
BLOOD = {"A": "AB", "B": "A", "C": "O", "D": "B"}
CELLS = {"A": "T-cell lymphoma", "B": "Hodgkin's disease", "C": "B-cell lymphoma", "D": "A tumour of fat"}
NUMBERS = {"A": "2", "B": "3", "C": "4.6", "D": "4.6"}
PAIRS = {"A": "Only 1", "B": "Both A and C", "C": "Only 2", "D": "All of the above", "E": "None of the above"}


@pytest.mark.parametrize(
    "text", ["B", "b", " B ", "(b)", "(B)", "[B]", "B.", "B)", "b)", "B:", "**B**", "*B.*", '"B"', "'b'"]
)
def test_a_letter_alone(text: str) -> None:
    assert read_choice(text, METALS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "B: Copper sulphate",
        "B. copper  SULPHATE",
        "B) Copper sulphate.",
        "(b) Copper sulphate",
        "B - Copper sulphate",
        "B Copper sulphate",
        "**B**: Copper sulphate",
        "**B. Copper sulphate**",
        "B: blue vitriol, because it is blue",
        "(B) since iron is none",
        "B\nCopper sulphate",
        "\uff22",
    ],
)
def test_a_letter_and_words(text: str) -> None:
    assert read_choice(text, METALS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "**Answer:** B",
        "**Final answer:** (B) Copper sulphate",
        "\\boxed{B}",
        "So it is $\\boxed{\\text{B}}$.",
        "One might think that the answer is A. It is not. \\boxed{B}",
        "<answer>B</answer>",
        "<think>Is it A?</think>\n<answer> (b) </answer>",
        "<ANSWER>copper sulphate</ANSWER>",
        "B is correct",
        "(B) is the correct answer, since iron is none.",
        "I choose B",
        "I would choose option B.",
        "I'll go with (B).",
        "B,",
        "B, because it is blue",
        "B\n\nExplanation: iron would rust.",
        "**B**\n\nExplanation: A is a metal.",
        "Iron would rust, and zinc is a metal.\n\nB",
        "B:\nCopper sulphate",
        "Copper sulphate.\n\nIt is blue.",
        "The answer is\ncopper sulphate",
        "A: Iron is a metal.\nB: Copper sulphate is a salt.\nThe answer is B.",
    ],
)
def test_what_models_write_around_it(text: str) -> None:
    assert read_choice(text, METALS) == "B"


@pytest.mark.parametrize("text", ["Copper sulphate", "copper sulphate", " COPPER\tsulphate. ", '"Copper sulphate"'])
def test_the_words_of_an_option(text: str) -> None:
    assert read_choice(text, METALS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "The answer is B",
        "The answer is B.",
        "the answer is (b).",
        "The answer is: B",
        "The correct answer is B: Copper sulphate",
        "The correct answer is B because the others are metals.",
        "Answer: B",
        "answer: b",
        "ANSWER = B",
        "Ans-b",
        "Ans. B",
        "Option B",
        "Option B is correct",
        "The correct option is B.",
        "So the answer is option B.",
        "Therefore, the final answer is (B).",
        "Iron is a metal, and so is zinc. The answer is B.",
        "Iron would rust. Thus the correct answer is (B), not the others.",
        "The answer is B. I repeat: the answer is B.",
        "The answer is copper sulphate.",
        "My answer is **B**",
    ],
)
def test_words_before_it(text: str) -> None:
    assert read_choice(text, METALS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        ".",
        "E",
        "(e)",
        "E: Copper sulphate too",
        "The answer is E.",
        "2",
        "A or B",
        "A or option B",
        "A\nB",
        "B\nZinc",
        "B\n\nExplanation: the answer is A.",
        "A: Iron\nB: Copper sulphate\nC: Zinc",
        "Option A is wrong; the answer is B.",
        "\\boxed{A} or \\boxed{B}",
        "\\boxed{E}",
        "B <answer></answer>",
        "I choose a metal",
        "I choose A or B",
        "Neither A nor B is correct",
        "These are metals:\nIron\nZinc",
        "This is a salt.\nCopper sulphate\nIt is blue.",
        "A or B is correct",
        "A and B",
        "A, B",
        "A/B",
        "A & B",
        "(A) or (B)",
        "Both A and B",
        "AB",
        "B: Zinc",
        "(b) iron",
        "The answer is B: Zinc",
        "The answer is A or B",
        "The answer is A. No, the answer is B.",
        "The answer is not B",
        "A metal",
        "a metal that rusts",
        "The answer is a metal.",
        "not zinc",
        "Copper sulphate or zinc",
        "Copper",
        "I do not know",
        "none",
        "yes",
        "Bismuth",
        "error : expected one of",
        "I think it could be any of them",
    ],
)
def test_what_is_no_choice(text: str) -> None:
    assert read_choice(text, METALS) is None


@pytest.mark.parametrize(
    ("text", "options", "choice"),
    [
        ("A", BLOOD, "A"),  # the letter goes before the words
        ("AB", BLOOD, "A"),
        ("B: A", BLOOD, "B"),
        ("O", BLOOD, "C"),
        ("C: O", BLOOD, "C"),
        ("B-cell lymphoma", CELLS, "C"),
        ("The answer is B-cell lymphoma", CELLS, "C"),
        ("C: B-cell lymphoma", CELLS, "C"),
        ("B: B-cell lymphoma", CELLS, None),
        ("a tumour of fat", CELLS, "D"),
        ("The answer is a tumour of fat.", CELLS, "D"),
        ("Hodgkin's disease", CELLS, "B"),
        ("2", NUMBERS, "A"),
        ("3.", NUMBERS, "B"),
        ("4.6", NUMBERS, None),  # two options have these words
        ("C: 4.6", NUMBERS, "C"),
        ("D. 4.6", NUMBERS, "D"),
        ("both a and c", PAIRS, "B"),
        ("E", PAIRS, "E"),
        ("(e) None of the above", PAIRS, "E"),
        ("All of the above", PAIRS, "D"),
        ("E: All of the above", PAIRS, None),
        ("D: Iron and\nzinc", METALS, "D"),
        ("Iron and\nzinc", METALS, "D"),
        ("The answer is A b", {"A": "AA", "B": "A b"}, "B"),
        ("The correct answer is A line.", {"A": "H band", "B": "A line"}, "B"),
        ("The answer is the back of the neck", {"A": "The back of the neck", "B": "The chin"}, "A"),
        ("B*27", {"A": "B*27", "B": "DR4"}, "A"),
    ],
)
def test_options_that_look_like_letters(text: str, options: dict[str, str], choice: str | None) -> None:
    assert read_choice(text, options) == choice


def test_every_letter_and_wording_of_every_option() -> None:
    for letter, words in PAIRS.items():
        for text in (letter, f"({letter.lower()})", f"{letter}. {words}", f"{letter}: {words}", words):
            assert read_choice(text, PAIRS) == letter
