"""The service's life: `migrate-agent serve`.

One a socket: whoever holds the lock beside it is the service, and the kernel gives the lock back however
it ends. A service on demand ends when nothing runs and nobody is connected for a while, and takes socket
and lock with it; a connection that comes in this moment finds itself closed without an answer, and
`connect` tries again.

SIGTERM, SIGINT and SIGHUP end it in order: nothing new is begun, what runs is rolled back or, if it is too
late for that, carried through. Killed, its fronts read the end of their input, which means the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from aiohttp import web

from agent import privileges
from agent.server import log
from agent.server.access import Users
from agent.server.connect import EXIT_LOCKED
from agent.server.front import Program
from agent.server.migration import DESERTED_AFTER
from agent.server.places import Places, UnsafeDirectory, make_private, open_to_group
from agent.server.recoveries import Recoveries
from agent.server.registry import Registry
from agent.server.routes import application
from agent.server.store import Store

BACKLOG: Final = 128
SHUTDOWN_TIMEOUT: Final = 2.0  # seconds that readers of finished streams may take
CLOSE_REASON: Final = "the agent's service was told to end"

_log = logging.getLogger(__name__)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How a service behaves. `program`: what is `migrate-agent` here; `users`: who else may use root's."""

    places: Places
    program: Program
    idle_exit: float | None = None  # seconds; None: stay
    deserted_after: float = DESERTED_AFTER
    users: Users | None = None


class AlreadyRunning(Exception):
    """Another service has this socket."""


def run(settings: Settings) -> int:
    """Serve until the end; the exit status."""
    os.umask(0o077)
    try:
        make_private(settings.places.socket.parent)
        if settings.users is not None:
            open_to_group(settings.places.socket.parent, settings.users.gid)
        with _lock(settings.places) as forget:
            asyncio.run(_serve(settings, forget))
    except AlreadyRunning as error:
        _log.warning("%s", error)
        return EXIT_LOCKED
    except (OSError, UnsafeDirectory) as error:
        _log.error("%s", error)
        return 1
    return 0


@contextlib.contextmanager
def _lock(places: Places) -> Iterator[Callable[[], None]]:
    """Be the one service; AlreadyRunning. Yields what removes socket and lock."""
    fd = _take_lock(places)

    def forget() -> None:
        places.socket.unlink(missing_ok=True)

    try:
        yield forget
    finally:
        forget()
        places.lock.unlink(missing_ok=True)
        os.close(fd)


def _take_lock(places: Places) -> int:
    while True:
        fd = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise AlreadyRunning(f"another service has {places.socket}") from None
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # the one before us has removed it: what it locked is nobody's way in


def _bind(places: Places, users: Users | None) -> socket.socket:
    """The socket, ours and the group's alone; one that a killed service left is removed."""
    places.socket.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(places.socket))
    if users is not None:
        os.chown(places.socket, -1, users.gid)
    places.socket.chmod(0o600 if users is None else 0o660)
    return listening


async def _serve(settings: Settings, forget: Callable[[], None]) -> None:
    registry = Registry(
        Store(settings.places.reports), log.write, settings.program, settings.deserted_after
    )
    # a handler is cancelled when its client goes: that is how a check ends, and how a reader is missed
    runner = web.AppRunner(
        application(registry, settings.users),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_TIMEOUT,
    )
    await runner.setup()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    site = web.SockSite(runner, _bind(settings.places, settings.users), backlog=BACKLOG)
    recoveries = Recoveries(registry)
    recovering = asyncio.create_task(recoveries.run())
    try:
        privileges.enter(privileges.SERVICE)
        await site.start()
        _log.info("serving at %s", settings.places.socket)
        await _until_over(settings, runner, lambda: registry.busy or recoveries.waiting, stop)
    finally:
        recovering.cancel()
        forget()
        await site.stop()
        await registry.close(CLOSE_REASON)
        await runner.cleanup()
        _log.info("ended")


async def _until_over(
    settings: Settings, runner: web.AppRunner, busy: Callable[[], bool], stop: asyncio.Event
) -> None:
    """Until told to end, or nothing has happened for long enough."""
    if settings.idle_exit is None:
        await stop.wait()
        return
    assert runner.server is not None
    now = asyncio.get_running_loop().time
    used = now()
    while now() - used < settings.idle_exit:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(1.0, settings.idle_exit / 4))
            return
        if busy() or runner.server.connections:
            used = now()
