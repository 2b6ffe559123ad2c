"""Tic-tac-toe: the rules, and players. A board is nine characters: the digit of a free cell, `x`, `o`; x begins."""

from __future__ import annotations

from functools import cache
from random import Random

EMPTY = "123456789"
LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


def free(board: str) -> list[int]:
    """Indices of the free cells."""
    return [i for i, cell in enumerate(board) if cell.isdigit()]


def won(board: str, who: str) -> bool:
    """Whether `who` has three in a line."""
    return any(all(board[i] == who for i in line) for line in LINES)


def over(board: str) -> bool:
    """Whether somebody has won, or no cell is free."""
    return not free(board) or won(board, "x") or won(board, "o")


def put(board: str, cell: int, who: str) -> str:
    """The board after a move.

    Raises:
        ValueError: The cell is not free.
    """
    if cell not in free(board):
        raise ValueError(f"Cell {cell + 1} of the board {board!r} is not free; choose one of the digits on it.")
    return board[:cell] + who + board[cell + 1 :]


@cache
def value(board: str, who: str) -> int:
    """What the best play of both is worth to `who`, who is to move: 1 won, 0 drawn, -1 lost."""
    other = "o" if who == "x" else "x"
    if won(board, other):
        return -1
    return max((-value(put(board, cell, who), other) for cell in free(board)), default=0)


def perfect_move(board: str, who: str, rng: Random) -> int:
    """One of the best cells, by chance."""
    other = "o" if who == "x" else "x"
    values = {cell: -value(put(board, cell, who), other) for cell in free(board)}
    return rng.choice([cell for cell in values if values[cell] == max(values.values())])


def random_move(board: str, who: str, rng: Random) -> int:
    """One of the free cells, by chance."""
    return rng.choice(free(board))
