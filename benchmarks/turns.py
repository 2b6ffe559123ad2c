"""Competitors that take turns, so that what else a machine does weighs on all alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens that went through the model with a gradient, padding not counted, and seconds."""

    tokens: int
    seconds: float


def matmul_peak() -> float:
    """Operations/s of a large product in float32, the best of a few."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        found.append(2 * 1024**3 / (time.perf_counter() - started))
    return max(found)


def peak_memory(run: Callable[[], Measured]) -> tuple[Measured, float]:
    """What a run measured, and by how many MiB the process grew at most while it ran (Linux; else 0)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    status, before = Path("/proc/self/status"), 0.0
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _kib(status, "VmRSS")
    measured = run()
    return measured, (_kib(status, "VmHWM") - before) / 1024 if before else 0.0


def _kib(status: Path, name: str) -> float:
    return float(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])


def in_turns(competitors: dict[str, Callable[[], Measured]], repeats: int, rate: float) -> dict[str, dict[str, float]]:
    """Medians of each; a first round is not counted. The first competitor is what the others are compared to.

    Every second round goes the other way round: none always comes after the same one.

    Args:
        rate: Floating-point operations per token, over the machine's peak.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}
    for repeat in range(repeats + 1):
        for name in list(competitors)[:: 1 if repeat % 2 else -1]:
            measured, memory = peak_memory(competitors[name])
            if repeat:
                found[name].append((measured.tokens / measured.seconds, memory))
    first = next(iter(found.values()))
    return {
        name: {
            "tokens_per_s": statistics.median(speed for speed, _ in runs),
            "ratio": statistics.median(mine / theirs for (mine, _), (theirs, _) in zip(runs, first, strict=True)),
            "peak_mib": statistics.median(memory for _, memory in runs),
            "share_of_peak": statistics.median(speed for speed, _ in runs) * rate,
        }
        for name, runs in found.items()
    }


def show(title: str, rows: dict[str, dict[str, float]], console: Console) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("tokens/s", "ratio", "peak MiB", "of matmul's peak"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        shares = f"{row['share_of_peak']:.0%}" if row.get("share_of_peak") else ""
        table.add_row(name, f"{row['tokens_per_s']:.0f}", f"{row['ratio']:.2f}", f"{row['peak_mib']:.0f}", shares)
    console.print(table)
