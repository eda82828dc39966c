"""The link between two engines, with somebody in the middle who keeps what is said or says something else."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence

from transport import frames
from transport.frames import Kind, LinkClosed

Frame = tuple[Kind, bytes, int]  # kind, body, raw size
# "source" or "destination", whoever says it, and what the other one is to hear instead
Change = Callable[[str, Frame], Sequence[Frame]]


class Tap:
    """Passes on frame after frame."""

    def __init__(self, far: socket.socket, change: Change = lambda _, frame: [frame]) -> None:
        """`far` leads to the destination; the source gets `near`."""
        self.near, ours = socket.socketpair()
        self.said: dict[str, bytearray] = {"source": bytearray(), "destination": bytearray()}
        self._change = change
        for name, reading, writing in (("source", ours, far), ("destination", far, ours)):
            threading.Thread(target=self._pass_on, args=(name, reading, writing), daemon=True).start()

    def _pass_on(self, name: str, reading: socket.socket, writing: socket.socket) -> None:
        with contextlib.suppress(LinkClosed, OSError):
            while True:
                header, body = frames.read_frame(lambda size: _exactly(reading, size))
                for frame in self._change(name, (header.kind, bytes(body), header.raw_size)):
                    data = frames.encode(*frame)
                    self.said[name] += data
                    writing.sendall(data)
        with contextlib.suppress(OSError):
            writing.shutdown(socket.SHUT_WR)


def _exactly(reading: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = reading.recv(size - len(data))
        if not more:
            raise LinkClosed("end")
        data += more
    return data
