"""eventfd(2): a counter and whether it is a semaphore."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from agent.api import Blocker
from agent.bounds import U64, Nonblocking
from agent.descriptors import OpenFile, Rebuilding, SourceProcess

NAME: Final = "eventfd"


class State(msgspec.Struct, frozen=True):
    count: U64
    semaphore: bool
    flags: Nonblocking


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[eventfd]"


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def capture(file: OpenFile, process: SourceProcess) -> State:
    info = dict(file.info)
    count = int(info["eventfd-count"], 16)
    said = info.get("eventfd-semaphore")  # commit 33d8b5d7824f, Linux 6.5
    semaphore = said == "1" if said is not None else acts_as_semaphore(process.duplicate(file.fd), count)
    return State(count, semaphore, file.flags & os.O_NONBLOCK)


def acts_as_semaphore(fd: int, count: int) -> bool:
    """Tried out: from 2 on, reading takes 1 from a semaphore and all from another.

    The count is `count` again then.
    """
    added = max(0, 2 - count)
    if added:
        os.eventfd_write(fd, added)
    taken = os.eventfd_read(fd)
    left = count + added - taken
    if left > count:
        os.eventfd_read(fd)  # a semaphore, which was 0
    elif left < count:
        os.eventfd_write(fd, count - left)
    return taken == 1


def rebuild(state: State, context: Rebuilding) -> int:
    semaphore = os.EFD_SEMAPHORE if state.semaphore else 0
    fd = os.eventfd(0, os.EFD_CLOEXEC | semaphore | state.flags)
    if state.count:
        os.write(fd, state.count.to_bytes(8, "little"))
    return fd
