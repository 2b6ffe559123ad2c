"""The processes of a run: which one this is, and what it says to the others. Without a launcher there is one.

A launcher (torchrun, deepspeed, a cluster) starts every process with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Whoever fails says why, and the others end in silence, so that nobody waits for a process that is gone.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from agile.errors import AgileError

T = TypeVar("T")

# Nobody is waited for in vain: who fails ends all. One process may still play for hours longer than another.
_PATIENCE = timedelta(days=2)
_LOOK_S = 0.5
_EXIT_S = 60.0  # takes an instant, but for a machine that is busy or was asleep
_EXIT_CODE = 2

_groups: dict[str, Any] = {}  # of gloo: of the main thread, and of the one that collects ahead of training
_store: Any = None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints what is the same on all."""
    return rank() == 0


def join() -> None:
    """Meet the other processes, once; a GPU of its own for each. Does nothing without a launcher.

    Raises:
        AgileError: More processes than GPUs on this machine.
    """
    if "RANK" not in os.environ or _groups:
        return
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise AgileError(
                f"The launcher started process {local + 1} on a machine with {found} GPUs. Start at most one for each: "
                f"--nproc-per-node={found} (torchrun) or --num_gpus={found} (deepspeed)."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    for name in ("main", "other"):
        _groups[name] = dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size() > 1 else None
    if world_size() > 1:
        _watch()


def _group() -> Any:
    return _groups.get("main" if threading.current_thread() is threading.main_thread() else "other")


def check_same_number(what: str, num: int) -> None:
    """Whether there are as many processes as have written something.

    Args:
        what: Begins the message.

    Raises:
        AgileError: There are more or fewer.
    """
    if num == world_size():
        return
    launcher = f"under torchrun --nproc-per-node={num}, or as many processes on several nodes"
    raise AgileError(
        f"{what} was written by {num} process{'es' * (num > 1)}, but now there {'is' if world_size() == 1 else 'are'} "
        f"{world_size()}: what each has saved cannot be cut anew. Go on {launcher if num > 1 else 'without a launcher'}"
        ", or start another run from the agents that this one exported, model.path=RUN/sft (docs/training.md)."
    )


# --------------------------------------------------------------------------------------------------------------------
# What all of them call, in the same order


def gather(item: T) -> list[T]:
    """What each process has, in the order of their ranks, on all of them."""
    if world_size() == 1:
        return [item]
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, item, group=_group())
    return found


def broadcast(item: T) -> T:
    """What the main process has."""
    if world_size() == 1:
        return item
    import torch.distributed as dist

    box = [item]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def barrier() -> None:
    """Wait until all are here."""
    gather(None)


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes, name by name; the same bits on all."""
    if world_size() == 1:
        return dict(values)
    parts = gather(dict(values))
    return {name: sum(part[name] for part in parts) for name in values}


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is within before the others: they find the files that it wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


# --------------------------------------------------------------------------------------------------------------------
# Shares of work


def shares(sizes: Sequence[float], num: int) -> list[list[int]]:
    """Numbers of the items for each of `num` processes: near to the same size in all, each in ascending order.

    The largest first, each to the one that has least (Graham, 1969): at most 4/3 of the best split.

    >>> shares([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(num)]
    loads = [0.0] * num
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += sizes[i]
    return [sorted(part) for part in parts]


def own_share(sizes: Sequence[float]) -> list[int]:
    """The numbers of the items that are this process's."""
    return shares(sizes, world_size())[rank()]


def gather_shares(items: Sequence[T], sizes: Sequence[float]) -> list[T]:
    """All items in order, of which each process has its `own_share`."""
    found = gather(list(items))
    placed = {
        i: item
        for part, own in zip(shares(sizes, world_size()), found, strict=True)
        for i, item in zip(part, own, strict=True)
    }
    return [placed[i] for i in range(len(sizes))]


# --------------------------------------------------------------------------------------------------------------------
# How a run ends when one of its processes fails


def _key(name: str) -> str:
    return f"agile/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _watch() -> None:
    """End this process soon after another has failed, whatever it waits for."""
    global _store
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _store = TCPStore(*address, is_master=False)
    own = TCPStore(*address, is_master=False)  # a client of its own: one waits while another asks

    over = threading.Event()

    def look() -> None:
        with suppress(Exception):  # who keeps the store has ended: the run is over, or its launcher ends it
            while not own.check([_key("ended")]):
                if over.wait(_LOOK_S):
                    return
            sys.stdout.flush()
            os._exit(_EXIT_CODE)

    thread = threading.Thread(target=look, daemon=True, name="agile-ranks")
    thread.start()

    def stop() -> None:  # a thread inside the store's C++ must not meet the end of the interpreter
        over.set()
        thread.join(_EXIT_S)

    atexit.register(stop)


@contextmanager
def failing() -> Iterator[bool]:
    """For a process that fails: whether it is the first of the run, which says why; afterwards all the others end."""
    if _store is None:
        yield is_main()  # nobody waits for it yet, and what is wrong so early is so for all
        return
    try:
        first = _store.add(_key("failed"), 1) == 1
    except Exception:  # who kept the store has failed
        first = False
    if not first:
        time.sleep(4 * _LOOK_S)  # the first one ends us
    try:
        yield first
    finally:
        if first:
            _store.set(_key("ended"), "1")
