"""All of ProductQA's test questions through the executor: time and memory, and whether it does what arithmetic says.

    python -m benchmarks.executor DIR OUT        # DIR holds ProductQA's files

The agent is a script that stands for the baseline `router`: it searches by the gold SQL where that helps and asks about
all else. Everything but the policy is what a trained agent has: prompts with metadata and with what MiniLM retrieves,
SQL, the desk, reflections, a memory that grows to thousands of entries, rewards, the log. What it does must be what the
baseline does, which plays nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agile.agents.product_qa import NO_KNOWLEDGE, SEARCH
from agile.baselines import router
from agile.build import Setup
from agile.config import load_config
from agile.evaluate import by_stream, outcomes, rates
from agile.experts import who_always_asks
from agile.play import play_streams
from agile.policies.scripted import ScriptedPolicy
from agile.tokens import ActionCodec
from agile.types import Action, Fn, Item

CONFIG = Path(__file__).parents[1] / "configs" / "productqa-baselines.yaml"
# in bytes, which are the tokens where there is no model
LIMITS = ("rollout.max_context_tokens=16384", "rollout.max_session_tokens=32768", "rollout.max_action_tokens=1024")


def who_routes(codec: ActionCodec, item: Item) -> ScriptedPolicy:
    """The policy for one question: the gold SQL and what it finds, else advice and the gold knowledge."""
    asks = who_always_asks(codec, item)

    def decide(context: str) -> Action:
        if context.rstrip().endswith(f"[{Fn.REFLECTION}]"):
            return Action(Fn.REFLECTION, str(item.context["knowledge"] or NO_KNOWLEDGE))
        if not item.context["sql"]:
            return asks.decide(context)
        if f"[{SEARCH}]" not in context:
            return Action(SEARCH, item.context["sql"])
        return Action(Fn.PREDICT_ANSWER, context.rsplit(codec.end, 1)[-1].strip())

    return ScriptedPolicy(codec, decide)


def measure(data: Path, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Play all test questions into `out`: seconds, memory, figures, and whether each is as the baseline has it."""
    config = load_config(CONFIG, [f"task.data={data}", *LIMITS, *overrides])
    price = config.task.advice_price
    seconds = {}
    began = time.monotonic()

    def ended(what: str) -> None:
        nonlocal began
        now = time.monotonic()
        seconds[what], began = now - began, now

    setup = Setup(config, out)
    streams = setup.task.streams("test")
    ended("reading")
    setup.embed(streams)
    ended("embedding")
    tokenizer = setup.carrier()
    codec = ActionCodec(tokenizer, setup.agent.spec)
    executor = setup.executor(tokenizer, codec=codec)
    routes = partial(who_routes, codec)
    log = out / "test-router.jsonl"
    first = routes(streams[0].items[0])
    played = outcomes(play_streams(setup, executor, first, "router", log, memory=setup.memory, policy_for=routes))
    ended("playing")
    expected = router(streams, setup.task)
    return {
        "price": price,
        "seconds": seconds,
        "gibibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "as_the_baseline": [(o.correct, o.advised) for o in played] == [(o.correct, o.advised) for o in expected],
        "all": rates(played, price, macro=True),
        "groups": {name: rates(group, price) for name, group in by_stream(played).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = measure(args.data.resolve(), out, args.overrides)
    (out / "executor.json").write_text(json.dumps(result, indent=2))
    table = Table(title=f"a router that is played, advice at {result['price']:g}")
    for name in ("group", "questions", "asks", "score"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, found in {**result["groups"], "all, mean of groups": result["all"]}.items():
        table.add_row(name, f"{found['n']:,}", f"{found['advice_rate']:.1%}", f"{found['score']:.4f}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{what} {s:.0f} s" for what, s in result["seconds"].items()))
    console.print(f"{result['gibibytes']:.2f} GiB at most")
    console.print(f"every question as the baseline has it: {'yes' if result['as_the_baseline'] else 'NO'}")


if __name__ == "__main__":
    main()
