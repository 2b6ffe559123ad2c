"""2048: an agent learns what to do in a game of hundreds of moves, each of which it sees alone.

    pip install -c constraints.txt -e ".[serve]"
    python -m examples.game_2048 runs/2048 --seed 0

A Llama of 0.1 million parameters first imitates a player who has a plan, the first possible move of down, left, right
and up, and loses his head where at most three cells are free: there, seven times in ten, he makes the move that leaves
fewest. Then it learns by PPO. Every move is a call of its own that shows the score, the board and the possible moves,
and nothing of what was before: a game is a trajectory of a hundred segments and more, with one reward, its score in
thousands, at the end of the last. The critic carries it to each move. In place of a move that is not possible chance
makes one that is. Each test plays the same 40 new games.
"""

from __future__ import annotations

from random import Random

from agile.gateway import OpenTrajectory
from agile.tasks.games.game_2048 import MOVES, Board, opening, possible, slide, with_new_tile
from examples.harness import Conversation, Example, main

PLAN = ("down", "left", "right", "up")
MAX_SCORE = 99  # in hundreds, that can be told
FULL, PANIC = 3, 0.7  # free cells at which the imitated player loses his head, and how often


def shown(board: Board, score: int) -> dict[str, str]:
    so_far = f"score-{min(score // 100, MAX_SCORE)}"
    return {"role": "user", "content": " ".join([so_far, *map(str, board), *possible(board)])}


async def game(t: OpenTrajectory, rng: Random) -> int:
    """The score of one game."""
    board, score = opening(rng), 0
    while moves := possible(board):
        said = (await t.chat([shown(board, score)], max_tokens=1))["content"]  # as t.client does over HTTP
        board, gained = slide(board, said if said in moves else rng.choice(moves))
        board, score = with_new_tile(board, rng), score + gained
    return score


async def play(t: OpenTrajectory, name: str) -> float:
    return await game(t, Random(name)) / 1000


async def measure(t: OpenTrajectory, name: str) -> dict[str, float]:
    score = await game(t, Random(name))
    return {"score": score, "moves": t.num_calls}


def demonstrate(num: int, rng: Random) -> list[Conversation]:
    """Moves, a conversation each, of a player who forgets his plan where the board is nearly full."""
    found: list[Conversation] = []
    while len(found) < num:
        board, score = opening(rng), 0
        while moves := possible(board):
            lost = board.count(0) <= FULL and rng.random() < PANIC
            fewest = min(moves, key=lambda move: slide(board, move)[0].count(0))
            move = fewest if lost else next(m for m in PLAN if m in moves)
            found.append([shown(board, score), {"role": "assistant", "content": move}])
            board, gained = slide(board, move)
            board, score = with_new_tile(board, rng), score + gained
    rng.shuffle(found)
    return found[:num]


EXAMPLE = Example(
    about=__doc__,
    words=[*MOVES, *(f"score-{i}" for i in range(MAX_SCORE + 1)), "0", *(str(2**i) for i in range(1, 18))],
    context=32,
    demonstrate=demonstrate,
    play=play,
    measure=measure,
    figures={"greedy/score": "score, greedy", "sampled/score": "score, sampled"},
    learner={
        "critic": "separate",  # it must read the whole board, of which the plan needs little
        "ppo": {
            "kl_coef": 0,
            "lr": 5e-4,
            "value_lr": 2e-3,
            "value_warmup_epochs": 10,
            "lam": 0.98,
            "num_epochs": 1,
            "batch_size": 256,
            "micro_batch_tokens": 16384,
            "checkpoint_every": 1000,
        },
    },
    num_steps=40,
    groups=16,
    size=1,
    num_tests=40,
    test_every=10,
    num_demonstrations=20000,
    imitation_steps=400,
)

if __name__ == "__main__":
    main(EXAMPLE)
