"""Tic-tac-toe against an obvious search, and what is known of the game."""

from itertools import combinations
from random import Random

import pytest

from agile.tasks.games.tictactoe import EMPTY, LINES, free, over, perfect_move, put, random_move, value, won


def reachable() -> set[str]:
    """Every position of every game."""
    found, new, who = {EMPTY}, {EMPTY}, "x"
    while new:
        new = {put(board, cell, who) for board in new if not over(board) for cell in free(board)}
        found |= new
        who = "o" if who == "x" else "x"
    return found


def test_positions_are_those_that_the_game_has() -> None:
    boards = reachable()
    assert len(boards) == 5478
    ended = [board for board in boards if over(board)]
    assert len(ended) == 958
    assert [sum(won(b, "x") for b in ended), sum(won(b, "o") for b in ended)] == [626, 316]


def test_lines_are_all_that_sum_to_fifteen_in_a_magic_square() -> None:
    square = (2, 7, 6, 9, 5, 1, 4, 3, 8)
    lines = {c for c in combinations(range(9), 3) if sum(square[i] for i in c) == 15}
    assert lines == set(LINES) and len(LINES) == 8


@pytest.mark.parametrize("cell", [0, 9, -1])
def test_a_cell_that_is_not_free_is_refused(cell: int) -> None:
    with pytest.raises(ValueError, match=f"Cell {cell + 1} of the board 'x23456789' is not free"):
        put("x23456789", cell, "x")


@pytest.mark.parametrize(
    ("board", "who", "worth"),
    [
        (EMPTY, "x", 0),
        ("xx3oo6789", "x", 1),  # three in the first row
        ("xx3oo6789", "o", 1),
        ("x23456789", "o", 0),
        ("x2345678o", "x", 1),  # opposite corners: a fork
        ("xoxxoo7x9", "o", 0),
    ],
)
def test_values_of_known_positions(board: str, who: str, worth: int) -> None:
    assert value(board, who) == worth


def test_the_perfect_player_never_loses_and_the_random_one_does() -> None:
    lost = 0
    for seed in range(100):
        rng, board, who = Random(seed), EMPTY, "x"
        while not over(board):
            player = perfect_move if who == "o" else random_move
            board, who = put(board, player(board, who, rng), who), "o" if who == "x" else "x"
        assert not won(board, "x")
        lost += won(board, "o")
    assert lost > 60


def test_the_perfect_player_chooses_among_all_that_is_best() -> None:
    assert {perfect_move(EMPTY, "x", Random(seed)) for seed in range(200)} == set(range(9))
    assert {perfect_move("x23456789", "o", Random(seed)) for seed in range(50)} == {4}
