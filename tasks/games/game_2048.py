"""2048: the rules, and a player. A board is 16 numbers, row by row: 0 for an empty cell, else the tile."""

from __future__ import annotations

from random import Random

Board = tuple[int, ...]
SIDE = 4
MOVES = ("up", "left", "down", "right")
# Indices of the four lines of each move, from the side to which the tiles slide.
LINES = {
    "left": [[SIDE * row + i for i in range(SIDE)] for row in range(SIDE)],
    "right": [[SIDE * row + i for i in reversed(range(SIDE))] for row in range(SIDE)],
    "up": [[SIDE * i + column for i in range(SIDE)] for column in range(SIDE)],
    "down": [[SIDE * i + column for i in reversed(range(SIDE))] for column in range(SIDE)],
}


def merged(line: list[int]) -> tuple[list[int], int]:
    """A line whose tiles slid to its beginning, each merged at most once, and the sum of the tiles that this made."""
    tiles, found, gained = [tile for tile in line if tile], [], 0
    while tiles:
        tile = tiles.pop(0)
        if tiles and tiles[0] == tile:
            tile += tiles.pop(0)
            gained += tile
        found.append(tile)
    return found + [0] * (len(line) - len(found)), gained


def slide(board: Board, move: str) -> tuple[Board, int]:
    """The board after a move, before the new tile comes, and what it adds to the score."""
    after, gained = list(board), 0
    for line in LINES[move]:
        tiles, more = merged([board[i] for i in line])
        gained += more
        for i, tile in zip(line, tiles, strict=True):
            after[i] = tile
    return tuple(after), gained


def possible(board: Board) -> list[str]:
    """The moves that change the board; the game is over when there is none."""
    return [move for move in MOVES if slide(board, move)[0] != board]


def with_new_tile(board: Board, rng: Random) -> Board:
    """The board with a 2 (nine times of ten) or a 4 in one of the empty cells."""
    cell = rng.choice([i for i, tile in enumerate(board) if not tile])
    return (*board[:cell], 2 if rng.random() < 0.9 else 4, *board[cell + 1 :])


def opening(rng: Random) -> Board:
    """A board with two tiles."""
    return with_new_tile(with_new_tile((0,) * SIDE**2, rng), rng)
