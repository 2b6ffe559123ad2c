"""`agile sft-data`: imitation sessions in a file, played in parallel, which goes on where it was killed.

The first line says of what the sessions were made; each further one is the next job's session, or why it was left out.
Lines are written in the order of the jobs, so the file does not depend on who played them or how often it was killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from agile.batching import Row, session_rows
from agile.build import Setup
from agile.config import RunConfig, flat
from agile.errors import AgileError
from agile.imitation import Imitation, Job, jobs
from agile.judge import answerable, answered_right
from agile.rollout import run_loop
from agile.run_folder import claim, write_atomically, writing
from agile.session_log import JsonLines, read_lines, session_from_json
from agile.types import Item, Session, Stream, to_json

if TYPE_CHECKING:  # the client takes a second to import, and training reads the file alone
    from agile.advice.model import ModelAdvisor

DATA, SUMMARY = "sft-data.jsonl", "sft-data.json"
CHUNK = 64  # sessions that a process plays between two reports

# What sessions are made of, beside questions and tokenizer; paths may differ from machine to machine.
_KEYS = (
    *("seed", "task.advice_price", "task.training_prices", "task.advice_counts", "task.search", "agent.", "prompt."),
    *("memory.encoder", "rollout.max_turns", "rollout.max_session_tokens", "rollout.max_context_tokens"),
    *("rollout.max_action_tokens", "rollout.max_invalid_actions", "sft.sessions_per_item", "sft.judge_yes"),
    *("sft.teacher.model", "sft.teacher.base_url", "sft.judge.model", "sft.judge.base_url", "sft.stronger_model"),
    *("task.preload", "expert"),
)


def build_sft_data(config: RunConfig, out: Path, console: Console, *, workers: int | None = None) -> dict[str, Any]:
    """Write `<out>/sft-data.jsonl`, or what it lacks, and `<out>/sft-data.json`, the summary.

    Args:
        workers: Processes that play; by default one for each processor. A model behind an endpoint is asked from one.

    Returns:
        The summary.

    Raises:
        AgileError: Config, data or folder is not as expected, or the folder holds sessions of another config.
    """
    lock = claim(out, config)
    setup = Setup(config, out)
    streams = setup.train_streams
    setup.embed(streams)
    tokenizer = setup.tokenizer()
    said = _judge(setup, streams)
    path = out / DATA
    todo = list(jobs(streams, config.sft.sessions_per_item))
    done = _resume(path, fingerprint(config, streams, tokenizer))
    with writing(out):
        log = JsonLines(path)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("imitation sessions", total=len(todo), completed=done)
        played = _play(setup, tokenizer, todo[done:], done, workers or os.cpu_count() or 1)
        for records in played:
            with writing(path):
                log.append(records)
            progress.update(bar, advance=len(records))
    log.close()
    summary = {**summarise(path), **said, "skipped_rows": setup.skipped}
    with writing(out):
        write_atomically(out / SUMMARY, json.dumps(summary, indent=2))
    lock.close()
    return summary


def read_rows(
    path: Path, config: RunConfig, streams: Sequence[Stream], tokenizer: PreTrainedTokenizerFast
) -> list[Row]:
    """What imitation learns from, of a file that `agile sft-data` finished with the same config, or of its folder.

    Raises:
        AgileError: There is no such file, it is not finished, or was made of something else.
    """
    path = path / DATA if path.is_dir() else path
    lines = read_lines(path)
    header = next(lines, None)
    _check(path, header, fingerprint(config, streams, tokenizer))
    rows: list[Row] = []
    number = 0
    for record in lines:
        number += 1
        if "session" in record:
            rows += session_rows(session_from_json(record["session"]))
    expected = sum(len(s.items) for s in streams) * config.sft.sessions_per_item
    if number != expected:
        raise AgileError(f"{path}: {number:,} of {expected:,} sessions; start agile sft-data again, it goes on.")
    return rows


def fingerprint(config: RunConfig, streams: Sequence[Stream], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the sessions depend on: settings, and digests of the questions and of the tokenizer."""
    settings = {k: v for k, v in flat(config.model_dump(mode="json")) if k.startswith(_KEYS)}
    asked = [[stream.id, item.id, item.question, item.answer] for stream in streams for item in stream.items]
    return {
        "settings": json.loads(json.dumps(settings)),
        "questions": _digest(json.dumps(asked)),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _check(path: Path, header: Any, expected: dict[str, Any]) -> None:
    if not isinstance(header, dict) or header.keys() != expected.keys():
        raise AgileError(f"{path}: the first line is not that of `agile sft-data`. Build the file with that command.")
    settings, now = header["settings"], expected["settings"]
    keys = [key for key in {**settings, **now} if settings.get(key) != now.get(key)]
    changed = [f"{key} was {settings.get(key)!r}, is {now.get(key)!r}" for key in keys]
    others = {"questions": "other questions", "tokenizer": "another tokenizer"}
    changed += [text for name, text in others.items() if header[name] != expected[name]]
    if changed:
        raise AgileError(
            f"{path} was built of something else: {'; '.join(changed)}. Build it again with this config (agile "
            "sft-data CONFIG out=DIR), or take the config it was built with."
        )


def _resume(path: Path, expected: dict[str, Any]) -> int:
    """How many sessions a file holds; a torn last line is cut off, and a new file begins with what it is made of."""
    if path.exists():
        with path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)
    if not path.exists() or not path.stat().st_size:
        with writing(path):
            log = JsonLines(path)
            log.append([expected])
            log.close()
        return 0
    lines = read_lines(path)
    _check(path, next(lines), expected)
    return sum(1 for _ in lines)


def _judge(setup: Setup, streams: Sequence[Stream]) -> dict[str, Any]:
    """Ask `sft.judge` or `sft.stronger_model`, if there is one, every question; what the summary says of that.

    Questions with gold SQL are searched for whatever a judge says, so it is not paid for them.
    """
    if setup.asks_stronger_model:
        items = {item.id: item for stream in streams for item in stream.items}
        model = cast("ModelAdvisor", setup.advisor(setup.config.sft.stronger_model))
        setup.verdicts, said = answered_right(model, items, setup.task)
        return {"stronger model": said}
    if setup.config.sft.judge is None:
        return {}
    asked = [item for stream in streams for item in stream.items if not item.context.get("sql")]
    shown = {item.id: _shown(setup, item) for item in asked}
    setup.verdicts, said = answerable(setup.config.sft.judge, setup.folder, shown)
    return {"judge": said}


def _shown(setup: Setup, item: Item) -> str:
    """What stands in sight of a question: its prompt without memory, and the paragraphs that a search has to find."""
    return "\n".join([setup.agent.question(item, 0.0, 1.0).strip(), *item.context.get("supporting", {}).values()])


# --------------------------------------------------------------------------------------------------------------------
# Playing


def _play(
    setup: Setup, tokenizer: PreTrainedTokenizerFast, todo: Sequence[Job], first: int, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Records of the jobs in their order, a chunk at a time."""
    if setup.config.sft.teacher is None and min(workers, len(todo) // CHUNK) > 1:
        spawn = multiprocessing.get_context("spawn")  # a fork would share torch's threads and SQLite's handles
        args = (setup.config, setup.folder, tokenizer, setup.train_streams, setup.verdicts)
        with ProcessPoolExecutor(min(workers, len(todo) // CHUNK), spawn, _start_worker, args) as pool:
            starts = range(first, first + len(todo), CHUNK)
            ends = [min(start + CHUNK, first + len(todo)) for start in starts]
            with _deaf_to_interrupts():  # all workers start here
                played = pool.map(_play_numbers, starts, ends)
            yield from played
        return
    imitation = setup.imitation(setup.executor(tokenizer))
    concurrent = 1 if setup.config.sft.teacher is None else setup.config.sft.teacher.max_concurrent
    chunks = _chunks(imitation, todo, concurrent)

    async def chunk() -> list[dict[str, Any]] | None:
        return await anext(chunks, None)

    async def close() -> None:
        if imitation.close is not None:
            await imitation.close()

    with asyncio.Runner() as runner:  # it ends what is being played, also after Ctrl-C
        try:
            while (records := runner.run(chunk())) is not None:
                yield records
        finally:
            runner.run(close())


async def _chunks(imitation: Imitation, todo: Sequence[Job], concurrent: int) -> AsyncIterator[list[dict[str, Any]]]:
    size = max(concurrent, CHUNK // 4)
    for start in range(0, len(todo), size):
        room = asyncio.Semaphore(concurrent)

        async def play(job: Job, room: asyncio.Semaphore = room) -> dict[str, Any]:
            async with room:
                return _record(imitation, await imitation.play(job))

        yield list(await asyncio.gather(*map(play, todo[start : start + size])))


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile do not hear of Ctrl-C, which is for the one that started them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[Imitation, list[Job]] | None = None  # of this process


def _start_worker(
    config: RunConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    streams: Sequence[Stream],
    verdicts: Mapping[str, bool] | None,
) -> None:
    global _worker
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    setup = Setup(config, folder, verdicts)
    _worker = setup.imitation(setup.executor(tokenizer)), list(jobs(streams, config.sft.sessions_per_item))


def _end_with_parent() -> None:
    """Nobody else tells a worker that its parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _play_numbers(start: int, end: int) -> list[dict[str, Any]]:
    assert _worker is not None
    imitation, all_jobs = _worker

    async def play() -> list[dict[str, Any]]:
        return [_record(imitation, await imitation.play(job)) for job in islice(all_jobs, start, end)]

    return run_loop(play())


def _record(imitation: Imitation, session: Session) -> dict[str, Any]:
    """A line of the file; what memory was read is left out, nobody learns from it."""
    if why := imitation.why_left_out(session):
        return {"left_out": why, "id": session.id, "kind": session.kind}
    return {"session": to_json(replace(session, reads=()))}


# --------------------------------------------------------------------------------------------------------------------
# What came of it


def summarise(path: Path) -> dict[str, Any]:
    """How many sessions were kept, by kind of question and by what they end in, and why the others were not."""
    kept: dict[str, Counter[str]] = {}
    left_out: dict[str, Counter[str]] = {}
    tokens = learned = 0
    for record in islice(read_lines(path), 1, None):
        if "session" not in record:
            left_out.setdefault(record["kind"], Counter())[record["left_out"]] += 1
            continue
        session = session_from_json(record["session"])
        kept.setdefault(session.kind, Counter())[_way(session)] += 1
        for segment in session.segments:
            tokens += len(segment.token_ids)
            learned += sum(segment.action_mask)
    return {
        "sessions": sum(c.total() for c in (*kept.values(), *left_out.values())),
        "kept": {kind: dict(sorted(kept[kind].items())) for kind in sorted(kept)},
        "left_out": {kind: dict(sorted(left_out[kind].items())) for kind in sorted(left_out)},
        "tokens": tokens,
        "learned_tokens": learned,
    }


def _way(session: Session) -> str:
    searched = any(step.source == "tool" for step in session.steps)
    return "asks" if session.advised else "searches, answers" if searched else "answers"


def render_summary(summary: dict[str, Any], console: Console) -> None:
    """The summary as a table."""
    table = Table("questions", "sessions", "", "kept or why not")
    for part, word in (("kept", "kept"), ("left_out", "left out")):
        for kind, counts in summary[part].items():
            for why, number in counts.items():
                table.add_row(kind, f"{number:,}", word, why)
    console.print(table)
    num_kept = sum(sum(counts.values()) for counts in summary["kept"].values())
    console.print(
        f"{num_kept:,} of {summary['sessions']:,} sessions kept, {summary['tokens']:,} tokens, of which "
        f"{summary['learned_tokens']:,} are learned."
    )
    if judge := summary.get("judge") or summary.get("stronger model"):
        console.print("; ".join(f"{name}: {said}" for name, said in judge.items()), markup=False, soft_wrap=True)
