"""The rules of 2048: lines by hand, boards by symmetry."""

from random import Random

import pytest

from agile.tasks.games.game_2048 import MOVES, Board, merged, opening, possible, slide, with_new_tile


@pytest.mark.parametrize(
    ("line", "after", "gained"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),
        ([0, 2, 0, 4], [2, 4, 0, 0], 0),
        ([2, 2, 0, 0], [4, 0, 0, 0], 4),
        ([2, 0, 0, 2], [4, 0, 0, 0], 4),
        ([2, 2, 2, 0], [4, 2, 0, 0], 4),  # the pair that is nearer to the side
        ([2, 2, 2, 2], [4, 4, 0, 0], 8),
        ([4, 2, 2, 0], [4, 4, 0, 0], 4),  # once each
        ([8, 4, 2, 2], [8, 4, 4, 0], 4),
        ([1024, 1024, 0, 2], [2048, 2, 0, 0], 2048),
    ],
)
def test_lines(line: list[int], after: list[int], gained: int) -> None:
    assert merged(line) == (after, gained)


def turned(board: Board) -> Board:
    """A quarter to the right."""
    return tuple(board[4 * (3 - column) + row] for row in range(4) for column in range(4))


def test_moves_are_one_another_s_turns() -> None:
    after_a_turn = {"left": "up", "up": "right", "right": "down", "down": "left"}
    rng = Random(0)
    for _ in range(200):
        board = tuple(rng.choice([0, 0, 2, 2, 4, 8]) for _ in range(16))
        for move in MOVES:
            after, gained = slide(board, move)
            assert slide(turned(board), after_a_turn[move]) == (turned(after), gained)
            assert sum(after) == sum(board)
    assert slide((2, 2, *[0] * 14), "left")[0] == (4, *[0] * 15)


def test_a_game_is_over_when_nothing_can_move() -> None:
    full = (2, 4, 2, 4, 4, 2, 4, 2, 2, 4, 2, 4, 4, 2, 4, 2)
    assert possible(full) == []
    assert possible((*full[:15], 4)) == ["up", "left", "down", "right"]
    assert possible((2, *[0] * 15)) == ["down", "right"]


def test_new_tiles_come_to_empty_cells_and_one_of_ten_is_a_four() -> None:
    rng = Random(0)
    assert sorted(opening(rng))[:14] == [0] * 14
    board = (0, 2) * 8
    tiles = []
    for _ in range(2000):
        after = with_new_tile(board, rng)
        (cell,) = [i for i in range(16) if after[i] != board[i]]
        assert board[cell] == 0
        tiles.append(after[cell])
    assert 0.07 < tiles.count(4) / len(tiles) < 0.13 and set(tiles) == {2, 4}
