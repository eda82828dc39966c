"""Where a source that has lost its link finds the agent that holds its shadow: the destination's side of
going on over a new connection.

    sshd -- pipes --> migrate-agent destination            the agent; its session may die, it stays
    sshd -- pipes --> migrate-agent destination --resume ID
                        `-- unix socket, SCM_RIGHTS: its standard input, output and error --> the agent

The socket's name is abstract (unix(7)): it goes with the agent. Either end looks who the other one is.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from typing import Final

from transport.frames import LinkClosed

SILENCE: Final = 300.0  # seconds: a source that says nothing for so long is gone
# in pre-copy, when it always has something to say, its link is: it may come over another one
SILENCE_IN_PRE_COPY: Final = 60.0
_UCRED: Final = struct.Struct("3i")
_STREAMS: Final = 3


class Duplex:
    """A read and a write descriptor with the few methods of a socket that Link uses."""

    def __init__(self, reading: int, writing: int, doorway: Doorway | None = None) -> None:
        self._reading, self._writing = reading, writing
        self.doorway = doorway

    def fileno(self) -> int:
        return self._reading

    def recv_into(self, buffer: memoryview) -> int:
        """OSError if nothing comes any more, or the source has come another way."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        silence = SILENCE
        if self.doorway is not None and self.doorway.fileno() >= 0:
            poll.register(self.doorway, select.POLLIN)
            silence = SILENCE_IN_PRE_COPY
        ready = [fd for fd, _ in poll.poll(silence * 1000)]
        if not ready:
            raise OSError(f"nothing came for {silence:.0f} s")
        if self._reading not in ready:
            raise OSError("the source has come back over another connection")
        return os.readv(self._reading, [buffer])

    def sendmsg(self, parts: list[memoryview]) -> int:
        return os.writev(self._writing, parts)

    def settimeout(self, seconds: float | None) -> None:
        """The source decides about time; we wait for it."""

    def close(self) -> None:
        for fd in {self._reading, self._writing}:
            os.close(fd)


class Doorway:
    """Of the migration `name`; who comes back within `patience` seconds is let in."""

    def __init__(self, name: str, patience: float) -> None:
        """OSError if the name is taken."""
        self._patience = patience
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._visitor: socket.socket | None = None
        try:
            self._listener.bind(_address(name))
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise

    def fileno(self) -> int:
        return self._listener.fileno()

    def wait(self, broken: LinkClosed) -> Duplex:
        """The source's new connection; its standard error becomes ours. LinkClosed if it does not come."""
        deadline = time.monotonic() + self._patience
        while True:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                why = f"{broken}; the source has not come back within {self._patience:.0f} s"
                raise LinkClosed(why) from None
            if (streams := _streams_of(visitor)) is None:
                visitor.close()
                continue
            if self._visitor is not None:
                self._visitor.close()  # its session can end
            self._visitor = visitor
            reading, writing, errors = streams
            os.dup2(errors, 2)
            os.dup2(errors, 1)
            os.close(errors)
            return Duplex(reading, writing, self)

    def close(self) -> None:
        """Who is in stays in: that ends with this process."""
        self._listener.close()


def _streams_of(visitor: socket.socket) -> list[int] | None:
    """Its standard input, output and error; None if it is not one of ours."""
    if not _is_ours(visitor):
        return None
    with contextlib.suppress(OSError):
        visitor.settimeout(5)
        _, streams, _, _ = socket.recv_fds(visitor, 1, _STREAMS)
        if len(streams) == _STREAMS:
            return streams
        for fd in streams:
            os.close(fd)
    return None


def hand_over(name: str) -> int:
    """Be the new connection of migration `name`, until its agent ends or takes another; the exit status."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        try:
            door.connect(_address(name))
            if not _is_ours(door):
                raise ConnectionRefusedError
            socket.send_fds(door, [b"\0"], [0, 1, 2])
        except OSError:
            print(f"nobody waits for migration {name} here: its shadow is gone", file=sys.stderr)
            return 1
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(_STREAMS):  # the agent's now
            os.dup2(null, fd)
        with contextlib.suppress(OSError):
            door.recv(1)
    return 0


def _address(name: str) -> bytes:
    return b"\0migrate-agent/" + name.encode()


def _is_ours(sock: socket.socket) -> bool:
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(uid == os.geteuid())
