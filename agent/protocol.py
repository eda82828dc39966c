"""What a source agent and a destination agent say to each other, in order.

    source                                   destination
    Offer             ------------------->   checks that it can have the process; touches nothing
                      <-------------------   Answer (blockers, notices)
    FileData ...      ------------------->   files that are missing, with --copy-files
    Ping              ------------------->   a few times: how far the clocks are apart
                      <-------------------   Pong
    Prepare           ------------------->   the shadow is born
                      <-------------------   Prepared
    NewFiles, Layout, Discard, pages ... ->  pre-copy; each round ends in
    RoundEnd          ------------------->
                      <-------------------   RoundDone
                          (source frozen)
    Rebuild           ------------------->   the process
    Descriptors ...   ------------------->   as they are captured
    Layout, Discard, pages ... ----------->   once more
    Threads ...       ------------------->   as they are captured; they need all memory to be there
    Complete          ------------------->
                      <-------------------   Ready: rebuilt to the last register, still stopped
    Verify            ------------------->   optional; any number
                      <-------------------   Verified
    Commit            ------------------->   the point of no return
                      <-------------------   Live
    Late ...          ------------------->   packets and signals that arrived for it while it was frozen
                      <-------------------   Done

At any time before Commit either end may close the link, or send Failed, and the migration is off. A version
speaks with itself and the one before; the Offer carries it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from agent.api import Blocker, Notice, Phase
from agent.descriptors import Descriptor
from agent.layout import Mapping
from agent.resources.files import FileRef
from agent.resources.pipe import Fifo
from agent.resources.service_address import ServiceAddress
from agent.resources.tcp import TcpConnection, TcpListener
from agent.shadow import Special
from agent.state import ProcessState, ThreadState
from transport import frames
from transport.codec import Decoder
from transport.frames import Kind, LinkClosed, ProtocolError

VERSION: Final = 2


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    version: int = VERSION
    migration: str = ""  # its name; "": it cannot be asked for later
    host: str
    pid: int
    tids: tuple[int, ...]
    files: list[FileRef]  # mapped: executables and libraries
    opened: list[FileRef]
    copy_files: bool
    specials: list[Special]
    vdso_digest: bytes
    cpu_flags: tuple[str, ...]
    limits: tuple[tuple[int, int], ...]
    directories: tuple[str, ...]  # cwd and opened directories
    fifos: tuple[Fifo, ...] = ()
    listeners: tuple[TcpListener, ...]
    connections: tuple[TcpConnection, ...] = ()  # outlines: nothing in their queues
    addresses: tuple[ServiceAddress, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    version: int = VERSION
    host: str
    blockers: tuple[Blocker, ...]
    notices: tuple[Notice, ...]
    missing: tuple[str, ...]  # files to be sent
    unshared: tuple[str, ...]  # files that the destination has, or will have, for itself


class FileData(msgspec.Struct, frozen=True, kw_only=True, tag="file-data"):
    path: str
    data: bytes
    last: bool


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    monotonic: int  # nanoseconds
    boottime: int


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    monotonic_delta: int  # nanoseconds that the process's clocks are ahead of the destination's
    boottime_delta: int
    session_leader: bool
    layout: list[Mapping]


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    pid: int
    new_pid_namespace: bool
    boot: str = ""  # the host's boot id, proc_sys_kernel(5)


class NewFiles(msgspec.Struct, frozen=True, tag="new-files"):
    """Files mapped since the Offer; they extend its list."""

    files: list[FileRef]


class Layout(msgspec.Struct, frozen=True, tag="layout"):
    mappings: list[Mapping]


class Discard(msgspec.Struct, frozen=True, tag="discard"):
    ranges: list[tuple[int, int]]


class Guards(msgspec.Struct, frozen=True, tag="guards"):
    """Pages with MADV_GUARD_INSTALL on them (Linux 6.13)."""

    ranges: list[tuple[int, int]]


class RoundEnd(msgspec.Struct, frozen=True, tag="round-end"):
    number: int


class RoundDone(msgspec.Struct, frozen=True, tag="round-done"):
    number: int


class Rebuild(msgspec.Struct, frozen=True, kw_only=True, tag="rebuild"):
    """Everything but memory, descriptors and the threads after the first."""

    process: ProcessState
    monotonic_at_freeze: int  # of the process, nanoseconds: its clock must not be behind this when it goes on
    leave_stopped: bool


class Descriptors(msgspec.Struct, frozen=True, tag="descriptors"):
    """Some open file descriptions, in the order to rebuild them: listeners before connections."""

    descriptors: list[Descriptor]
    captured_at: int  # CLOCK_MONOTONIC of the process, nanoseconds: right before
    last: bool


class Threads(msgspec.Struct, frozen=True, tag="threads"):
    threads: list[ThreadState]


class Complete(msgspec.Struct, frozen=True, tag="complete"):
    """All pages and threads were sent; and what is asked last."""

    brk: int  # the end of the heap, brk(2)
    lock_future: int  # flags of mlockall(2), 0 if memory that is mapped from now on is not locked


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    phases: tuple[Phase, ...]
    notices: tuple[Notice, ...]


class Verify(msgspec.Struct, frozen=True, kw_only=True, tag="verify"):
    """Digests of pieces of the frozen source's memory: (start, end, BLAKE2b of 16 bytes).

    The last message asks for the rest too: pages outside `present`, mappings, registers.
    """

    pieces: list[tuple[int, int, bytes]]
    masked: list[tuple[int, int]]
    last: bool
    present: list[tuple[int, int]] = []


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag="verified"):
    memory: list[tuple[int, int]]  # pieces that differ
    others: tuple[str, ...] = ()


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """`signals`: (thread, 0 for the process; siginfo) that were queued since the Rebuild was sent."""

    signals: list[tuple[int, bytes]]


class Live(msgspec.Struct, frozen=True, kw_only=True, tag="live"):
    phases: tuple[Phase, ...]
    address_moved: tuple[str, ...]


class Late(msgspec.Struct, frozen=True, tag="late"):
    """What still arrived at the source: packets for the addresses, and signals as in Commit."""

    packets: list[bytes]
    signals: list[tuple[int, bytes]]
    last: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    notices: tuple[Notice, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    kind: str
    message: str


Message = (
    Offer
    | Answer
    | FileData
    | Ping
    | Pong
    | Prepare
    | Prepared
    | NewFiles
    | Layout
    | Discard
    | Guards
    | RoundEnd
    | RoundDone
    | Rebuild
    | Threads
    | Descriptors
    | Complete
    | Ready
    | Verify
    | Verified
    | Commit
    | Live
    | Late
    | Done
    | Failed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
M = TypeVar("M")


class Pages(msgspec.Struct, frozen=True):
    """A frame of pages, decoded: `data` is the content of `ranges`, one after another."""

    ranges: list[tuple[int, int]]
    data: bytes | memoryview


class PeerFailed(Exception):
    """The other agent gave up, and said why."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.kind = failed.kind


class Link:
    """The binary stream to the other agent: blocking, one thread, frames in and out.

    LinkClosed when the other end is gone; ProtocolError for anything that is not the protocol.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder = Decoder()
        self.bytes_sent = 0
        self.sending_s = 0.0  # that the link took no more data

    def send(self, message: Message) -> None:
        self._write(frames.encode(Kind.MESSAGE, _encoder.encode(message)))

    def send_pages(
        self, kind: Kind, ranges: Sequence[tuple[int, int]], data: bytes | memoryview, raw_size: int
    ) -> None:
        table = frames.encode_ranges(ranges)
        self._write(frames.header(kind, (table, data), raw_size), table, data)

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
        with contextlib.suppress(LinkClosed, ProtocolError):
            while self.readable():
                message = self.receive()
                if isinstance(message, Failed):
                    raise PeerFailed(message)

    def receive(self) -> Message | Pages:
        header, body = frames.read_frame(self._read)
        if header.kind is Kind.MESSAGE:
            return _decode(body)
        ranges, data = frames.decode_ranges(body)
        if sum(end - start for start, end in ranges) != header.raw_size:
            raise ProtocolError("the ranges do not add up to the pages")
        return Pages(ranges, self._decoder.decode(header.kind, data, header.raw_size))

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
        return bool(select.select([self._socket], [], [], timeout)[0])

    def set_timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def _read(self, size: int) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise LinkClosed(f"the link broke: {error}") from error
            if not count:
                raise LinkClosed("the other agent closed the link")
            view = view[count:]
        return buffer  # type: ignore[return-value]

    def close(self) -> None:
        self._socket.close()


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the parts after their first `count` bytes."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = parts[0][count:]
    return parts


def _decode(body: memoryview) -> Message:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message that is not understood: {error}") from error
