"""eventfd(2): a counter and whether it is a semaphore."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from agent.api import Blocker
from agent.descriptors import OpenFile, Rebuilding, SourceProcess

NAME: Final = "eventfd"


class State(msgspec.Struct, frozen=True):
    count: int
    semaphore: bool
    flags: int


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[eventfd]"


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def capture(file: OpenFile, process: SourceProcess) -> State:
    info = dict(file.info)
    semaphore = info.get("eventfd-semaphore", "0") == "1"
    return State(int(info["eventfd-count"], 16), semaphore, file.flags & os.O_NONBLOCK)


def rebuild(state: State, context: Rebuilding) -> int:
    semaphore = os.EFD_SEMAPHORE if state.semaphore else 0
    fd = os.eventfd(0, os.EFD_CLOEXEC | semaphore | state.flags)
    if state.count:
        os.write(fd, state.count.to_bytes(8, "little"))
    return fd
