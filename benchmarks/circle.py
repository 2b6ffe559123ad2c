"""From the desk to training and back: does an agent that learns from its desk ask less, and answer no worse?

    python -m benchmarks.circle runs/demo runs/circle                  # a shop like those that the agent learned from
    python -m benchmarks.circle runs/demo runs/circle --shop changed   # one whose facts are mostly the other way round
    python -m benchmarks.circle runs/demo runs/circle --agent sft      # before PPO, when it asks much more

A new shop of twelve products. A user asks the agent that is served; an expert, who knows the shop, answers at the desk
what the agent asks, and reviews all that it answered on its own. `agile train configs/from-desk.yaml` learns from that,
`agile serve-swap` swaps the new agent in, and the user goes on asking. Memory has grown meanwhile, so another server,
with a copy of the database but the old agent, is asked the same: the difference between these two is what training did.

All of it through the server's own doors: the API, the pages of the desk, the command line. Everything random derives
from the seed. A phase whose figures stand in the folder is not played again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from agile.serve import accounts
from agile.serve.database import Database
from agile.tasks.minishop import MiniShopSpec, write_minishop
from agile.tasks.scoring import fold

CONFIGS = Path(__file__).parents[1] / "configs"
PASSWORD = "correct horse battery"
USUAL = MiniShopSpec(1, 1, 600, num_products=12, num_hidden_products=5)  # names that the demo's tokenizer knows
SHOPS = {
    "usual": USUAL,
    # two of three guesses that were right in 95 % of the cases are wrong in as many
    "changed": replace(USUAL, guessable=(0.05, 0.05, 0.95)),
}
POLL_S = 0.1


@dataclass(frozen=True)
class Known:
    """A question of the shop, and all that an expert knows of it."""

    product: str
    question: str
    answers: tuple[str, ...]
    why: str

    @property
    def answer(self) -> str:
        return self.answers[0] if self.answers else "none"

    def is_right(self, said: str) -> bool:
        """As `agile.tasks.productqa` judges: of a search any product that fits."""
        return fold(said) in {fold(answer) for answer in self.answers or ("none",)}


def questions_of(shop: Path) -> list[Known]:
    """The questions of the shop's test world, in order."""
    (path,) = (shop / "test").glob("*/qa.jsonl")
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        gold = row["short_answer"]
        answers = tuple(hit["asin"] for hit in gold) if isinstance(gold, list) else (gold,)
        found.append(Known(row["asin"], row["question"], answers, "" if isinstance(gold, list) else row["long_answer"]))
    return found


# --------------------------------------------------------------------------------------------------------------------
# A server, and people who use it


@contextmanager
def server(out: Path, words: Sequence[str]) -> Iterator[str]:
    """`agile serve` with its folder; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "agile.cli", "serve", str(CONFIGS / "serve.yaml"), f"out={out}", *words]
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=_environment())
        url = f"http://127.0.0.1:{port}"
        try:
            while not _is_up(url):
                if process.poll() is not None:
                    raise SystemExit(f"The server ended; see {log.name}.")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


class Expert:
    """Somebody at the desk who knows the shop: answers what waits, and reviews what the agent answered on its own."""

    def __init__(self, url: str, known: Sequence[Known]) -> None:
        self.known = {(k.product, k.question): k for k in known}
        self.client = httpx2.Client(base_url=url, timeout=60)
        token = _found(r'name="token" value="([^"]+)"', self.client.get("/login").text)
        self.client.post("/login", data={"name": "ann", "password": PASSWORD, "token": token})
        self.csrf = _found(r'name="csrf" value="([^"]+)"', self.client.get("/desk/memory").text)
        self.done = threading.Event()

    def work(self) -> None:
        """Answer until told that it is over."""
        while not self.done.is_set():
            page = self.client.get("/desk/queue/list").text
            for card in re.findall(r"<article.*?</article>", page, re.DOTALL):
                request = _found(r"/desk/requests/(\w+)/claim", card)
                question = unescape(_found(r'class="question">(.*?)</p>', card))
                product = unescape(_found(r'class="muted">(\w+) ·', card))
                self._send(f"/desk/requests/{request}/claim")
                known = self.known[product, question]
                said = {"answer": known.answer, "explanation": known.why, "key": request}
                self._send(f"/desk/requests/{request}/answer", **said)
            time.sleep(POLL_S)

    def review(self, asked: Mapping[str, Known]) -> dict[str, bool]:
        """Review all that nobody has reviewed; which of these answers were right."""
        verdicts: dict[str, bool] = {}
        while cards := re.findall(r'<form class="card.*?</form>', self.client.get("/desk/review").text, re.DOTALL):
            for card in cards:
                question_id = _found(r"/desk/review/(\w+)", card)
                known = asked[question_id]
                right = known.is_right(unescape(_found(r'class="said-by-it">(.*?)</p>', card)))
                verdicts[question_id] = right
                said = {"verdict": "right"} if right else {"verdict": "corrected", "answer": known.answer}
                self._send(f"/desk/review/{question_id}", **said, explanation=known.why, key=f"of {question_id}")
        return verdicts

    def _send(self, path: str, **form: str) -> None:
        answer = self.client.post(path, data={"csrf": self.csrf, **form})
        if answer.status_code != 303:
            raise SystemExit(f"{path} was answered with {answer.status_code}: {answer.text[:300]}")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    if match is None:
        raise SystemExit(f"no {pattern} in {text[:500]}")
    return match[1]


def play(url: str, database: Path, asked: Sequence[Known], known: Sequence[Known], price: float) -> dict[str, Any]:
    """Ask everything, one after the other, have it answered and reviewed; the figures."""
    with closing(Database(f"sqlite:///{database}")) as opened:
        key = accounts.add_key(opened, "shop")
    expert = Expert(url, known)
    thread = threading.Thread(target=expert.work, daemon=True)
    thread.start()
    by_id: dict[str, Known] = {}
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=600) as client:
        for question in asked:
            body = {
                "model": "agile",
                "metadata": {"product": question.product},
                "messages": [{"role": "user", "content": question.question}],
            }
            said = client.post("/v1/chat/completions", json=body).json()
            by_id[said["agile"]["answer_id"]] = question
    expert.done.set()
    thread.join()
    verdicts = expert.review(by_id)
    with closing(sqlite3.connect(database)) as connection:
        rows = {row[0]: row[1:] for row in connection.execute("SELECT id, status, advised, answer FROM questions")}
    advised = [bool(rows[i][1]) for i in by_id]
    right = [
        rows[i][0] == "answered" and (bool(rows[i][1]) or verdicts[i]) for i in by_id
    ]  # what an expert said counts as right, as in training
    rate, accuracy = sum(advised) / len(by_id), sum(right) / len(by_id)
    return {
        "questions": len(by_id),
        "advice_rate": rate,
        "reviewed": len(verdicts),
        "reviewed_accuracy": sum(verdicts.values()) / max(1, len(verdicts)),
        "failed": sum(rows[i][0] == "failed" for i in by_id),
        "accuracy": accuracy,
        "score": accuracy - price * rate,
    }


# --------------------------------------------------------------------------------------------------------------------
# The circle


def circle(
    run: Path, out: Path, *, agent: str, spec: MiniShopSpec, number: int, seed: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Play all phases that the folder lacks, of so many questions each; figures by phase."""
    out.mkdir(parents=True, exist_ok=True)
    shop, served, control, trained = (out / name for name in ("shop", "serve", "control", "from-desk"))
    figures: dict[str, Any] = {}
    if (kept := out / "circle.json").exists():
        figures = json.loads(kept.read_text())
    if not shop.exists():
        write_minishop(shop, replace(spec, num_questions=2 * number), seed)
    known = questions_of(shop)
    first, second = known[:number], known[number:]
    words = [f"serve.run={run}", f"serve.agent={agent}", f"task.data={shop}", "serve.wait_s=600"]
    price = 0.3

    def keep(phase: str, found: dict[str, Any]) -> None:
        figures[phase] = found
        kept.write_text(json.dumps(figures, indent=2))

    if "before" not in figures:
        shutil.rmtree(served, ignore_errors=True)
        with closing(Database(f"sqlite:///{served / 'desk.sqlite'}")) as database:
            accounts.add_user(database, "shop", "user", PASSWORD)
            accounts.add_user(database, "ann", "expert", PASSWORD)
        with server(served, words) as url:
            keep("before", play(url, served / "desk.sqlite", first, known, price))
    if "control" not in figures:
        shutil.rmtree(control, ignore_errors=True)
        control.mkdir()
        with (
            closing(sqlite3.connect(served / "desk.sqlite")) as source,
            closing(sqlite3.connect(control / "desk.sqlite")) as copy,
        ):
            source.backup(copy)
        with server(control, words) as url:
            keep("control", play(url, control / "desk.sqlite", second, known, price))
    if "after" not in figures:
        began = time.monotonic()
        if not (trained / "ppo" / "config.json").exists():
            command("train", CONFIGS / "from-desk.yaml", f"task.desk.served={served}", f"out={trained}", *overrides)
        seconds = time.monotonic() - began
        with server(served, words) as url:
            command("serve-swap", trained, CONFIGS / "serve.yaml", f"out={served}")
            found = play(url, served / "desk.sqlite", second, known, price)
            keep("after", found | {"training_s": seconds})
            command("serve-swap", "--back", CONFIGS / "serve.yaml", f"out={served}")
    return figures


def command(*words: str | Path) -> None:
    """Run `agile`."""
    subprocess.run([sys.executable, "-m", "agile.cli", *map(str, words)], check=True, env=_environment())


def render(figures: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The figures as a table."""
    names = {
        "before": "first questions, agent as it was",
        "control": "next questions, agent as it was",
        "after": "next questions, trained from the desk",
    }
    table = Table("", "questions", "asked", "own answers right", "of", "failed", "accuracy", "score")
    for phase, name in names.items():
        f = figures[phase]
        shares = [f"{f[key]:.3f}" for key in ("advice_rate", "reviewed_accuracy", "accuracy", "score")]
        row = (str(f["questions"]), shares[0], shares[1], str(f["reviewed"]), str(f["failed"]), shares[2], shares[3])
        table.add_row(name, *row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a trained run of MiniShop, as of agile demo")
    parser.add_argument("out", type=Path)
    parser.add_argument("--agent", choices=("sft", "ppo"), default="ppo")
    parser.add_argument("--shop", choices=SHOPS, default="usual")
    parser.add_argument("--questions", type=int, default=300, help="asked in each phase")
    parser.add_argument("--seed", type=int, default=1000, help="of the shop; those of the run are 0, 1, ...")
    parser.add_argument("overrides", nargs="*", help="changes of the training run, a.b=value", metavar="a.b=value")
    args = parser.parse_intermixed_args()
    figures = circle(
        args.run.resolve(),
        args.out.resolve(),
        agent=args.agent,
        spec=SHOPS[args.shop],
        number=args.questions,
        seed=args.seed,
        overrides=args.overrides,
    )
    render(figures, Console(width=140))


if __name__ == "__main__":
    main()
