"""Who is there if the engine dies: a process of the source that waits for nothing else.

It is forked before anything is touched, in a session of its own, and ends with the migration. If the engine
dies before that, the process runs on by itself (or is stopped, once committed), but its sockets may be
locked: the guardian puts in order at once what can be without asking anybody, and after a while, if nobody
else has, the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

from agent import journal
from agent.cleanup import Busy
from agent.kernel.clone import set_name
from agent.tracee import InjectedCallFailed

NAME: Final = "migrate-guard"
_OTHERS_FIRST: Final = 10.0  # seconds that the front or the service may take to begin
_PATIENCE: Final = 600.0
_POLL: Final = 5.0


class Guardian:
    """Of the calling process, which is the engine of migration `name`."""

    def __init__(self, name: str) -> None:
        reading, self._writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _watch(reading, name)
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


def _watch(reading: int, name: str) -> None:
    os.setsid()
    set_name(NAME)
    _let_go_of_all_but(reading)
    if os.read(reading, 1):
        return
    began = time.monotonic()
    while state := journal.state_of("outgoing", name):
        waited = time.monotonic() - began
        if waited > _PATIENCE:
            return
        if state == "open" or waited > _OTHERS_FIRST:
            _try(name)
        time.sleep(min(_POLL, waited / 10 + 0.01))


def _try(name: str) -> None:
    """Once; what cannot be done now may be possible later."""
    from agent import recovery

    with contextlib.suppress(Busy, OSError, ValueError, InjectedCallFailed, RuntimeError):
        recovery.recover(name)


def _let_go_of_all_but(reading: int) -> None:
    """Whoever waits for the engine's end of something must not wait for us."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, reading)
    os.closerange(reading + 1, os.sysconf("SC_OPEN_MAX"))
