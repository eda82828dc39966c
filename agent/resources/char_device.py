"""Memory devices without state: /dev/null, zero, full, random, urandom (mem(4), random(4))."""

from __future__ import annotations

import os
import stat
from typing import Final

import msgspec

from agent.api import Blocker
from agent.bounds import U31
from agent.descriptors import REOPEN_FLAGS, OpenFile, Rebuilding, SourceProcess, not_agreed

NAME: Final = "character-device"
DEVICES: Final = {3: "/dev/null", 5: "/dev/zero", 7: "/dev/full", 8: "/dev/random", 9: "/dev/urandom"}


class State(msgspec.Struct, frozen=True):
    minor: U31
    flags: U31


def validate(state: State) -> None:
    """ValueError for a received state that is none."""
    if state.minor not in DEVICES or state.flags & ~REOPEN_FLAGS:
        raise ValueError(f"device {state.minor}, flags {state.flags:#o}")


def recognise(file: OpenFile) -> bool:
    return stat.S_ISCHR(file.mode) and os.major(file.device) == 1 and os.minor(file.device) in DEVICES


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def capture(file: OpenFile, process: SourceProcess) -> State:
    return State(os.minor(file.device), file.flags & REOPEN_FLAGS)


def rebuild(state: State, context: Rebuilding) -> int:
    if state.minor not in DEVICES:
        raise not_agreed(f"memory device {state.minor}")
    fd = os.open(DEVICES[state.minor], state.flags | os.O_CLOEXEC)
    if os.fstat(fd).st_rdev != os.makedev(1, state.minor):
        os.close(fd)
        raise OSError(19, "is another device here", DEVICES[state.minor])
    return fd
