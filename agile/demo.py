"""`agile demo`: train and compare, in one go."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from agile.bench import bench
from agile.config import RunConfig
from agile.report import render_table
from agile.training import train


def run_demo(config: RunConfig, out: Path, console: Console, *, resume: bool) -> None:
    """Train on MiniShop, test on unseen worlds, print the table and write the report."""
    train(config, out, resume=resume)
    render_table(bench(config, out, out), console)
    console.print(f"Report: {out / 'report.html'}\nTalk to it: agile chat {out}", soft_wrap=True)
