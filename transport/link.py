"""The link of one migration: bytes pumped between a local socket and a command's standard input and output
over SSH.

    engine <-- socketpair --> LocalEnd, ChannelEnd <-- asyncssh channel -- SSH --> sshd <-- pipes -->
    migrate-agent destination

Nothing is held back to make larger packets, and nothing piles up: what the channel's window does not take
stops the reading of the socket, and what the socket does not take stops the channel's window. Each
direction can end by itself (half-close); when the command or the connection ends, the socket is closed and
the engine reads the end of the stream.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from transport.process import ProcessEnd

# bytes of each socket buffer of the pair: the engine and the pump seldom wait for each other
BUFFER: Final = 1 << 20
HIGH_WATER: Final = 256 << 10  # bytes waiting in either direction before the other end is told to stop
CLOSE_TIMEOUT: Final = 5.0
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; needs CAP_NET_ADMIN, ignores net.core.wmem_max
_SO_RCVBUFFORCE: Final = 33

Ended = asyncio.Future[ProcessEnd]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets with large buffers where we may have them.

    The pump's end and the engine's.
    """
    pair = socket.socketpair()
    for end in pair:
        _enlarge(end, _SO_SNDBUFFORCE, socket.SO_SNDBUF)
        _enlarge(end, _SO_RCVBUFFORCE, socket.SO_RCVBUF)
    return pair


def _enlarge(end: socket.socket, force: int, ordinary: int) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, force, BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, ordinary, BUFFER)


class LocalEnd(asyncio.Protocol):
    """The socket's end of the pump: what is read from the socket goes to the channel."""

    def __init__(self) -> None:
        self.socket: Any = None  # asyncio.Transport
        self.channel: Any = None  # asyncssh channel
        self.sent = 0  # bytes from the socket to the command

    @classmethod
    async def open(cls, sock: socket.socket) -> LocalEnd:
        """Take over `sock`; nothing is read from it before `start`."""
        sock.setblocking(False)
        _, local = await asyncio.get_running_loop().create_connection(cls, sock=sock)
        return local

    def start(self, channel: Any) -> None:
        """The command runs: let the bytes flow."""
        self.channel = channel
        channel.set_write_buffer_limits(HIGH_WATER)
        if not self.socket.is_closing():
            self.socket.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.socket = transport
        self.socket.pause_reading()
        self.socket.set_write_buffer_limits(HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        if not self.channel.is_closing():
            self.sent += len(data)
            self.channel.write(data)

    def eof_received(self) -> bool:
        self.channel.write_eof()
        return True  # the engine may still read

    def connection_lost(self, exc: Exception | None) -> None:
        if self.channel is not None:
            self.channel.write_eof()
            self.channel.resume_reading()  # into the void, so that the command is not left waiting for us

    def pause_writing(self) -> None:
        if self.channel is not None:
            self.channel.pause_reading()

    def resume_writing(self) -> None:
        if self.channel is not None:
            self.channel.resume_reading()


class ChannelEnd:
    """The channel's end of the pump.

    What comes from the command goes to the socket (a `transport.process.Sink`).
    """

    def __init__(self, local: LocalEnd) -> None:
        self._local = local
        self.received = 0  # bytes from the command to the socket

    def data_received(self, data: bytes) -> None:
        if not self._local.socket.is_closing():
            self.received += len(data)
            self._local.socket.write(data)

    def eof_received(self) -> None:
        """Let the engine read the end of the stream; what it writes still goes out."""
        if not self._local.socket.is_closing():
            self._local.socket.write_eof()

    def pause_writing(self) -> None:
        self._local.socket.pause_reading()

    def resume_writing(self) -> None:
        self._local.socket.resume_reading()

    def connection_lost(self) -> None:
        self._local.socket.close()  # after what the command wrote has been delivered


class Link:
    """A started link. It ends by itself when the command or the connection does; `end` is the reason then."""

    def __init__(
        self, connection: Any, channel: Any, local: LocalEnd, remote: ChannelEnd, ended: Ended
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._local = local
        self._remote = remote
        self._ended = ended

    @property
    def ended(self) -> Ended:
        """Done when it has ended."""
        return self._ended

    @property
    def end(self) -> ProcessEnd | None:
        """How it ended; None while it stands."""
        return self._ended.result() if self._ended.done() else None

    def kill(self) -> None:
        """End the command's session, but not the connection, at once."""
        self._channel.abort()

    def abort(self) -> None:
        """End the connection at once, without a word to the other end."""
        self._connection.abort()

    @property
    def bytes_sent(self) -> int:
        """Bytes taken from the socket for the command."""
        return self._local.sent

    @property
    def bytes_received(self) -> int:
        return self._remote.received

    async def wait(self) -> ProcessEnd:
        return await asyncio.shield(self._ended)

    def end_incoming(self) -> None:
        """Make the engine read the end of the stream, as if the destination had gone.

        What it writes still goes out.
        """
        self._remote.eof_received()

    async def close(self, timeout: float = CLOSE_TIMEOUT) -> ProcessEnd:
        """Wait for the command to end by itself, `timeout` seconds at most.

        Then end it and the connection.
        """
        done, _ = await asyncio.wait([self._ended], timeout=timeout)
        if not done:
            self._connection.abort()
        end = await self.wait()
        self._connection.close()
        await asyncio.wait([asyncio.ensure_future(self._connection.wait_closed())], timeout=CLOSE_TIMEOUT)
        return end
