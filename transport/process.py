"""A command at work elsewhere: what it says, how it ended. Shared by SSH sessions and local subprocesses."""

from __future__ import annotations

import asyncio
import codecs
import signal
import socket
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import msgspec

from transport import link_errors as errors

LINE_LIMIT: Final = 64 << 20  # bytes; a report with thousands of rounds is one line
TEXT_LIMIT: Final = 8192  # characters of a line for a person
TAIL_LINES: Final = 5
_NOT_FOUND: Final = (126, 127)  # sh(1): found but not executable, not found


class ProcessEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended: with a status, by a signal, or out of sight."""

    host: str
    status: int | None = None
    signal: str | None = None  # without "SIG"
    lost: str | None = None  # why the connection ended before the command did
    said: tuple[str, ...] = ()  # its last lines on standard error

    @property
    def clean(self) -> bool:
        return self.status == 0

    def error(self) -> errors.LinkError:
        """The reason as an error. Meaningful also for a clean end: one that came too early."""
        if self.lost is not None:
            return errors.ConnectionLost(self.host, self.lost)
        if self.status in _NOT_FOUND:
            hint = "install migrate there, or say where it is with --agent-command"
            return errors.AgentNotFound(self.host, self._with_words("the agent cannot be started"), hint)
        hint = "see --log-file or -v"
        if self.signal == "KILL":
            hint = "was it killed because memory ran out? see dmesg there"
        return errors.AgentFailed(self.host, self._with_words(f"the agent ended {self._how()}"), hint)

    def _how(self) -> str:
        if self.signal is not None:
            return f"by SIG{self.signal}"
        return "without a status" if self.status is None else f"with status {self.status}"

    def _with_words(self, text: str) -> str:
        return f"{text}: {self.said[-1]}" if self.said else text


class Lines:
    """Bytes in, whole lines of text out, a line without end in pieces; the last few are kept."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._on_line = on_line
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def feed(self, data: bytes, final: bool = False) -> None:
        *lines, self._rest = (self._rest + self._decoder.decode(data, final)).split("\n")
        if len(self._rest) > TEXT_LIMIT or (final and self._rest):
            lines.append(self._rest)
            self._rest = ""
        for line in lines:
            self.tail.append(line)
            self._on_line(line)


class Bridge(msgspec.Struct, frozen=True):
    """A command whose standard input and output are the other end of a socket of ours."""

    ended: asyncio.Future[ProcessEnd]
    kill: Callable[[], Any]


class AgentProcess:
    """A running agent on this host that is spoken to in lines of text."""

    def __init__(self, process: asyncio.subprocess.Process, ended: asyncio.Future[ProcessEnd]) -> None:
        assert process.stdin and process.stdout  # pipes
        self._process = process
        self._reader = process.stdout
        self._writer = process.stdin
        self._ended = ended

    def send(self, line: bytes) -> None:
        """Write one line; nothing happens if the agent is gone, its end tells."""
        if not self._writer.is_closing():
            self._writer.write(line + b"\n")

    def close_input(self) -> None:
        """The end of its standard input: to the agent this means "give up unless it is too late"."""
        if not self._writer.is_closing():
            self._writer.write_eof()

    async def lines(self) -> AsyncIterator[bytes]:
        """Its standard output line by line, until it ends."""
        try:
            while line := await self._reader.readline():
                yield line.rstrip(b"\n")
        except ValueError:  # of a line beyond LINE_LIMIT: it is no agent
            self.kill()
            while await self._reader.read(65536):  # its end is seen behind what it has written
                pass

    async def wait(self) -> ProcessEnd:
        """How it ended, once it has."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """End it at once."""
        _kill(self._process)


async def run_local(
    argv: Sequence[str], env: dict[str, str], on_stderr: Callable[[str], None]
) -> AgentProcess:
    """Start a command here, in a session of its own: the terminal's Ctrl-C is for its parent. OSError."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env, limit=LINE_LIMIT, start_new_session=True
    )
    return AgentProcess(process, asyncio.ensure_future(_end(process, on_stderr)))


async def bridge_local(
    argv: Sequence[str], env: dict[str, str], sock: socket.socket, on_stderr: Callable[[str], None]
) -> Bridge:
    """Start a command here whose standard input and output is `sock`, its alone from then on. OSError."""
    with sock:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=sock.fileno(), stdout=sock.fileno(), stderr=PIPE, env=env, start_new_session=True
        )
    return Bridge(asyncio.ensure_future(_end(process, on_stderr)), lambda: _kill(process))


async def _end(process: asyncio.subprocess.Process, on_stderr: Callable[[str], None]) -> ProcessEnd:
    assert process.stderr is not None
    lines = Lines(on_stderr)
    while data := await process.stderr.read(65536):
        lines.feed(data)
    lines.feed(b"", final=True)
    code = await process.wait()
    said = tuple(lines.tail)
    if code < 0:
        return ProcessEnd(host="this host", signal=signal.Signals(-code).name.removeprefix("SIG"), said=said)
    return ProcessEnd(host="this host", status=code, said=said)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
