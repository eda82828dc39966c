"""epoll(7): what it watches, with events and data.
Entries are made by the process itself once its descriptors stand.

An entry is bound to an open file description under a descriptor number. One whose number was closed while the
description lives on cannot be registered again, and is refused.

An EPOLLONESHOT entry that has fired is silent until the program arms it again: the kernel has taken away all
its events. No call makes such an entry, for EPOLL_CTL_ADD and MOD always add EPOLLERR and EPOLLHUP; so it is
made with every event there is, and fires here (`agent.silencing`).
"""

from __future__ import annotations

import os
import re
import select
import struct
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from agent.api import Blocker
from agent.bounds import U32, U64, FileDescriptor
from agent.descriptors import OpenFile, Rebuilding, SourceProcess
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.kernel.pidfd import KCMP_EPOLL_TFD, NR_kcmp
from agent.tracee import Batch, Tracee

NAME: Final = "epoll"
EPOLL_CTL_ADD: Final = 1
EPOLLONESHOT: Final = 1 << 30
# fs/eventpoll.c EP_PRIVATE_BITS: what is left of an entry's events when it has fired
# (EPOLLET, EPOLLONESHOT, EPOLLWAKEUP, EPOLLEXCLUSIVE)
_PRIVATE_BITS: Final = 1 << 31 | EPOLLONESHOT | 1 << 29 | 1 << 28
_EVERY_EVENT: Final = 0x27FF  # EPOLLIN ... EPOLLMSG, EPOLLRDHUP
_ENTRY: Final = re.compile(r"(\d+)\s+events:\s*([0-9a-f]+)\s+data:\s*([0-9a-f]+)")


class Entry(msgspec.Struct, frozen=True):
    fd: FileDescriptor
    events: U32
    data: U64

    @property
    def fired(self) -> bool:
        """An EPOLLONESHOT entry that waits to be armed again."""
        return bool(self.events & EPOLLONESHOT) and not self.events & ~_PRIVATE_BITS


class State(msgspec.Struct, frozen=True):
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=1 << 20)]


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[eventpoll]"


def entries(info: list[tuple[str, str]]) -> list[Entry]:
    found = []
    for name, value in info:
        match = _ENTRY.match(value) if name == "tfd" else None
        if match:
            found.append(Entry(int(match[1]), int(match[2], 16), int(match[3], 16)))
    return found


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return [
        Blocker(
            kind="epoll-stale-entry",
            what=file.name,
            why=f"it watches a file under descriptor {entry.fd}, which was closed or is another file now",
            hint="remove the entry before closing the descriptor",
        )
        for entry in entries(file.info)
        if not _still_there(process.pid, file.fd, entry)
    ]


def _still_there(pid: int, epoll: int, entry: Entry) -> bool:
    slot = struct.pack("<III", epoll, entry.fd, 0)
    result = libc.syscall(NR_kcmp, pid, pid, KCMP_EPOLL_TFD, entry.fd, slot)
    return int(result) == 0


def capture(file: OpenFile, process: SourceProcess) -> State:
    return State(tuple(entries(file.info)))


def stale(files: list[OpenFile], pid: int) -> list[str]:
    """Cheap check for the freeze: entries whose descriptor number is not open at all."""
    numbers = {n for f in files for n, _ in f.numbers}
    return [f.name for f in files if recognise(f) for e in entries(f.info) if e.fd not in numbers]


def rebuild(state: State, context: Rebuilding) -> int:
    return check(libc.epoll_create1(os.O_CLOEXEC), "epoll")


def add_entries(batch: Batch, fd: int, state: State, fired: bool) -> None:
    """In the process, when all descriptors are in place: epoll_ctl(2) with `struct epoll_event` (packed).

    Entries that have fired come first, armed for everything, and must be silenced before the
    others are added.
    """
    for entry in state.entries:
        if entry.fired == fired:
            event = batch.put(struct.pack("<IQ", entry.events | (_EVERY_EVENT if fired else 0), entry.data))
            batch.call(f"epoll_ctl {entry.fd}", arch.NR_epoll_ctl, fd, EPOLL_CTL_ADD, entry.fd, event)


def rouse(state: State, fd: int, process: Tracee) -> Callable[[], None]:
    """Let it have an event (see `agent.silencing`): an entry for an eventfd that is always ready."""
    ready = os.eventfd(1, os.EFD_CLOEXEC)
    watch = select.epoll.fromfd(os.dup(fd))
    watch.register(ready, select.EPOLLIN)

    def calm() -> None:
        watch.unregister(ready)
        watch.close()
        os.close(ready)

    return calm
