"""clone3(2) with a chosen number, unshare(2), mount(2): how a process of a given identity comes to be."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from typing import Final

from agent.kernel.errors import check, libc

NR_clone3: Final = 435
CLONE_VM: Final = 0x100
CLONE_FS: Final = 0x200
CLONE_FILES: Final = 0x400
CLONE_SIGHAND: Final = 0x800
CLONE_THREAD: Final = 0x10000
CLONE_NEWNS: Final = 0x20000
CLONE_SYSVSEM: Final = 0x40000
CLONE_CHILD_CLEARTID: Final = 0x200000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWTIME: Final = 0x80

THREAD: Final = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM
CLONE_ARGS_SIZE: Final = 88
CLOSE_RANGE_CLOEXEC: Final = 4
PR_SET_NAME: Final = 15

MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19

# does not give up the GIL: the child of a raw clone must not meet a lock that nobody holds any more
_held = ctypes.PyDLL(None, use_errno=True)
_held.syscall.restype = ctypes.c_long


def clone_args(flags: int, set_tid: int, exit_signal: int = 0) -> bytes:
    """`struct clone_args`; `set_tid` is the address of an array with one pid_t, 0 for any number."""
    return struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, 1 if set_tid else 0, 0)


class LimitReached(OSError):
    """No more processes, threads or namespaces can be made."""


def limit_of(error: OSError) -> LimitReached | None:
    """What a failed fork(2), clone3(2) or unshare(2) means by it; None if it is something else."""
    if error.errno in (errno.EAGAIN, errno.ENOSPC, errno.EUSERS):
        return LimitReached(error.errno, error.strerror, error.filename)
    return None


def fork() -> int:
    """fork(2). LimitReached."""
    try:
        return os.fork()
    except BlockingIOError as error:
        raise LimitReached(error.errno, error.strerror, "fork") from None


def fork_as(pid: int) -> int:
    """The same, but the child's number in this pid namespace is `pid`. FileExistsError if it is taken."""
    number = ctypes.c_int(pid)
    arguments = ctypes.create_string_buffer(
        clone_args(0, ctypes.addressof(number), exit_signal=signal.SIGCHLD), CLONE_ARGS_SIZE
    )
    try:
        return check(_held.syscall(NR_clone3, arguments, CLONE_ARGS_SIZE), f"pid {pid}")
    except OSError as error:
        raise limit_of(error) or error from None


def unshare(flags: int) -> None:
    """LimitReached, OSError."""
    try:
        check(libc.unshare(flags), f"unshare {flags:#x}")
    except OSError as error:
        raise limit_of(error) or error from None


def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    check(libc.mount(source.encode(), target.encode(), kind.encode(), flags, None), f"mount {target}")


def set_name(name: str) -> None:
    """What ps(1) shows of the calling thread: 15 bytes."""
    check(libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0), "PR_SET_NAME")


def close_all_on_exec() -> None:
    check(libc.close_range(0, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC), "close_range")


def time_offsets() -> tuple[int, int]:
    """(monotonic, boottime) offsets of our time namespace to the initial one, in ns (time_namespaces(7))."""
    found = {"monotonic": 0, "boottime": 0}
    with open("/proc/self/timens_offsets") as file:
        for line in file:
            name, seconds, nanoseconds = line.split()
            found[name] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return found["monotonic"], found["boottime"]


def set_time_offsets(monotonic: int, boottime: int) -> None:
    """Offsets, in ns, for the time namespace of our next child (after `unshare(CLONE_NEWTIME)`)."""
    offsets = (("monotonic", monotonic), ("boottime", boottime))
    lines = (f"{name} {ns // 1_000_000_000} {ns % 1_000_000_000}\n" for name, ns in offsets)
    with open("/proc/self/timens_offsets", "w") as file:
        file.write("".join(lines))


def exec_image(image: bytes, name: str) -> None:
    """Become the program in `image`, with no arguments and an empty environment. Does not return."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, image)
    os.execve(fd, [name], {})
