"""Python graders in a process of their own, confined by the kernel: time, memory, threads, no files, no network."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agile.tasks.graders import confined
from agile.tasks.graders.result import GraderErrors, error

MAX_ANSWER_BYTES = 64 * 1024
_POLL_S = 0.05
_LAST_BREATH_S = 1.0
# The same order of sets and hashes in every run, and one thread for libraries of linear algebra.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a python grader may take; the first two are those of the hosted service.

    Attributes:
        time_s: Seconds on the wall, the start of Python (some 50 ms) included.
        memory_bytes: Of address space, libraries included.
        num_threads: A grader has one process; threads beyond these end it within 50 ms.
        file_bytes: Of one file; nothing but /dev/null can be written anyway.
    """

    time_s: float = 120.0
    memory_bytes: int = 2 << 30
    num_threads: int = 64
    file_bytes: int = 1 << 20


def run_python(
    source: str, sample: Mapping[str, Any], item: Mapping[str, Any], limits: Limits | None = None
) -> tuple[float, GraderErrors]:
    """The reward of `grade(sample, item)` and what went wrong; 0 if something did. When it returns, nothing is left.

    What comes from the process is checked as if a stranger had written it: one line, a finite number or an error.
    """
    limits = limits or Limits()
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return 0.0, error("python_grader_server_error", f"python graders are confined on Linux x86-64 only{_REMEDY}")
    request = {
        "parent": os.getpid(),
        "source": source,
        "sample": sample,
        "item": item,
        "readable": readable_paths(),
        "packages": package_folders(),
        "time_s": limits.time_s,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
    }
    started = time.monotonic()
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            # -P and -s: nothing of the current folder or of the user's; -S: no .pth file, which would be run
            [sys.executable, "-P", "-s", "-S", confined.__file__],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    try:
        answer, ended_by = _listen(process, started + limits.time_s, limits.num_threads)
        if not ended_by:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_BREATH_S)  # for how it ended
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return _read(answer, ended_by, process.returncode, limits)


_REMEDY = "; a grader that you trust can run without: put it in a module, as a `function` grader"


@cache
def package_folders() -> list[str]:
    """Where installed packages are; a grader may import them."""
    return sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})


@cache
def readable_paths() -> list[str]:
    """What a grader can read: Python, installed packages, shared libraries, time zones."""
    base = Path(sys.base_prefix)
    own = {*package_folders(), *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib"))}
    libraries = {
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/usr/share/zoneinfo",
    }
    if base != Path("/usr"):
        libraries.add(str(base / "lib"))
    return sorted(own | libraries | {"/dev/urandom"})


def _listen(process: subprocess.Popen[bytes], deadline: float, num_threads: int) -> tuple[bytes, str]:
    """What the process wrote until it ended, and why it has to be ended, if it has."""
    assert process.stdout is not None
    fd, answer = process.stdout.fileno(), b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], min(left, _POLL_S))[0]:
            chunk = os.read(fd, MAX_ANSWER_BYTES)
            answer += chunk
            if not chunk or len(answer) > MAX_ANSWER_BYTES:
                return answer, ""
        elif (threads := _num_threads(process.pid)) > num_threads:
            return b"", f"it had {threads} threads, at most {num_threads} are allowed"
    return b"", "time"


def _num_threads(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return int(status.partition("\nThreads:")[2].split(maxsplit=1)[0] or 0)


def _read(answer: bytes, ended_by: str, code: int, limits: Limits) -> tuple[float, GraderErrors]:
    runtime = "python_grader_runtime_error"
    if ended_by == "time":
        errors = error(runtime, f"no answer within {limits.time_s:g} s; it was ended")
        return 0.0, GraderErrors(unresponsive_reward_error=True) | errors
    if ended_by:
        return 0.0, error(runtime, ended_by)
    try:
        said = [json.loads(line) for line in answer.decode().splitlines()]
    except (ValueError, RecursionError):
        return 0.0, error(runtime, "it wrote to where its reward goes")
    match said:
        case [{"server_error": str(reason)}]:
            return 0.0, error("python_grader_server_error", f"cannot be confined here: {reason}{_REMEDY}")
        case [confined.READY, {"reward": int() | float() as reward}] if _is_finite(reward):
            return float(reward), GraderErrors()
        case [confined.READY, {"error": str(text)}]:
            return 0.0, error(runtime, text)
        case [confined.READY]:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with code {code}"
            starved = code in (-signal.SIGSEGV, -signal.SIGKILL, -signal.SIGABRT)
            memory = f" ({limits.memory_bytes >> 20} MiB of memory are allowed)" if starved else ""
            return 0.0, error(runtime, f"its process {how} before it answered{memory}")
        case []:
            return 0.0, error("python_grader_server_error", f"Python did not start (code {code})")
    return 0.0, error(runtime, "it wrote to where its reward goes")


def _is_finite(value: float) -> bool:
    return not isinstance(value, bool) and abs(value) < float("inf")
