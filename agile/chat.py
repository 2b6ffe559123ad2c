"""`agile chat`: the trained agent answers in the terminal, and whoever types is its expert."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agile.advice import TerminalAdvisor
from agile.build import Setup
from agile.config import load_config
from agile.errors import AgileError
from agile.executor import Executor
from agile.loaded import agent_of, ready
from agile.memory.store import SqliteMemory
from agile.protocols import Policy
from agile.subjects import question_about, subjects
from agile.types import Item, Session, Stream

HELP = "Type a question, or: /product NAME, /products, /examples, /memory, /help, /quit"
MAX_COLUMNS = 6


def run_chat(run: Path, memory_path: Path, console: Console) -> None:
    """Talk until the end of input.

    Raises:
        AgileError: The folder holds no trained agent.
    """
    folder = run / agent_of(run)
    setup = Setup(load_config(run / "config.yaml"), run)
    products, stream = subjects(setup.task, setup.config.task.name), setup.task.streams("test")[0]
    if any("metadata" not in item.context for item in products.values()):
        raise AgileError(
            f"{run} learned {setup.config.task.name}, whose questions come with options that a chat could not be told "
            "of. Ask it from a program (docs/embedding.md), or score it: agile bench."
        )
    executor, policy = ready(setup, folder, TerminalAdvisor(console=console))
    with SqliteMemory(setup.encoder, memory_path) as memory:
        console.print(f"The agent {folder} answers about the shop {stream.id}, which it has never seen in training.")
        console.print("Where it needs advice it asks you, and it remembers what you say.")
        console.print(_table(products))
        console.print(HELP, markup=False)
        _talk(executor, policy, memory, memory_path, products, stream, console)


def _talk(
    executor: Executor,
    policy: Policy,
    memory: SqliteMemory,
    memory_path: Path,
    products: Mapping[str, Item],
    stream: Stream,
    console: Console,
) -> None:
    product = next(iter(products))
    # what it wrote in earlier talks keeps its provenance
    turn = 1 + max((int(entry.session_id.rpartition("/")[2]) for entry in memory.items()), default=-1)
    while True:
        try:
            text = console.input(f"[bold]{escape(product)}>[/] ").strip()
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
                console.print(f"There are {', '.join(products)}.", markup=False)
            case "/products":
                console.print(_table(products))
            case "/memory":
                for entry in memory.items():
                    console.print(f"  {entry.product or 'all':>6}  {entry.text}", markup=False)
                console.print(f"{len(memory)} entries in {memory_path}", markup=False, soft_wrap=True)
            case "/examples":
                for question in dict.fromkeys(item.question for item in stream.items if item.product == product):
                    console.print(f"  {question}", markup=False)
            case _ if command.startswith("/"):
                console.print(HELP, markup=False)
            case _:
                unknown = [w for w in text.split() if executor.codec.tokenizer.unk_token_id in executor.codec.encode(w)]
                if unknown:
                    console.print(f"[yellow]It has never seen: {escape(' '.join(unknown))}[/] (see /examples)")
                item = question_about(products[product], f"chat/{turn}", text, "chat")
                session = asyncio.run(
                    executor.run(policy, item, memory, stream_id="chat", index=turn, progress=0.0, seed=turn)
                )
                turn += 1
                _show(session, console)


def _table(products: Mapping[str, Item]) -> Table:
    table = Table(title="products you can ask about")
    rows = {product: item.context["metadata"] for product, item in products.items()}
    names = list(dict.fromkeys(name for metadata in rows.values() for name in metadata if name != "title"))
    if len(names) > MAX_COLUMNS:  # real shops know dozens of features
        names = ["title"]
    for name in ("product", *names):
        table.add_column(name)
    for product, metadata in rows.items():
        table.add_row(escape(product), *(escape(str(metadata.get(name, ""))) for name in names))
    return table


def _show(session: Session, console: Console) -> None:
    """The actions that the LLM chose, and its answer."""
    for step in session.steps:
        if step.action.name in ("SearchProduct", "Reflection"):
            console.print(f"[dim]{escape(str(step.action))} {escape(step.text)}[/]")
    if session.advised:
        console.print(f"[dim]It asked you, and wrote {len(session.written)} entries to its memory.[/]")
    elif session.advice is not None:
        console.print("[dim]It asked you, and goes on without your advice.[/]")
    elif session.retrieved:
        console.print(f"[dim]It looked at {len(session.retrieved)} entries of its memory and did not ask.[/]")
    if session.failed:
        console.print(f"[yellow]It has no answer ({session.status}: {escape(session.error)}). Ask another way.[/]")
    else:
        console.print(f"[green]{escape(session.answer or '(nothing)')}[/]")
