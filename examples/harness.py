"""What the example agents share: a small model from scratch, imitation, many plays at once, tests, a control, a curve.

An example is an `Example` and `main(EXAMPLE)`. Each run has a folder `OUT/seed-N` (or `OUT/control-N`) with its
`course.json`, and both of a seed start from `OUT/imitation-N`; the curve and the table are drawn from all runs that are
in OUT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import agile
from agile.gateway import OpenTrajectory
from agile.learner import imitate
from agile.model import small_llama

TEMPLATE = """\
{% for m in messages %}{{- '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}\
{% if add_generation_prompt %}{{- '<|im_start|> assistant ' }}{% endif %}"""
GRPO: Mapping[str, Any] = {  # settings of PPO: plays of one group are compared, there is no critic
    "estimator": "group",
    "value_coef": 0,
    "value_warmup_epochs": 0,
    "kl_coef": 0,
    "lr": 1e-3,
    "num_epochs": 2,
    "checkpoint_every": 1000,
}
SPECIAL = ("<|im_end|>", "<|im_start|>", "<pad>")
Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """An agent that learns.

    Attributes:
        about: For `--help`.
        words: What the model reads and writes: its vocabulary, besides `user` and `assistant`.
        context: Most tokens of a segment.
        demonstrate: Conversations of a weak player, which the model imitates first: how many, and chance.
        play: One run of the agent, by a trajectory and a name that decides what it meets; its reward.
        measure: The same for a test; its figures, which are averaged.
        figures: Name and title of the figures that are drawn.
        learner: Settings of `agile.Learner`.
        num_steps, groups, size: Steps of PPO; plays of each: groups of the same name, and the size of each.
        num_tests, test_every: Test plays, greedy and sampled, after every so many steps.
    """

    about: str
    words: Sequence[str]
    context: int
    demonstrate: Callable[[int, Random], list[Conversation]]
    play: Callable[[OpenTrajectory, str], Awaitable[float]]
    measure: Callable[[OpenTrajectory, str], Awaitable[dict[str, float]]]
    figures: Mapping[str, str]
    learner: Mapping[str, Any]
    num_steps: int
    groups: int
    size: int
    num_tests: int
    test_every: int
    num_demonstrations: int = 2000
    imitation_steps: int = 200
    hidden_size: int = 64
    template: str = TEMPLATE
    tools: Sequence[Any] | None = None
    roles: Sequence[str] = field(default=("user", "assistant"))


def make_model(folder: Path, example: Example, seed: int) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of whole words, as a Hugging Face folder."""
    words = [*SPECIAL, "<unk>", *example.roles, *example.words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[2], unk_token="<unk>"
    )
    tokenizer.chat_template = example.template
    lm = small_llama(
        tokenizer,
        num_layers=2,
        hidden_size=example.hidden_size,
        num_heads=4,
        max_tokens=example.context,
        seed=seed,
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def test(gateway: agile.Gateway, example: Example) -> dict[str, float]:
    """Means of the figures over test plays, greedy and sampled; nothing is learned from them."""
    policy = gateway.learner.policy
    trained = policy.temperature
    found: dict[str, float] = {}

    async def one(i: int) -> dict[str, float]:
        t = gateway.open()
        try:
            return await example.measure(t, f"test-{i}")
        finally:
            gateway.discard(t)

    for kind, temperature in (("greedy", 0.0), ("sampled", trained)):
        policy.temperature = temperature
        figures = await asyncio.gather(*(one(i) for i in range(example.num_tests)))
        found |= {f"{kind}/{name}": sum(f[name] for f in figures) / len(figures) for name in figures[0]}
    policy.temperature = trained
    return found


async def train(learner: agile.Learner, example: Example, args: argparse.Namespace, kept: Path) -> None:
    """Play, learn, test, and keep what came of it; the control learns from each play with the reward of another one."""
    rng, began = Random(args.seed), time.monotonic()
    course: list[dict[str, float]] = []
    async with agile.Gateway(learner) as gateway:
        for step in range(args.steps + 1):
            if step % example.test_every == 0 or step == args.steps:
                figures = await test(gateway, example)
                course.append({"step": step, **figures, "seconds": round(time.monotonic() - began, 1)})
                kept.write_text(json.dumps(course, indent=1))
                print(json.dumps({k: round(v, 3) for k, v in course[-1].items()}), flush=True)
            if step == args.steps:
                break
            groups = [f"{args.seed}-{step}-{i}" for i in range(example.groups)]
            opened = [gateway.open(group=group) for group in groups for _ in range(example.size)]
            rewards = await asyncio.gather(*(example.play(t, t.group) for t in opened))
            if args.shuffle:
                rng.shuffle(rewards)
            for t, reward in zip(opened, rewards, strict=True):
                gateway.end(t, reward)
            await gateway.train_step()


def courses(out: Path) -> dict[str, list[dict[str, float]]]:
    """What came of each run in a folder."""
    return {f.parent.name: json.loads(f.read_text()) for f in sorted(out.glob("*/course.json"))}


def plot(example: Example, out: Path) -> None:
    """Draw the figures of all runs: one line each, the controls dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(example.figures), 3.2), layout="constrained")
    panels = figure.subplots(1, len(example.figures), squeeze=False)[0]
    for panel, (name, title) in zip(panels, example.figures.items(), strict=True):
        for run, course in courses(out).items():
            style = {"color": "gray", "linestyle": "--"} if run.startswith("control") else {}
            panel.plot([row["step"] for row in course], [row[name] for row in course], label=run, **style)
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(out / "curve.png", dpi=120)


def table(example: Example, out: Path) -> str:
    """Start and end of each run, in Markdown."""
    lines = [
        "| run | steps | " + " | ".join(example.figures.values()) + " | seconds |",
        "|---" * (len(example.figures) + 3) + "|",
    ]
    for run, course in courses(out).items():
        cells = [f"{course[0][name]:.3g} to {course[-1][name]:.3g}" for name in example.figures]
        lines.append(f"| {run} | {course[-1]['step']} | {' | '.join(cells)} | {course[-1]['seconds']:.0f} |")
    return "\n".join(lines)


def main(example: Example) -> None:
    parser = argparse.ArgumentParser(description=example.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all runs of this example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=example.num_steps)
    parser.add_argument("--shuffle", action="store_true", help="control: each play has the reward of another one")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more only get in each other's way on models so small
    folder = args.out / f"{'control' if args.shuffle else 'seed'}-{args.seed}"
    folder.mkdir(parents=True)
    if not (start := args.out / f"imitation-{args.seed}").exists():  # the control begins where the run does
        model = make_model(folder / "untrained", example, args.seed)
        shown = example.demonstrate(example.num_demonstrations, Random(args.seed))
        trained = imitate(
            model,
            folder / "imitation",
            shown,
            num_steps=example.imitation_steps,
            lr=3e-3,
            tools=example.tools,
            seed=args.seed,
        )
        trained.rename(start)
    settings = {"threads": 1, "max_batch_size": example.groups * example.size, **example.learner}
    with agile.Learner(folder / "run", model=str(start), seed=args.seed, **settings) as learner:
        asyncio.run(train(learner, example, args, folder / "course.json"))
    plot(example, args.out)
    print(table(example, args.out))
