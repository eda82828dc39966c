"""Who is there if an agent dies: a process that waits for nothing else.

Either agent forks one before it touches anything. It has a session of its own, and ends with the migration.
If its agent dies before that, it does at once what can be done without asking anybody: on the source, a
process that was not committed is freed of what was done to it, its sockets above all; on the destination, a
shadow that was not committed is made void, and one that was is let go. What needs the destination's word it
leaves to the front or the service of the source for a while, before it asks itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

from agent import journal
from agent.cleanup import Busy
from agent.journal import Role
from agent.kernel.clone import fork, set_name
from agent.states import Departure, Destination
from agent.tracee import InjectedCallFailed

NAME: Final = "migrate-guard"
_OTHERS_FIRST: Final = 10.0  # seconds that the front or the service may take to begin
_PATIENCE: Final = 600.0
_POLL: Final = 5.0


class Guardian:
    """Of the calling process, which is the agent in this role of migration `name`."""

    def __init__(self, role: Role, name: str) -> None:
        """OSError; LimitReached."""
        reading, self._writing = os.pipe()
        try:
            self._pid = fork()
        except OSError:
            os.close(reading)
            os.close(self._writing)
            raise
        if self._pid == 0:
            try:
                _watch(reading, role, name)
            finally:
                os._exit(0)
        os.close(reading)

    def dismiss(self) -> None:
        """Everything is in order."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writing, b"x")
        self.leave()
        os.waitpid(self._pid, 0)

    def leave(self) -> None:
        """What is not in order is its task from now on."""
        os.close(self._writing)


def _watch(reading: int, role: Role, name: str) -> None:
    os.setsid()
    set_name(NAME)
    _let_go_of_all_but(reading)
    if os.read(reading, 1):
        return
    began = time.monotonic()
    while (waited := time.monotonic() - began) < _PATIENCE:
        # what cannot be done now may be possible later
        with contextlib.suppress(Busy, OSError, ValueError, InjectedCallFailed, RuntimeError):
            if _IN_ORDER[role](name, waited):
                return
        time.sleep(min(_POLL, waited / 10 + 0.01))


def _source(name: str, waited: float) -> bool:
    from agent import recovery

    state = journal.state_of("outgoing", name)
    if state in (Departure.OPEN, Departure.FROZEN) or (state is not None and waited > _OTHERS_FIRST):
        recovery.recover(name)
    return journal.state_of("outgoing", name) is None


def _destination(name: str, _: float) -> bool:
    """An entry that is live stays: the source is to be told."""
    from agent import settle

    if settle.settle(name).state == "void":
        settle.forget(name)
    return journal.state_of("incoming", name) in (None, Destination.LIVE)


_IN_ORDER: Final[dict[Role, Callable[[str, float], bool]]] = {"outgoing": _source, "incoming": _destination}


def _let_go_of_all_but(reading: int) -> None:
    """Whoever waits for the agent's end of something must not wait for us."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, reading)
    os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
