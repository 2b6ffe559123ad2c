"""Questions through the server's API from many clients at once, with a scripted policy: what the server itself costs.

    python -m benchmarks.serve                                      # SQLite; 200 clients, 20 s
    python -m benchmarks.serve --database postgresql://USER@HOST/NAME   # which it leaves filled

The server is a process, as `agile serve` starts one, with the demo's tasks, prompts and memory (1,000 entries), a
policy that answers all questions but one on its own, and hashed embeddings. The clients are another: each keeps a
connection, and asks as soon as it has an answer. Meanwhile an expert claims and skips the one question, and it is noted
how long it takes until a browser that watches the queue hears of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import socket
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

PASSWORD = "correct horse battery"
PROBE = "refurbished"  # a word of the demo's tokenizer
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def serve(folder: Path, url: str, port: int) -> None:
    """A server until it is killed."""
    from agile.build import Setup
    from agile.config import load_config
    from agile.policies.scripted import ScriptedPolicy
    from agile.serve.database import Database
    from agile.serve.memory import DeskMemory
    from agile.serve.runner import Served
    from agile.serve.server import listen, make_app
    from agile.subjects import subjects
    from agile.types import Action, Fn, MemoryItem, MemoryKind, Reward

    words = ["memory.encoder=hashing", "serve.requests_per_minute=10000000", "serve.wait_s=30"]
    config = load_config(CONFIG, words)
    setup = Setup(config, folder)
    executor = setup.executor(setup.tokenizer())
    executor.score = lambda item, session: Reward({})
    executor.limits = replace(executor.limits, max_stage_s=None)
    items = setup.task.streams("test")[0].items
    products = subjects(setup.task, "minishop")

    def decide(context: str) -> Action:
        if PROBE in context and "answer:" not in context:
            return Action(Fn.SEEK_ADVICE)
        return Action(Fn.PREDICT_ANSWER, "yes")

    database = Database(url)
    memory = DeskMemory(database, setup.encoder)
    known = [f"is number {n} heavy ?" for n in range(1000)]
    named = [(text, items[n % len(items)]) for n, text in enumerate(known)]
    memory.write([MemoryItem(MemoryKind.HISTORY, t, f"{t} -> no", "no", i.group, i.product) for t, i in named])
    policy = ScriptedPolicy(executor.codec, decide)
    served = Served("agile", "scripted", executor, policy, products, 0)
    (folder / "products").write_text("\n".join(products))
    listen(make_app(config, folder, database, served, setup.encoder), host="127.0.0.1", port=port)


@dataclass(slots=True)
class Load:
    """What the clients saw."""

    url: str
    key: str
    products: list[str]
    until: float
    seconds: list[float] = field(default_factory=list)  # of each answered question
    errors: list[str] = field(default_factory=list)
    asked: int = 0

    async def client(self, number: int) -> None:
        """One after the other, by HTTP as plain as it gets: clients share the server's cores."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < self.until:
            self.asked += 1
            words = f"is it {number} or {self.asked} ?"
            body = _body(self.products[self.asked % len(self.products)], words)
            began = time.monotonic()
            try:
                status, said = await _post(reader, writer, self.key, body)
                answer = json.loads(said)["choices"][0]["message"]["content"] if status == 200 else said.decode()
            except (OSError, EOFError, ValueError) as error:
                status, answer = 0, repr(error)
            if status == 200 and answer == "yes":
                self.seconds.append(time.monotonic() - began)
            else:
                self.errors.append(f"{status}: {answer}")
                break
        writer.close()


def _body(product: str, words: str) -> bytes:
    return json.dumps({"model": f"agile/{product}", "messages": [{"role": "user", "content": words}]}).encode()


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str, body: bytes) -> tuple[int, bytes]:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    return int(answer.split(b" ", 2)[1]), await reader.readexactly(length)


def clients(url: str, key: str, products: list[str], number: int, seconds: float, told: Any) -> None:
    """All clients, as a process of their own; what they saw goes to `told`."""
    with suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

    async def run() -> Load:
        load = Load(url, key, products, time.monotonic() + seconds)
        await asyncio.gather(*(load.client(n) for n in range(number)))
        return load

    load = asyncio.run(run())
    used = resource.getrusage(resource.RUSAGE_SELF)
    told.send((load.seconds, load.errors, used.ru_utime + used.ru_stime))


def watched(url: str, key: str, products: list[str], seconds: float) -> list[float]:
    """Seconds from an expert's click to the event that another browser gets, of one click every half second."""
    heard: list[float] = []

    async def run() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as browser:
            page = (await browser.get("/login")).text
            form = {"name": "ann", "password": PASSWORD, "token": _found(r'name="token" value="([^"]+)"', page)}
            assert (await browser.post("/login", data=form)).status_code == 303
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            body = _body(products[0], PROBE)
            asking = asyncio.create_task(browser.post("/v1/chat/completions", content=body, headers=headers))
            while "/claim" not in (page := (await browser.get("/desk/queue")).text):
                await asyncio.sleep(0.1)
            csrf, request = _found(r'name="csrf" value="([^"]+)"', page), _found(r"/desk/requests/(\w+)/claim", page)
            changed = asyncio.Event()

            async def listen() -> None:
                async with browser.stream("GET", "/desk/events") as events:
                    async for line in events.aiter_lines():
                        if line.startswith("data:"):
                            changed.set()

            listening = asyncio.create_task(listen())
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                for action in ("claim", "skip"):
                    await asyncio.sleep(0.5)
                    changed.clear()
                    began = time.monotonic()
                    click = asyncio.create_task(browser.post(f"/desk/requests/{request}/{action}", data={"csrf": csrf}))
                    await asyncio.wait_for(changed.wait(), 30)
                    heard.append(time.monotonic() - began)
                    assert (await click).status_code == 303
            listening.cancel()
            asking.cancel()  # nobody answers it

    asyncio.run(run())
    return heard


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"no {pattern}"
    return match[1]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, url: str, number: int, seconds: float, warm_up: float) -> dict[str, float]:
    """Start a server, load it, and say what came of it."""
    from agile.serve import accounts
    from agile.serve.database import Database

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    server = spawn.Process(target=serve, args=(folder, url, port), daemon=True)
    server.start()
    base = f"http://127.0.0.1:{port}"
    while not _is_up(base):
        assert server.is_alive(), "the server ended"
        time.sleep(0.1)
    database = Database(url)
    for name, role in (("shop", "user"), ("ann", "expert")):
        accounts.add_user(database, name, role, PASSWORD)
    key = accounts.add_key(database, "shop")
    database.close()
    products = (folder / "products").read_text().split()
    for length in (warm_up, seconds):
        mine, theirs = spawn.Pipe()
        load = spawn.Process(target=clients, args=(base, key, products, number, length, theirs), daemon=True)
        before = _cpu_seconds(server.pid or 0)
        load.start()
        heard = watched(base, key, products, length)
        times, errors, used = mine.recv()
        load.join()
        server_s = _cpu_seconds(server.pid or 0) - before
    server.kill()
    times.sort()
    for error in errors[:3]:
        print(error[:300])
    return {
        "questions": len(times),
        "errors": len(errors),
        "per_s": len(times) / seconds,
        "p50_s": statistics.median(times),
        "p99_s": times[int(0.99 * len(times))],
        "event_p50_s": statistics.median(heard),
        "event_max_s": max(heard),
        "server_ms": 1000 * server_s / len(times),
        "clients_ms": 1000 * used / len(times),
    }


def _is_up(base: str) -> bool:
    try:
        return bool(httpx2.get(f"{base}/healthz", timeout=5).status_code == 200)
    except httpx2.HTTPError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--warm-up", type=float, default=3)
    parser.add_argument("--database", help="by default SQLite in a new folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = given.database or f"sqlite:///{folder}/desk.sqlite"
        found = measure(Path(folder), url, given.clients, given.seconds, given.warm_up)
    table = Table("", title=f"{given.clients} clients, {given.seconds:g} s, {url.partition(':')[0]}")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
