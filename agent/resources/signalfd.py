"""signalfd(2): the set of signals it reads. What it would read are the pending signals, kept with the threads."""

from __future__ import annotations

import ctypes
import os
from typing import Final

import msgspec

from agent.api import Blocker
from agent.descriptors import OpenFile, Rebuilding, SourceProcess
from agent.kernel.errors import check, libc

NAME: Final = "signalfd"
NR_signalfd4: Final = 289


class State(msgspec.Struct, frozen=True):
    mask: int
    flags: int


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[signalfd]"


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def capture(file: OpenFile, process: SourceProcess) -> State:
    return State(int(dict(file.info)["sigmask"], 16), file.flags & os.O_NONBLOCK)


def rebuild(state: State, context: Rebuilding) -> int:
    mask = ctypes.c_uint64(state.mask)
    result = libc.syscall(NR_signalfd4, -1, ctypes.byref(mask), 8, os.O_CLOEXEC | state.flags)
    return check(result, "signalfd")
