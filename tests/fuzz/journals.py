"""Targets in a host's own files: journals, which an agent of another version may have left, or cut short."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fuzz.mutate import mutate_msgpack
from fuzz.streams import ADDRESS, CONNECTION, LISTENER
from fuzz.target import Target

from agent import journal
from agent.api import SshOptions
from agent.journal import Arrival, Departure, Rest, Socket, Task

_TASK = Task(pid=1234, born=99)
_DEPARTURE = Departure(
    process=_TASK,
    agent=_TASK,
    destination="root@beta:22",
    ssh=SshOptions(identity=("/root/.ssh/id",)),
    boot="0b07a4c1-0000-4000-8000-000000000000",
    awaited=True,
    addresses=(ADDRESS,),
)
_REST = Rest(
    leave_stopped=False,
    sockets=(Socket(7, CONNECTION), Socket(8, LISTENER)),
    addresses=((ADDRESS, "eth0"),),
)


def _journal(kind: type[msgspec.Struct]) -> Callable[[bytes], bool]:
    def run(data: bytes) -> bool:
        try:
            found = journal.decoded(kind, data)
        except ValueError:
            return False
        tasks = [getattr(found, name) for name in ("process", "agent") if hasattr(found, name)]
        for task in tasks:
            assert task.pid > 0  # it may be killed: kill(2) takes others for many, or all
            task.lives()
        assert journal.decoded(kind, msgspec.msgpack.encode(found)) == found
        return True

    return run


def _target(name: str, one: msgspec.Struct) -> Target:
    return Target(name, _journal(type(one)), lambda: [msgspec.msgpack.encode(one)], mutate_msgpack)


TARGETS = (
    _target("departure", _DEPARTURE),
    _target("arrival", Arrival(process=_TASK, agent=_TASK)),
    _target("rest", _REST),
)
