"""What tests ask of the machine that they run on, which others use too."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, for a program that must be told its port.

    It lies below those that the kernel gives to whoever asks for any, so that no connection or other server takes it
    before the program does.
    """
    while True:
        port = random.SystemRandom().randint(12_000, 32_000)
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def lives(pid: int | str) -> bool:
    """Whether a process runs: one that has ended may stay listed where nobody asks how it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "\nState:\tZ" not in status
