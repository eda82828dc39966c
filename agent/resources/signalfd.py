"""signalfd(2): the set of signals it reads.
What it would read are the pending signals, kept with the threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from agent.api import Blocker
from agent.bounds import U64, Nonblocking
from agent.descriptors import OpenFile, Rebuilding, SourceProcess
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.tracee import Tracee

NAME: Final = "signalfd"
NR_signalfd4: Final = 289


class State(msgspec.Struct, frozen=True):
    mask: U64
    flags: Nonblocking


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[signalfd]"


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def capture(file: OpenFile, process: SourceProcess) -> State:
    return State(int(dict(file.info)["sigmask"], 16), file.flags & os.O_NONBLOCK)


def rebuild(state: State, context: Rebuilding) -> int:
    return _signalfd(-1, state.mask, os.O_CLOEXEC | state.flags)


def _signalfd(fd: int, mask: int, flags: int = 0) -> int:
    """A new one (`fd` -1), or another mask for one that there is."""
    result = libc.syscall(NR_signalfd4, fd, ctypes.byref(ctypes.c_uint64(mask)), 8, flags)
    return check(result, "signalfd")


def rouse(state: State, fd: int, process: Tracee) -> Callable[[], None]:
    """Let it have an event (see `agent.silencing`).

    A signal of the process, which blocks all of them, wakes those who wait; who looks then is
    shown signals of its own.
    """
    number = signal.SIGRTMAX
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    _signalfd(fd, 1 << number - 1)
    signal.pthread_kill(threading.get_ident(), number)
    os.kill(process.pid, number)

    def calm() -> None:
        _signalfd(fd, state.mask)
        signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        batch = process.batch()
        mask, at_once = batch.put(struct.pack("<Q", 1 << number - 1)), batch.space(16)
        batch.call("rt_sigtimedwait", arch.NR_rt_sigtimedwait, mask, 0, at_once, 8)
        process.run(process.pid, batch)

    return calm
