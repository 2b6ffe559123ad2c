"""Tic-tac-toe: an agent written with the openai client alone learns to play through the gateway.

    pip install -c constraints.txt -e ".[serve]"
    python examples/tictactoe.py runs/tictactoe

A Llama of 0.1 million parameters first imitates a player who moves at random. Then it plays against one, GRPO over
groups of games whose opponent draws alike, and after every few steps 200 games greedily against a random and a perfect
opponent. `--shuffle` gives every game another game's reward: the control. What came of it stands in DIR/games.json and
DIR/games.png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import openai
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import agile
from agile.learner import imitate
from agile.model import small_llama

LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]
TEMPLATE = """\
{% for m in messages %}{{- '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}\
{% if add_generation_prompt %}{{- '<|im_start|> assistant ' }}{% endif %}"""
WIN, DRAW, LOSS, ILLEGAL = 1.0, 0.5, 0.0, -0.5


def free(board: str) -> list[int]:
    return [i for i, cell in enumerate(board) if cell.isdigit()]


def won(board: str, who: str) -> bool:
    return any(all(board[i] == who for i in line) for line in LINES)


def put(board: str, cell: int, who: str) -> str:
    return board[:cell] + who + board[cell + 1 :]


@cache
def best(board: str, who: str) -> tuple[int, int]:
    """Value for `who` to move (1 wins, 0 draws, -1 loses), and a best cell."""
    other = "o" if who == "x" else "x"
    if won(board, other):
        return -1, -1
    if not free(board):
        return 0, -1
    return max((-best(put(board, cell, who), other)[0], cell) for cell in free(board))


class Opponent:
    """Plays o: at random, or perfectly with a random choice among equally good cells."""

    def __init__(self, seed: object, *, perfect: bool = False) -> None:
        self.random = random.Random(repr(seed))
        self.perfect = perfect

    def move(self, board: str) -> int:
        cells = free(board)
        if self.perfect:
            values = {cell: -best(put(board, cell, "o"), "x")[0] for cell in cells}
            cells = [cell for cell in cells if values[cell] == max(values.values())]
        return self.random.choice(cells)


async def play(client: openai.AsyncOpenAI, opponent: Opponent) -> float:
    """One game, as one would write it against any endpoint; the agent plays x and begins."""
    board, messages = "123456789", []
    while True:
        messages.append({"role": "user", "content": " ".join(board)})
        answer = await client.chat.completions.create(model="agile", messages=messages, max_tokens=2)  # type: ignore[arg-type]
        said = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": said})
        if said not in board or not said.isdigit():
            return ILLEGAL
        board = put(board, int(said) - 1, "x")
        if won(board, "x"):
            return WIN
        if not free(board):
            return DRAW
        board = put(board, opponent.move(board), "o")
        if won(board, "o"):
            return LOSS


def random_games(num: int, rng: random.Random) -> list[list[dict[str, str]]]:
    """Conversations of a player who moves at random."""
    games = []
    for _ in range(num):
        board, messages = "123456789", []
        while free(board) and not won(board, "x") and not won(board, "o"):
            cell = rng.choice(free(board))
            messages.append({"role": "user", "content": " ".join(board)})
            messages.append({"role": "assistant", "content": str(cell + 1)})
            board = put(board, cell, "x")
            if free(board):
                board = put(board, rng.choice(free(board)), "o")
        games.append(messages)
    return games


def make_model(folder: Path, seed: int) -> Path:
    words = ["<|im_end|>", "<|im_start|>", "<pad>", "<unk>", "user", "assistant", *"123456789xo"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    lm = small_llama(tokenizer, num_layers=2, hidden_size=64, num_heads=4, max_tokens=128, seed=seed)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def test(gateway: agile.Gateway, num: int) -> dict[str, float]:
    """Greedy games that nothing is learned from: the gateway's own key records nothing."""
    policy, client = gateway.learner.policy, openai.AsyncOpenAI(base_url=gateway.base_url, api_key=gateway.api_key)
    temperature, policy.temperature = policy.temperature, 0.0
    found = {}
    for name in ("random", "perfect"):
        games = [play(client, Opponent((name, i), perfect=name == "perfect")) for i in range(num)]
        results = await asyncio.gather(*games)
        found[f"not_lost_{name}"] = sum(r >= DRAW for r in results) / num
        found[f"won_{name}"] = sum(r == WIN for r in results) / num
    policy.temperature = temperature
    await client.close()
    return found


async def train(learner: agile.Learner, args: argparse.Namespace) -> list[dict[str, Any]]:
    rng, course = random.Random(args.seed), []
    async with agile.Gateway(learner) as gateway:

        async def game(group: str, rewards: list[float]) -> None:
            async with gateway.trajectory(group=group) as t:
                rewards.append(await play(t.client, Opponent((args.seed, group))))
                t.reward = rng.choice(rewards) if args.shuffle else rewards[-1]

        for step in range(args.steps + 1):
            if step % args.test_every == 0:
                course.append({"step": step, **await test(gateway, args.test_games)})
                print(json.dumps(course[-1]), flush=True)
            if step < args.steps:
                results: list[float] = []
                groups = [f"{step}-{i}" for i in range(args.groups) for _ in range(args.games)]
                await asyncio.gather(*(game(group, results) for group in groups))
                await gateway.train_step()
    return course


def plot(course: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in ("random", "perfect"):
        values = [100 * row[f"not_lost_{name}"] for row in course]
        axes.plot([row["step"] for row in course], values, marker="o", label=f"against a {name} player")
    axes.set(xlabel="step", ylabel="games not lost, %", ylim=(0, 102), title="Tic-tac-toe, greedy")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--groups", type=int, default=12, help="groups of games a step")
    parser.add_argument("--games", type=int, default=8, help="games of a group")
    parser.add_argument("--test-every", type=int, default=10)
    parser.add_argument("--test-games", type=int, default=200)
    parser.add_argument("--shuffle", action="store_true", help="control: rewards of other games")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model = make_model(args.out / "untrained", args.seed)
    games = random_games(4000, random.Random(args.seed))
    start = imitate(model, args.out / "imitation", games, num_steps=300, lr=3e-3, seed=args.seed)
    ppo = {"estimator": "group", "value_coef": 0, "value_warmup_epochs": 0, "kl_coef": 0, "lr": 1e-3, "num_epochs": 2}
    with agile.Learner(args.out / "run", model=str(start), seed=args.seed, threads=1, ppo=ppo) as learner:
        course = asyncio.run(train(learner, args))
    (args.out / "games.json").write_text(json.dumps(course, indent=2))
    plot(course, args.out / "games.png")


if __name__ == "__main__":
    main()
