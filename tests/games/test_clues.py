import random
from itertools import product

import pytest

from agile.tasks.games import clues
from agile.tasks.games.clues import Statement

PUZZLES = [clues.generate(random.Random(seed)) for seed in range(300)]


def test_every_puzzle_has_one_solution_and_no_part_of_it_can_be_told_beforehand() -> None:
    assert all(clues.solutions(p.statements) == [p.answer] for p in PUZZLES)
    for i, part in enumerate(clues.PARTS):
        share = [sum(p.answer[i] == name for p in PUZZLES) / len(PUZZLES) for name in part]
        assert max(share) < 0.35


def test_the_statements_say_what_they_mean() -> None:
    """Each text, read by a rule of this test's own, admits the same answers."""

    def admits(text: str, answer: tuple[str, ...]) -> bool:
        subject, *how, value = text.split("-")
        if value == "away":
            return subject not in answer
        return subject not in answer or (value in answer) == ("not" not in how)

    for puzzle in PUZZLES[:50]:
        for statement, answer in product(puzzle.statements, clues.ALL):
            assert statement.allows(answer) == admits(str(statement), answer), str(statement)


@pytest.mark.parametrize(
    ("statements", "num"),
    [
        ([], 64),
        ([Statement("ann", "", True)], 48),
        ([Statement("ann", "hall", True)], 48 + 4),
        ([Statement("hall", "nine", False)], 60),
        ([Statement("ann", "hall", True), Statement("ann", "attic", True)], 48),
    ],
)
def test_solutions_are_counted_by_hand(statements: list[Statement], num: int) -> None:
    assert len(clues.solutions(statements)) == num


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{} {} {}", 3),
        ("  {}  {}\n{} ", 3),
        ("{} {} never", 0),
        ("{1} {0} {2}", 0),
        ("{} {}", 0),
        ("{0} {1} {2} {0}", 0),
        ("", 0),
        ("nobody", 0),
    ],
)
def test_the_score_is_the_share_of_right_parts(text: str, right: int) -> None:
    for puzzle in PUZZLES[:20]:
        assert clues.score(puzzle, text.format(*puzzle.answer)) == right / 3


def test_the_score_counts_each_part() -> None:
    puzzle = clues.Puzzle((), ("ann", "hall", "nine"))
    assert clues.score(puzzle, "ann hall ten") == 2 / 3
    assert clues.score(puzzle, "bob hall ten") == 1 / 3
    assert clues.score(puzzle, "bob attic ten") == 0


def test_a_careful_detective_is_always_right_and_a_hasty_one_seldom() -> None:
    rng = random.Random(0)
    found = {
        care: sum(clues.score(p, clues.hasty(p, rng, care=care)) == 1 for p in PUZZLES) / len(PUZZLES)
        for care in (0, 0.2, 1)
    }
    assert found[1] == 1
    assert found[0] == 0 < found[0.2] < 0.2
    assert all(clues.read(clues.hasty(p, rng, care=0.2)) for p in PUZZLES)
