"""Epoll entries that had fired (EPOLLONESHOT): the shadow's are made to fire too; nothing else silences one.

The shadow has them armed for every event. Most descriptions have one (room to write); those that have none
are given one for a moment by their kind's `rouse(state, fd, shadow)`, which returns what takes it away
again. The event is collected here, through our own duplicate of the epoll: nobody else waits on it, and it
has no other entries yet.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Any, Final

from agent import kinds
from agent.descriptors import Descriptor, Refusal
from agent.kernel import pidfd, procfs
from agent.resources import epoll
from agent.shadow import Shadow

_BY_NAME: Final[dict[str, Any]] = {kind.NAME: kind for kind in kinds.KINDS}


def add_fired_entries(shadow: Shadow, descriptors: Sequence[Descriptor]) -> None:
    """Add the entries that have fired to all epolls, silent. Refusal if one of them cannot be silenced."""
    states = [(d.numbers[0][0], kinds.decode(d)) for d in descriptors if d.kind == epoll.NAME]
    fired = [(fd, state) for fd, state in states if any(e.fired for e in state.entries)]
    if not fired:
        return
    batch = shadow.batch()
    for fd, state in fired:
        epoll.add_entries(batch, fd, state, fired=True)
    shadow.run(shadow.pid, batch)
    by_number = {number: d for d in descriptors for number, _ in d.numbers}
    process = pidfd.open_process(shadow.pid)
    try:
        for fd, _ in fired:
            _silence(shadow, process, fd, by_number)
    finally:
        os.close(process)


def _silence(shadow: Shadow, process: int, fd: int, by_number: dict[int, Descriptor]) -> None:
    watch = select.epoll.fromfd(pidfd.getfd(process, fd))
    with watch:
        _collect(watch)
        for entry in _armed(watch):
            _fire(shadow, watch, by_number[entry.fd], pidfd.getfd(process, entry.fd))
        for entry in _armed(watch):
            message = (
                f"epoll {fd}: the fired one-shot entry of descriptor {entry.fd} cannot be made silent here"
            )
            raise Refusal("epoll-entry", message)


def _fire(shadow: Shadow, watch: select.epoll, watched: Descriptor, ours: int) -> None:
    rouse = getattr(_BY_NAME[watched.kind], "rouse", None)
    try:
        if rouse is not None:
            calm = rouse(kinds.decode(watched), ours, shadow)
            try:
                _collect(watch)
            finally:
                calm()
    finally:
        os.close(ours)


def _armed(watch: select.epoll) -> list[epoll.Entry]:
    return [e for e in epoll.entries(procfs.fdinfo(os.getpid(), watch.fileno())) if not e.fired]


def _collect(watch: select.epoll) -> None:
    """All events that there are: as many as fit into one answer at a time, each of them only once."""
    while watch.poll(0):
        pass
