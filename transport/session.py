"""One command on another host, as an asyncssh session: where its output goes and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import asyncssh

from transport.process import Lines, ProcessEnd


class Sink(Protocol):
    """Where a session's standard output goes, and who is told to stop writing to its standard input."""

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self) -> None: ...


class Session(asyncssh.SSHClientSession):  # type: ignore[misc]
    """One command over SSH.

    Standard output to `sink`, standard error line by line to `on_stderr`, its end in `ended`.
    """

    def __init__(self, host: str, sink: Sink, on_stderr: Callable[[str], None]) -> None:
        self.ended: asyncio.Future[ProcessEnd] = asyncio.get_running_loop().create_future()
        self._host = host
        self._sink = sink
        self._stderr = Lines(on_stderr)
        self._status: int | None = None
        self._signal: str | None = None
        self.pause_writing = sink.pause_writing
        self.resume_writing = sink.resume_writing

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self._sink.data_received(data)
        else:
            self._stderr.feed(data)

    def eof_received(self) -> bool:
        self._sink.eof_received()
        return True  # our direction stays open

    def exit_status_received(self, status: int) -> None:
        self._status = status

    def exit_signal_received(self, name: str, core_dumped: bool, msg: str, lang: str) -> None:
        self._signal = name

    def connection_lost(self, exc: Exception | None) -> None:
        self._stderr.feed(b"", final=True)
        self._sink.connection_lost()
        if not self.ended.done():
            self.ended.set_result(self._end(exc))

    def _end(self, exc: Exception | None) -> ProcessEnd:
        known = self._status is not None or self._signal is not None
        lost = None if known or exc is None else str(exc) or type(exc).__name__
        said = tuple(self._stderr.tail)
        return ProcessEnd(host=self._host, status=self._status, signal=self._signal, lost=lost, said=said)
