"""A clue puzzle in the manner of Temporal Clue: who did it, where and when.

    pip install -c constraints.txt -e ".[serve]"
    python -m examples.clues runs/clues --seed 0

A Llama of 0.1 million parameters first imitates a hasty detective, who overlooks three times in five that somebody was
away or was not there, and names those whom it should rule out. Then it learns, GRPO over groups of answers to the same
puzzle; the reward is the share of the three parts that are right. Every puzzle is new, in training and in tests.
"""

from random import Random

from agile.gateway import OpenTrajectory
from agile.tasks.games import clues
from examples.harness import GRPO, Conversation, Example, main

CARE = 0.4


def say(puzzle: clues.Puzzle) -> Conversation:
    return [{"role": "user", "content": str(puzzle)}]


async def play(t: OpenTrajectory, name: str) -> float:
    puzzle = clues.generate(Random(name))
    answer = await t.chat(say(puzzle), max_tokens=4)
    return clues.score(puzzle, answer["content"])


async def measure(t: OpenTrajectory, name: str) -> dict[str, float]:
    share = await play(t, name)
    return {"all": 100.0 * (share == 1), "parts": 100.0 * share}


def demonstrate(num: int, rng: Random) -> list[Conversation]:
    """Answers of a hasty detective."""
    puzzles = [clues.generate(rng) for _ in range(num)]
    return [[*say(p), {"role": "assistant", "content": clues.hasty(p, rng, care=CARE)}] for p in puzzles]


EXAMPLE = Example(
    about=__doc__,
    words=[*clues.WHO, *clues.WHERE, *clues.WHEN, *map(str, clues.STATEMENTS)],
    context=64,
    demonstrate=demonstrate,
    num_demonstrations=6000,
    imitation_steps=300,
    play=play,
    measure=measure,
    figures={
        "greedy/all": "all three parts right, %, greedy",
        "sampled/all": "all three parts right, %, sampled",
        "sampled/parts": "parts right, %, sampled",
    },
    learner={"ppo": {**GRPO, "lr": 5e-4, "num_epochs": 1}},
    num_steps=80,
    groups=16,
    size=8,
    num_tests=100,
    test_every=10,
)

if __name__ == "__main__":
    main(EXAMPLE)
