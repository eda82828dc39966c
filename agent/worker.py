"""The engine's process: `python -m agent.worker LINK_FD EVENTS_FD RENEWAL_FD NAME`, started by
`agent.supervisor`.

It reads one Request, a line of JSON, from standard input, and hands over to `agent.source.run` on its main
thread (which becomes the tracer). The end of standard input without a line means that there is nothing to
do. SIGTERM asks the engine to give up; it sees that when it next calls `aborted()`. SIGINT and SIGHUP are
ignored: they are the front's to interpret.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import time
import traceback
from types import FrameType
from typing import Final

import msgspec

from agent import launch, privileges
from agent.api import Event, Log, Progress, Request

# room for thousands of events; what an unprivileged process may ask for (pipe(7))
PIPE_BYTES: Final = 1 << 20
FLUSH_TIMEOUT: Final = 10.0
EXIT_ENGINE_FAILED: Final = 70  # sysexits.h EX_SOFTWARE

_encoder = msgspec.json.Encoder()


class EventPipe:
    """Events as lines of JSON into a pipe, without ever waiting for its reader.

    A Progress that finds the pipe full is dropped; everything else waits in memory and leaves with the next
    event, or with `flush`. `broken` tells that nobody reads any more.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._backlog = b""
        self.broken = False
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # the user's pipe quota is used up: the default size works as well
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def emit(self, event: Event) -> None:
        if self._backlog and isinstance(event, Progress):
            return
        line = _encoder.encode(event) + b"\n"
        rest = self._write(self._backlog + line)
        # a Progress of which nothing was written can be forgotten; a piece of a line cannot
        self._backlog = b"" if len(rest) == len(line) and isinstance(event, Progress) else rest

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Wait until everything is written, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while self._backlog and time.monotonic() < deadline:
            poll.poll(100)
            self._backlog = self._write(self._backlog)

    def _write(self, data: bytes) -> bytes:
        """Write what fits; return what does not."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                return data
            except BrokenPipeError:
                self.broken = True
                return b""
        return b""


class Abort:
    """Whether the engine is asked to give up: by SIGTERM, or because nobody is left to listen."""

    def __init__(self, events: EventPipe) -> None:
        self._events = events
        self._asked = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def requested(self) -> bool:
        return self._asked or self._events.broken


def main() -> int:
    """Run one request; the exit status is for people who look, the front goes by the events."""
    privileges.enter(privileges.ENGINE)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    link_fd, events_fd, renewal_fd = map(int, sys.argv[1:4])
    os.dup2(2, 1)  # standard output is nobody's: a stray print goes where people look
    events = EventPipe(events_fd)
    abort = Abort(events)
    launch.raise_descriptor_limit()
    from agent import source  # after the handlers: the front may signal from now on
    from agent.renewal import Asking

    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    request = msgspec.json.decode(line, type=Request)
    try:
        link, asking = socket.socket(fileno=link_fd), Asking(socket.socket(fileno=renewal_fd))
        source.run(request, link, events.emit, abort.requested, sys.argv[4], asking.next)
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the engine failed: {type(error).__name__}: {error} (at {where.filename}:{where.lineno})"
        events.emit(Log(level="error", message=text))
        return EXIT_ENGINE_FAILED
    finally:
        events.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
