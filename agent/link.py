"""The binary stream between two agents: frames in and out, blocking, one thread.

In pre-copy it may go on over a new connection when the old one breaks. Either end has counted the frames
that it received, whole; each says so first on the new one (`Resumed`), and the other sends again what is
missing:

    source     1 2 3 4 5 6 7 ...  (broken)   Resumed(2) -->  6' 7' 8 ...
    destination  1 2 3 4 5        (broken)   <-- Resumed(5)

Messages that may have to be sent again are kept. Pages are not, but read anew: by then they may hold
something newer, which the next round would have brought.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from agent import protocol
from agent.pageset import Range
from agent.protocol import Discard, Failed, Message, Pages, PeerFailed, Resumed
from transport import frames
from transport.codec import Decoder
from transport.frames import Kind, LinkClosed, ProtocolError

M = TypeVar("M")
# ranges of pages -> those that can be read now, and what is in them, one after another
Reread = Callable[[list[Range]], tuple[list[Range], bytearray]]


class Resumption(msgspec.Struct, frozen=True):
    """`renew(error)` is the socket of a new connection after that error, LinkClosed if there will be none."""

    renew: Callable[[LinkClosed], socket.socket]
    reread: Reread


class _Kept(msgspec.Struct, frozen=True):
    """A frame that may have to be sent again: a message, whole, or the table of a frame of pages."""

    data: bytes
    pages: bool


class Link:
    """One end. LinkClosed when the other one is gone; ProtocolError for anything that is not the protocol."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._timeout: float | None = None
        self._decoder = Decoder()
        self._inbox: deque[Message | Pages] = deque()  # read while something else was to be done
        self._sent = self._received = 0  # frames, over all connections
        self._resumption: Resumption | None = None
        self._kept: deque[_Kept] = deque()  # the last of the frames that were sent
        self.bytes_sent = 0
        self.sending_s = 0.0  # that the link took no more data

    # --- out ---

    def send(self, message: Message) -> None:
        frame = frames.encode(Kind.MESSAGE, protocol.encode(message))
        self._send(_Kept(frame, False), frame)

    def send_pages(
        self, kind: Kind, ranges: Sequence[Range], data: bytes | memoryview, raw_size: int
    ) -> None:
        table = frames.encode_ranges(ranges)
        self._send(_Kept(table, True), frames.header(kind, (table, data), raw_size), table, data)

    def _send(self, kept: _Kept, *parts: bytes | memoryview) -> None:
        self._sent += 1
        if self._resumption is None:
            self._write(*parts)
            return
        self._kept.append(kept)
        try:
            self._write(*parts)
        except LinkClosed as error:
            self._resume(error)

    def _write(self, *parts: bytes | memoryview) -> None:
        """All of the parts, without joining them first: pages are not copied again."""
        began = time.perf_counter()
        rest = [memoryview(part) for part in parts]
        self.bytes_sent += sum(map(len, rest))
        try:
            while rest:
                rest = _without(rest, self._socket.sendmsg(rest))
        except TimeoutError:
            raise LinkClosed("the link takes no more data: it is stalled") from None
        except OSError as error:
            self._hear_why()
            raise LinkClosed(f"the link broke: {error.strerror}") from error
        self.sending_s += time.perf_counter() - began

    def _hear_why(self) -> None:
        """PeerFailed if the other end said why before it went."""
        with contextlib.suppress(LinkClosed, ProtocolError, OSError):
            while self._has_data():
                message = self._take()
                if isinstance(message, Failed):
                    raise PeerFailed(message)
                if not isinstance(message, Resumed):  # which is about a connection that is broken again
                    self._inbox.append(message)

    # --- in ---

    def receive(self) -> Message | Pages:
        """The next message, or frame of pages."""
        while (message := self._next()) is None:
            pass
        return message

    def heard(self) -> Message | Pages | None:
        """What the other end says unasked; None if nothing has come."""
        while self.readable():
            if (message := self._next()) is not None:
                return message
        return None

    def _next(self) -> Message | Pages | None:
        """None if the link broke and goes on over another connection."""
        if self._inbox:
            return self._inbox.popleft()
        try:
            return self._take()
        except LinkClosed as error:
            self._resume(error)
            return None

    def expect(self, kind: type[M], deadline: float | None = None) -> M:
        """The next message, which must be a `kind`; PeerFailed if the other end gave up instead.

        TimeoutError if it is not there by `deadline` (time.monotonic()).
        """
        if deadline is not None and not self.readable(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"no {kind.__name__} from the other agent in time")
        message = self.receive()
        if isinstance(message, Failed):
            raise PeerFailed(message)
        if not isinstance(message, kind):
            raise ProtocolError(f"{type(message).__name__} where {kind.__name__} was due")
        return message

    def readable(self, timeout: float = 0.0) -> bool:
        return bool(self._inbox) or self._has_data(timeout)

    def _has_data(self, timeout: float = 0.0) -> bool:
        """Or an end to be read."""
        return bool(select.select([self._socket], [], [], timeout)[0])

    def set_timeout(self, seconds: float | None) -> None:
        """After which the link counts as broken if it takes, or gives, nothing at all."""
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def _take(self) -> Message | Pages:
        """One frame from the connection."""
        header, body = frames.read_frame(self._read)
        if header.kind is Kind.MESSAGE:
            message = protocol.decode(body)
            self._received += not isinstance(message, Resumed)
            return message
        ranges, data = frames.decode_ranges(body)
        if sum(end - start for start, end in ranges) != header.raw_size:
            raise ProtocolError("the ranges do not add up to the pages")
        pages = Pages(ranges, self._decoder.decode(header.kind, data, header.raw_size))
        self._received += 1
        return pages

    def _read(self, size: int) -> bytes:
        """Into one buffer. A larger one than for pages is made only as there is something to put into it."""
        buffer = bytearray(min(size, frames.MAX_PAGES_BODY))
        self._fill(memoryview(buffer))
        while len(buffer) < size:
            before = len(buffer)
            buffer += bytes(min(before, size - before))
            self._fill(memoryview(buffer)[before:])
        return buffer  # type: ignore[return-value]

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise LinkClosed(f"the link broke: {error}") from error
            if not count:
                raise LinkClosed("the other agent closed the link")
            view = view[count:]

    # --- over a new connection ---

    def make_resumable(self, resumption: Resumption) -> None:
        """From now on; the other end does so at the same place of the stream, or before."""
        self._resumption = resumption

    def make_final(self) -> None:
        """Not from now on."""
        self._resumption = None
        self._kept.clear()

    def arrived(self) -> None:
        """The other end has answered to all that was sent."""
        self._kept.clear()

    def _resume(self, broken: LinkClosed) -> None:
        """Go on over another connection; LinkClosed if that is not to be."""
        while self._resumption is not None:
            old, self._socket = self._socket, self._resumption.renew(broken)
            old.close()
            try:
                self._socket.settimeout(self._timeout)
                self._introduce()
                theirs = self._take()
                if isinstance(theirs, Failed):
                    raise PeerFailed(theirs)
                if not isinstance(theirs, Resumed):
                    raise ProtocolError(f"{type(theirs).__name__} where Resumed was due")
                self._send_again(theirs.received, self._resumption.reread)
                return
            except LinkClosed as error:
                broken = error
        raise broken

    def _introduce(self) -> None:
        """Say how far we are. LinkClosed."""
        self._write(frames.encode(Kind.MESSAGE, protocol.encode(Resumed(self._received))))

    def _send_again(self, received: int, reread: Reread) -> None:
        """What the other end, which has `received` frames, has not. One frame for one: they are counted."""
        missing = self._sent - received
        if not 0 <= missing <= len(self._kept):
            raise ProtocolError(f"the other agent says it has {received} of {self._sent} frames")
        while len(self._kept) > missing:
            self._kept.popleft()
        for kept in self._kept:
            if not kept.pages:
                self._write(kept.data)
                continue
            ranges, data = reread(frames.decode_ranges(memoryview(kept.data))[0])
            if not ranges:  # gone by now
                self._write(frames.encode(Kind.MESSAGE, protocol.encode(Discard([]))))
                continue
            table, pages = frames.encode_ranges(ranges), memoryview(data)
            self._write(frames.header(Kind.PAGES_RAW, (table, pages), len(pages)), table, pages)

    def close(self) -> None:
        self._socket.close()


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the parts after their first `count` bytes."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = parts[0][count:]
    return parts
