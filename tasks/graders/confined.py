"""The inside of a python grader's process: reads a request, gives up every right, runs the grader, writes one line.

Run by `sandbox.py` as a script of its own, with the standard library alone; Linux on x86-64.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

READY = "ready"
FILE_NAME = "<grader>"  # of its source, in tracebacks
DETAIL_LENGTH = 2000
SETUP_FAILED = 91  # exit code

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, number: int, *arguments: Any) -> int:
    """A system call by its number; raises OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


# --------------------------------------------------------------------------------------------------------------------
# Files: Landlock. Rights of its first version, which Linux has from 5.13 on; what later ones add is denied below.

_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_ALL_RIGHTS = (1 << 13) - 1


def allow_only(readable: Sequence[str]) -> None:
    """From now on these files and folders can be read, /dev/null written, and nothing else opened or changed."""
    ruleset = _call("landlock_create_ruleset", 444, struct.pack("=Q", _ALL_RIGHTS), ctypes.c_size_t(8), 0)
    for path in [*readable, os.devnull]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0) | (_WRITE_FILE if path == os.devnull else 0)
        _call("landlock_add_rule", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        os.close(fd)
    _call("landlock_restrict_self", 446, ruleset, 0)
    os.close(ruleset)


# --------------------------------------------------------------------------------------------------------------------
# All else: seccomp. Numbers of x86-64.

_DENIED: dict[str, tuple[int, ...]] = {
    "processes: fork vfork execve execveat": (57, 58, 59, 322),
    "signals: kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo": (62, 200, 234, 129, 297),
    "sockets: socket connect bind listen accept accept4 sendmsg sendmmsg": (41, 42, 49, 50, 43, 288, 46, 307),
    "memory that no limit counts: shmget shmat semget msgget mq_open memfd_create": (29, 30, 64, 68, 240, 319),
    "what others share: shmctl semop semctl semtimedop msgsnd msgrcv msgctl mq_unlink": (
        31,
        65,
        66,
        220,
        69,
        70,
        71,
        241,
    ),
    "other processes: ptrace process_vm_readv, -writev kcmp perf_event_open": (101, 310, 311, 312, 298),
    "priorities: setpriority sched_setparam, -scheduler, -affinity, -attr ioprio_set": (141, 142, 144, 203, 314, 251),
    "pages: migrate_pages move_pages": (256, 279),
    "groups: setpgid setsid": (109, 112),
    "itself: prctl personality seccomp unshare setns chroot pivot_root": (157, 135, 317, 272, 308, 161, 155),
    "modes and owners: chmod fchmod fchmodat chown fchown lchown fchownat": (90, 91, 268, 92, 93, 94, 260),
    "times: utime utimes futimesat utimensat": (132, 235, 261, 280),
    "attributes: set-, lset-, fset-, remove-, lremove-, fremovexattr": (188, 189, 190, 197, 198, 199),
    "files: truncate creat sync syncfs name_to_handle_at open_by_handle_at": (76, 85, 162, 306, 303, 304),
    "watching: inotify_init inotify_init1 fanotify_init": (253, 294, 300),
    "keys: add_key request_key keyctl": (248, 249, 250),
    "kernel: mount umount2 bpf userfaultfd init_module finit_module kexec_load": (165, 166, 321, 323, 175, 313, 246),
    "machine: reboot swapon acct quotactl iopl ioperm": (169, 167, 163, 179, 172, 173),
    "and: modify_ldt syslog vhangup": (154, 103, 153),
    "clocks: settimeofday clock_settime adjtimex clock_adjtime": (164, 227, 159, 305),
}
_FROM_HERE_ON = 424  # pidfd, io_uring, clone3, openat2, ...: as on a kernel that does not have them
_CLONE, _OPEN, _OPENAT, _FCNTL, _IOCTL, _PRLIMIT, _SENDTO = 56, 2, 257, 72, 16, 302, 44
_CLONE_THREAD = 0x10000
_FCNTL_DENIED = (8, 10, 15, 1024, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals; F_SETLEASE, F_NOTIFY
_IOCTL_ALLOWED = (0x5421, 0x5450, 0x5451)  # FIONBIO, FIONCLEX, FIOCLEX

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOTTY, _ENOSYS = _ERRNO | 1, _ERRNO | 25, _ERRNO | 38
_AUDIT_ARCH_X86_64 = 0xC000003E
_LOAD, _RETURN, _EQUAL, _AT_LEAST, _ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45


def _if(test: int, value: int, answer: int) -> list[tuple[int, int, int, int]]:
    """Answer so where the test holds of what was loaded, else go on."""
    return [(test, 0, 1, value), (_RETURN, 0, 0, answer)]


def _argument(call: int, index: int, tests: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """For one system call: the tests of the low half of an argument; what none of them answers is allowed."""
    body = [(_LOAD, 0, 0, 16 + 8 * index)]
    for test in tests:
        body += _if(*test)
    return [(_EQUAL, 0, len(body) + 1, call), *body, (_RETURN, 0, 0, _ALLOW)]


def filter_program() -> bytes:
    """The filter, in classic BPF."""
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += _if(_AT_LEAST, _FROM_HERE_ON, _ENOSYS)
    for numbers in _DENIED.values():
        for number in numbers:
            program += _if(_EQUAL, number, _EPERM)
    program += _argument(_CLONE, 0, [(_ANY_BIT, _CLONE_THREAD, _ALLOW), (_AT_LEAST, 0, _EPERM)])
    program += _argument(_OPEN, 1, [(_ANY_BIT, os.O_TRUNC, _EPERM)])
    program += _argument(_OPENAT, 2, [(_ANY_BIT, os.O_TRUNC, _EPERM)])
    program += _argument(_FCNTL, 1, [(_EQUAL, command, _EPERM) for command in _FCNTL_DENIED])
    program += _argument(_IOCTL, 1, [*((_EQUAL, c, _ALLOW) for c in _IOCTL_ALLOWED), (_AT_LEAST, 0, _ENOTTY)])
    program += _argument(_PRLIMIT, 0, [(_AT_LEAST, 1, _EPERM)])  # of another process
    program += _argument(_SENDTO, 5, [(_AT_LEAST, 1, _EPERM)])  # to an address; without one it is send
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def install_filter() -> None:
    """Let no system call through that reaches beyond this process."""
    program = ctypes.create_string_buffer(filter_program())
    size = len(program) // 8
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", size, ctypes.addressof(program)))
    _call("seccomp", 317, 1, 0, header)


# --------------------------------------------------------------------------------------------------------------------


def confine(request: dict[str, Any]) -> None:
    """Give up what a grader must not have. Raises OSError where the machine does not offer it."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(request["time_s"]) + 1,
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, most in limits.items():
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    _call("prctl", 157, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    # no capabilities, for a user who is root
    _call("capset", 126, struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6))
    allow_only(request["readable"])
    install_filter()


def _detail(error: BaseException) -> str:
    """Where in the grader, what, and the last words."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE_NAME]
    if isinstance(error, SyntaxError) and error.filename == FILE_NAME:
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"[:DETAIL_LENGTH]


def grade(source: str, sample: Any, item: Any) -> dict[str, Any]:
    """`reward`, or `error`."""
    try:
        module: dict[str, Any] = {"__name__": "grader", "__builtins__": __builtins__}
        exec(compile(source, FILE_NAME, "exec"), module)
        value = module["grade"](sample, item)
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            return {"error": f"grade returned {value!r}"[:200] + ", expected a finite number"}
        number = float(value)
        if not math.isfinite(number):
            return {"error": f"grade returned {number}, expected a finite number"}
        return {"reward": number}
    except BaseException as error:  # SystemExit, KeyboardInterrupt and MemoryError are the grader's doing, too
        try:
            return {"error": _detail(error)}
        except BaseException:
            return {"error": type(error).__name__}


def main() -> None:
    # the thread that started this process waits for it; where it dies, so does the grader
    _call("prctl", 157, 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    with open(0, "rb", closefd=False) as stdin:
        request = json.load(stdin)
    if os.getppid() != request["parent"]:  # it died before it could be asked for
        os._exit(SETUP_FAILED)
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd, inheritable=False)
    os.close(null)

    def write(value: Any, write: Callable[[int, bytes], int] = os.write, dumps: Any = json.dumps) -> None:
        write(out, dumps(value).encode() + b"\n")

    sys.path += request["packages"]
    try:
        for module in _preload():
            __import__(module)
        confine(request)
    except (OSError, ValueError) as error:
        write({"server_error": str(error)})
        os._exit(SETUP_FAILED)
    write(READY)
    exit_ = os._exit
    write(grade(request["source"], request["sample"], request["item"]))
    exit_(0)


def _preload() -> Iterator[str]:
    """What Python would import in the middle of things."""
    yield "encodings.idna"
    yield "linecache"


if __name__ == "__main__":
    main()
