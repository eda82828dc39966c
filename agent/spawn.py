"""How a shadow is born: with the wanted number, clocks and session, stopped before its first instruction.

    engine --fork--> helper: new time namespace; number taken? new pid and mount namespaces, a reaper as pid 1
                       --clone3(set_tid)--> child: says hello over the channel, waits, executes the seed
    engine: seizes the child (EXITKILL), lets it go on, and finds it stopped at exec.

The channel is a unix socket whose other end stays open in the shadow: descriptors are handed over through it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import traceback
from typing import Final

import msgspec

from agent import launch, privileges, reasons
from agent.kernel import clone, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc

SHADOW_OPTIONS: Final = ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_TRACECLONE
_TIMEOUT: Final = 20.0


class Wanted(msgspec.Struct, frozen=True):
    """What the new process must be from birth, for nobody can change it later."""

    pid: int
    session_leader: bool
    monotonic_delta: int  # nanoseconds that its clocks are ahead of ours
    boottime_delta: int
    taken: frozenset[int] = frozenset()  # thread numbers that must be free too


class Spawned(msgspec.Struct, frozen=True):
    pid: int  # as this agent sees it
    new_pid_namespace: bool
    channel: socket.socket
    channel_fd: int  # the descriptor of the other end in the shadow


class SpawnFailed(Exception):
    """`kind` as in a report."""

    def __init__(self, message: str, kind: str = "spawn-failed") -> None:
        super().__init__(message)
        self.kind = kind


def spawn(wanted: Wanted, seed: bytes, channel_fd: int) -> Spawned:
    """Make the process; it is seized with EXITKILL and stopped right after exec of `seed`. SpawnFailed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(_TIMEOUT)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    separate = not _numbers_free({wanted.pid, *wanted.taken})
    helper = clone.fork()
    if helper == 0:
        _in_child(lambda: _helper(wanted, seed, theirs, channel_fd, separate), theirs)
    theirs.close()
    pid = _hello(ours)
    os.waitpid(helper, 0)
    ptrace.seize(pid, SHADOW_OPTIONS | ptrace.PTRACE_O_TRACEEXEC)
    ours.send(b"g")
    try:
        status = ptrace.wait(pid)
    except ptrace.TaskEnded:
        _hello(ours)  # it says why
        raise
    if ptrace.event(status) != ptrace.PTRACE_EVENT_EXEC:
        raise SpawnFailed(f"the shadow stopped with status {status:#x} before its seed ran")
    ptrace.set_options(pid, SHADOW_OPTIONS)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    return Spawned(pid, separate, ours, channel_fd)


def _numbers_free(numbers: set[int]) -> bool:
    """Whether the numbers can be had in our pid namespace. A zombie keeps its number: only set_tid knows."""
    return not any(os.path.exists(f"/proc/{n}") for n in numbers)


def _hello(ours: socket.socket) -> int:
    """The child's message: its number as we see it (the kernel translates, unix(7) SCM_CREDENTIALS)."""
    data, control, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(12))
    if data != b"h":
        name, _, why = data.decode("utf-8", "replace").partition(" ")
        raise SpawnFailed(why or "the shadow ended at its birth", name or "spawn-failed")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return int(struct.unpack("iII", payload)[0])
    raise SpawnFailed("the shadow's credentials did not arrive")


def _in_child(work: object, theirs: socket.socket) -> None:
    """Run in a forked child: whatever goes wrong is said over the channel, and the child ends."""
    try:
        work()  # type: ignore[operator]
    except BaseException as error:
        traceback.print_exc()
        why = reasons.explained(error)
        theirs.send(f"{reasons.kind(why)} {reasons.message(why)}".encode()[:4000])
    finally:
        os._exit(1)


def _helper(wanted: Wanted, seed: bytes, theirs: socket.socket, channel_fd: int, separate: bool) -> None:
    privileges.take_back()
    if wanted.monotonic_delta or wanted.boottime_delta:
        monotonic, boottime = clone.time_offsets()
        clone.unshare(clone.CLONE_NEWTIME)
        clone.set_time_offsets(monotonic + wanted.monotonic_delta, boottime + wanted.boottime_delta)
    if separate:
        clone.unshare(clone.CLONE_NEWPID | clone.CLONE_NEWNS)
        if clone.fork() == 0:
            _in_child(lambda: _reaper(wanted, seed, theirs, channel_fd), theirs)
    elif clone.fork_as(wanted.pid) == 0:
        _in_child(lambda: _child(wanted, seed, theirs, channel_fd), theirs)
    os._exit(0)


def _reaper(wanted: Wanted, seed: bytes, theirs: socket.socket, channel_fd: int) -> None:
    """pid 1 of a new pid namespace: its own /proc, the one child, then a few bytes that reap for ever."""
    clone.mount("none", "/", "none", clone.MS_REC | clone.MS_SLAVE)
    clone.mount("proc", "/proc", "proc")
    if clone.fork_as(wanted.pid) == 0:
        _in_child(lambda: _child(wanted, seed, theirs, channel_fd), theirs)
    os.setsid()
    os.chdir("/")
    clone.close_all_on_exec()
    clone.exec_image(arch.reaper_elf(), "migrate-reaper")


def _child(wanted: Wanted, seed: bytes, theirs: socket.socket, channel_fd: int) -> None:
    if wanted.session_leader:
        os.setsid()
    launch.raise_descriptor_limit()
    _default_signals()
    theirs.send(b"h")
    if theirs.recv(1) != b"g":
        os._exit(1)
    clone.close_all_on_exec()
    os.dup2(theirs.fileno(), channel_fd, inheritable=True)
    clone.exec_image(seed, "migrate-shadow")


def _default_signals() -> None:
    """What is ignored, and the mask, would go into the seed. Raw calls: 32, 33 are glibc's (posix_spawn)."""
    default = ctypes.create_string_buffer(32)
    for number in set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP}:
        check(libc.syscall(arch.NR_rt_sigaction, number, default, None, 8), f"signal {number}")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
