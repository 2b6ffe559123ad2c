"""`agile chat`: the trained agent answers in the terminal, and whoever types is its expert."""

from __future__ import annotations

import asyncio
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agile.advice import TerminalAdvisor
from agile.build import Setup
from agile.config import RunConfig
from agile.errors import AgileError
from agile.memory.store import SqliteMemory
from agile.policies import HFPolicy
from agile.types import Item, Reward, Session, Stream

HELP = "A question, or: /product NAME, /memory, /examples, /help, /quit"


def run_chat(run: Path, memory_path: Path, console: Console) -> None:
    """Talk until the end of input.

    Raises:
        AgileError: The folder holds no trained agent.
    """
    folder = next((run / name for name in ("ppo", "sft") if (run / name / "config.json").exists()), None)
    if folder is None or not (run / "config.yaml").exists():
        raise AgileError(f"There is no trained agent in {run}. Train one first: agile demo (or agile train CONFIG out={run}).")
    config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    setup = Setup(config, run)
    tokenizer = setup.tokenizer(folder)
    executor = setup.executor(tokenizer, TerminalAdvisor(console=console))
    executor.score = lambda item, session: Reward({})
    policy = HFPolicy(setup.language_model(tokenizer, folder), tokenizer.pad_token_id, temperature=0.0)
    stream = setup.task.streams("test")[0]
    products = {item.product: item for item in stream.items}
    with SqliteMemory(setup.encoder, memory_path) as memory:
        console.print(f"You ask {escape(str(folder))} about the shop {stream.id}. {HELP}")
        console.print(_table(stream))
        product = next(iter(products))
        turn = len(memory)
        while True:
            try:
                text = console.input(f"[bold]{product}>[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            command, _, argument = text.partition(" ")
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/product" if argument in products:
                    product = argument
                case "/product":
                    console.print(f"There are {', '.join(products)}.")
                case "/memory":
                    for entry in memory.items():
                        console.print(f"  {entry.product or 'all':>6}  {escape(entry.text)}")
                    console.print(f"{len(memory)} entries in {memory_path}")
                case "/examples":
                    for question in dict.fromkeys(item.question for item in stream.items if item.product == product):
                        console.print(f"  {question}")
                case _ if command.startswith("/"):
                    console.print(HELP)
                case _:
                    unknown = [w for w in text.split() if tokenizer.unk_token_id in executor.codec.encode(w)]
                    if unknown:
                        console.print(f"[yellow]It has never seen: {escape(' '.join(unknown))}[/] (see /examples)")
                    like = products[product]
                    item = Item(
                        f"chat/{turn}", text, "", "chat", like.group, product, {**like.context, "sql": "", "knowledge": ""}
                    )
                    session = asyncio.run(
                        executor.run(policy, item, memory, stream_id="chat", index=turn, progress=0.0, seed=turn)
                    )
                    turn += 1
                    _show(session, console)


def _table(stream: Stream) -> Table:
    table = Table(title="products you can ask about")
    rows = {item.product: item.context["metadata"] for item in stream.items}
    names = list(dict.fromkeys(name for metadata in rows.values() for name in metadata if name != "title"))
    for name in ("product", *names):
        table.add_column(name)
    for product, metadata in rows.items():
        table.add_row(product, *(escape(str(metadata.get(name, ""))) for name in names))
    return table


def _show(session: Session, console: Console) -> None:
    """The actions that the LLM chose, and its answer."""
    for step in session.steps:
        if step.action.name in ("SearchProduct", "Reflection"):
            console.print(f"[dim]{escape(str(step.action))} {escape(step.text)}[/]")
    if session.advised:
        console.print(f"[dim]It asked you, and wrote {len(session.written)} entries to its memory.[/]")
    elif session.retrieved:
        console.print(f"[dim]It looked at {len(session.retrieved)} entries of its memory and did not ask.[/]")
    if session.failed:
        console.print(f"[yellow]{session.status}: {escape(session.error)}[/]")
    else:
        console.print(f"[green]{escape(session.answer or '')}[/]")
