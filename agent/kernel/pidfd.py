"""pidfd_open(2), pidfd_getfd(2), kcmp(2): a process by descriptor; its own descriptors; signals."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from agent.kernel.errors import check, libc

NR_kcmp: Final = 312
NR_pidfd_send_signal: Final = 424
NR_pidfd_getfd: Final = 438
KCMP_FILE: Final = 0
KCMP_EPOLL_TFD: Final = 7


def getfd(pidfd: int, fd: int) -> int:
    """A duplicate, in our process, of descriptor `fd` of the process behind `pidfd` (close-on-exec)."""
    return check(libc.syscall(NR_pidfd_getfd, pidfd, fd, 0), f"descriptor {fd}")


def compare_files(pid: int, first: int, second: int) -> int:
    """0 if two descriptors of a process are one open file description (offset and flags in common).

    Otherwise -1 or 1, in an order that is the same for as long as the host runs (kcmp(2), KCMP_FILE).
    """
    result = check(
        libc.syscall(NR_kcmp, pid, pid, KCMP_FILE, first, second), f"pid {pid}, fds {first}, {second}"
    )
    return (0, -1, 1)[result]


def same_file(pid: int, first: int, second: int) -> bool:
    return compare_files(pid, first, second) == 0


def send_signal(pidfd: int, number: int, siginfo: bytes | None = None) -> None:
    """To that very process, whoever has its number by now (pidfd_send_signal(2)). ProcessLookupError."""
    info = None if siginfo is None else ctypes.create_string_buffer(siginfo, len(siginfo))
    check(libc.syscall(NR_pidfd_send_signal, pidfd, number, info, 0), f"signal {number}")


def open_process(pid: int) -> int:
    return os.pidfd_open(pid)
