"""Tic-tac-toe: an agent learns to play through the gateway.

    pip install -c constraints.txt -e ".[serve]"
    python -m examples.tictactoe runs/tictactoe --seed 0

A Llama of 0.1 million parameters first imitates a player who moves at random. Then it plays, GRPO over groups of games
whose opponent draws alike: half of the groups against one who moves at random, half against a perfect one. A game won
is worth 1, drawn 0.5, lost 0; a move that is none loses the game, and is worth -0.5. Each test plays as many new games
against both.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from agile.gateway import OpenTrajectory
from agile.tasks.games.tictactoe import EMPTY, free, over, perfect_move, put, random_move, won
from examples.harness import GRPO, Conversation, Example, main

WIN, DRAW, LOSS, ILLEGAL = 1.0, 0.5, 0.0, -0.5
Player = Callable[[str, str, Random], int]


async def game(t: OpenTrajectory, opponent: Player, rng: Random) -> float:
    """One game: one conversation, in which the agent says the number of a cell and the opponent changes the board."""
    board, messages = EMPTY, []
    while True:
        messages.append({"role": "user", "content": " ".join(board)})
        messages.append(await t.chat(messages, max_tokens=1))  # as t.client does over HTTP
        said = messages[-1]["content"]
        if said not in [board[cell] for cell in free(board)]:
            return ILLEGAL
        board = put(board, int(said) - 1, "x")
        if not over(board):
            board = put(board, opponent(board, "o", rng), "o")
        if over(board):
            return WIN if won(board, "x") else LOSS if won(board, "o") else DRAW


async def play(t: OpenTrajectory, name: str) -> float:
    rng = Random(name)
    return await game(t, rng.choice([random_move, perfect_move]), rng)


async def measure(t: OpenTrajectory, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for who, opponent in (("random", random_move), ("perfect", perfect_move)):
        reward = await game(t, opponent, Random(name))
        found |= {f"not_lost_{who}": 100.0 * (reward >= DRAW), f"won_{who}": 100.0 * (reward == WIN)}
    return found


def demonstrate(num: int, rng: Random) -> list[Conversation]:
    """Games of two players who move at random, as x saw them."""
    games = []
    for _ in range(num):
        board, messages = EMPTY, []
        while not over(board):
            cell = random_move(board, "x", rng)
            messages.append({"role": "user", "content": " ".join(board)})
            messages.append({"role": "assistant", "content": str(cell + 1)})
            board = put(board, cell, "x")
            if not over(board):
                board = put(board, random_move(board, "o", rng), "o")
        games.append(messages)
    return games


EXAMPLE = Example(
    about=__doc__,
    words="123456789xo",
    context=128,
    demonstrate=demonstrate,
    play=play,
    measure=measure,
    figures={
        "greedy/not_lost_random": "not lost to a random player, greedy, %",
        "sampled/not_lost_random": "the same, sampled",
        "greedy/not_lost_perfect": "drawn with a perfect player, greedy, %",
        "sampled/not_lost_perfect": "the same, sampled",
    },
    learner={"ppo": {**GRPO, "lr": 5e-4, "num_epochs": 1}},
    imitation_steps=600,
    num_steps=300,
    groups=16,
    size=8,
    num_tests=100,
    test_every=25,
)

if __name__ == "__main__":
    main(EXAMPLE)
