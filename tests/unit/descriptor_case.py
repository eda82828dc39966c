"""One way to test a kind of descriptor: a child opens it, it is captured there and rebuilt here."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from typing import Any

from unit.children import forked

from agent import kinds
from agent.descriptors import Descriptor, OpenFile, Rebuilding, SourceProcess, open_files
from agent.resources import pipe, tcp
from agent.resources.tcp_socket import bound_to


class Case:
    """What `setup` opens in a child (it returns the descriptors), captured; and rebuilt here."""

    def __init__(self, setup: Callable[[], list[int]]) -> None:
        self.context = Rebuilding()
        self.numbers: list[int] = []
        reading, writing = os.pipe()

        def tell() -> None:
            os.close(reading)
            fds = setup()
            os.write(writing, struct.pack(f"<{len(fds)}i", *fds).ljust(400, b"\xff"))
            os.close(writing)

        self._child = forked(tell)
        self.pid = self._child.__enter__()
        words = struct.unpack("<100i", os.read(reading, 400))
        os.close(reading)
        os.close(writing)
        self.numbers = [n for n in words if n >= 0]
        self.process = SourceProcess(self.pid)
        self.ours: list[int] = []
        self._ended = False

    def file(self, number: int) -> OpenFile:
        return next(f for f in open_files(self.process) if number in dict(f.numbers))

    def files(self) -> list[OpenFile]:
        return [self.file(n) for n in self.numbers]

    def capture(self, index: int = 0) -> Descriptor:
        """As after an offer with all of it."""
        file = self.file(self.numbers[index])
        captured = kinds.capture(file, self.process)
        if (fifo := pipe.fifo(file)) is not None:
            self.context.fifos[fifo.path] = fifo
        if isinstance(state := getattr(kinds.decode(captured), "tcp", None), tcp.TcpListener):
            self.context.listening |= {bound_to(state)}
        return captured

    def state(self, index: int = 0) -> Any:
        return kinds.decode(self.capture(index))

    def rebuild(self, *descriptors: Descriptor) -> list[int]:
        """Our own copies; what they shared while they were made is closed."""
        made = [kinds.rebuild(d, self.context) for d in descriptors]
        self.ours += made
        self.context.close()
        return made

    def move(self, index: int = 0) -> int:
        return self.rebuild(self.capture(index))[0]

    def close(self) -> None:
        self.context.close()
        for fd in self.ours:
            os.close(fd)
        self.process.close()
        self.end()

    def end(self) -> None:
        """The child ends."""
        if not self._ended:
            self._ended = True
            self._child.__exit__(None, None, None)


Make = Callable[[Callable[[], list[int]]], Case]


def captured_here(fd: int) -> Any:
    """The state of a descriptor of our own, as the engine would capture it."""
    process = SourceProcess(os.getpid())
    try:
        file = next(f for f in open_files(process) if fd in dict(f.numbers))
        return kinds.decode(kinds.capture(file, process))
    finally:
        process.close()


def status_flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)
