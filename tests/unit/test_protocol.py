"""Link over a socketpair: whole, byte by byte, truncated, trailing, damaged. Only its two errors come out."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import typing
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import protocol
from agent.api import Blocker, Notice, Phase
from agent.descriptors import Descriptor
from agent.layout import Mapping
from agent.link import Link
from agent.protocol import Message, Pages, PeerFailed
from agent.resources.files import FileRef
from agent.shadow import Special
from transport import frames
from transport.codec import Encoder
from transport.frames import Kind, LinkClosed, ProtocolError

PAGE = 4096
BASE = 0x5555_0000_0000
SIGINFO = struct.pack("<iii", 10, 0, -1).ljust(128, b"\n")

MESSAGES: list[Message] = [
    protocol.Offer(
        host="alpha",
        pid=12,
        tids=(12, 13),
        files=[FileRef("/usr/bin/sleep", 1000, 0o755, b"d" * 32, "abcd", (1, 2))],
        opened=[],
        copy_files=False,
        specials=[Special("[vdso]", BASE, BASE + PAGE)],
        vdso_digest=b"v" * 32,
        cpu_flags=("avx", "avx2"),
        limits=((1, (1 << 64) - 1),),
        directories=("/tmp/café",),
        listeners=(),
        addresses=(),
    ),
    protocol.Answer(
        host="beta",
        blockers=(Blocker(kind="k", what="w", why="y"),),
        notices=(Notice(kind="n", message="m"),),
        missing=("/x",),
        unshared=("/x", "/y"),
    ),
    protocol.FileData(path="/x", data=bytes(range(256)), last=True),
    protocol.Ping(),
    protocol.Pong(1, 2),
    protocol.Prepare(
        monotonic_delta=-5, boottime_delta=7, session_leader=True, layout=[Mapping(BASE, BASE + PAGE, 3, 8)]
    ),
    protocol.Prepared(pid=7, new_pid_namespace=True),
    protocol.Layout([Mapping(BASE, BASE + PAGE, 3, 0, 0, PAGE)]),
    protocol.Discard([(BASE, BASE + PAGE)]),
    protocol.Guards([(BASE, BASE + PAGE)]),
    protocol.RoundEnd(3),
    protocol.RoundDone(3),
    protocol.Also(opened=[FileRef("/var/log/x", 1, 0o600, b"d" * 32)], directories=("/var",)),
    protocol.Agreed(("/var/log/x",)),
    protocol.Resumed(1 << 40),
    protocol.Ready(phases=(Phase(name="p", ms=1.5, where="destination"),), notices=()),
    protocol.Verify(pieces=[(BASE, BASE + PAGE, b"x" * 16)], masked=[(BASE + 1, BASE + 5)], last=True),
    protocol.Verified(memory=[(BASE, BASE + PAGE)], others=("mapping",)),
    protocol.Commit([(0, SIGINFO), (7, SIGINFO)]),
    protocol.Live(phases=(), address_moved=("10.0.0.1",)),
    protocol.Late([b"\x45", b""], [(0, SIGINFO)], last=False),
    protocol.Descriptors(
        [Descriptor("pipe", ((3, True), (4, False)), 2, msgspec.Raw(b"\x80"))], captured_at=7, last=False
    ),
    protocol.Complete(0x55550000, 2),
    protocol.Done(notices=()),
    protocol.Failed("kind", "message"),
]


class Ends:
    """A Link, and the bare other end of its stream."""

    def __init__(self) -> None:
        ours, self.raw = socket.socketpair()
        # the first of unix(7)'s limits on one write without a reader
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.link = Link(ours)

    def sent(self) -> bytes:
        """All that the link has written so far."""
        self.raw.setblocking(False)
        parts = b""
        try:
            while data := self.raw.recv(1 << 20):
                parts += data
        except BlockingIOError:
            pass
        self.raw.setblocking(True)
        return parts

    def close(self) -> None:
        self.link.close()
        self.raw.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = Ends()
    yield found
    found.close()


def encoded(message: Message) -> bytes:
    ends = Ends()
    ends.link.send(message)
    data = ends.sent()
    ends.close()
    return data


def pages_frame(content: bytes, ranges: list[tuple[int, int]]) -> bytes:
    kind, body = Encoder("zstd", -3).encode(memoryview(content))
    return frames.encode(kind, frames.encode_ranges(ranges) + body, len(content))


def name(message: Message) -> str:
    return type(message).__name__


def test_every_kind_of_message_is_in_this_test_or_needs_a_process() -> None:
    kinds = set(typing.get_args(Message))
    assert kinds - {type(m) for m in MESSAGES} == {protocol.NewFiles, protocol.Rebuild, protocol.Threads}


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_whole(ends: Ends, message: Message) -> None:
    data = encoded(message)
    ends.raw.sendall(data)
    assert ends.link.receive() == message
    assert not ends.link.readable()


def test_bytes_are_counted(ends: Ends) -> None:
    for message in (protocol.Ping(), protocol.FileData(path="/x", data=b"y" * 1000, last=False)):
        before = ends.link.bytes_sent
        ends.link.send(message)
        assert ends.link.bytes_sent - before == len(ends.sent())


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_byte_by_byte(ends: Ends, message: Message) -> None:
    data = encoded(message)

    def trickle() -> None:
        for n in range(len(data)):
            ends.raw.send(data[n : n + 1])

    thread = threading.Thread(target=trickle)
    thread.start()
    assert ends.link.receive() == message
    thread.join()


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_truncated(message: Message) -> None:
    data = encoded(message)
    for end in {0, 1, 15, 16, 17, len(data) // 2, len(data) - 1} & set(range(len(data))):
        ends = Ends()
        ends.raw.sendall(data[:end])
        ends.raw.close()
        with pytest.raises(LinkClosed):
            ends.link.receive()
        ends.close()


def test_trailing_bytes_belong_to_the_next_frame(ends: Ends) -> None:
    first, second = encoded(protocol.Pong(1, 2)), encoded(protocol.Commit([]))
    ends.raw.sendall(first + second + b"garbage that is no frame")
    assert ends.link.receive() == protocol.Pong(1, 2)
    assert ends.link.receive() == protocol.Commit([])
    with pytest.raises(ProtocolError):
        ends.link.receive()


def test_trailing_bytes_inside_a_frame_are_no_message(ends: Ends) -> None:
    body = msgspec.msgpack.encode(protocol.Commit([])) + b"\0"
    ends.raw.sendall(frames.encode(Kind.MESSAGE, body))
    with pytest.raises(ProtocolError):
        ends.link.receive()


@pytest.mark.parametrize("content", [os.urandom(3 * PAGE), b"ab" * 6144, bytes(3 * PAGE)])
def test_pages(ends: Ends, content: bytes) -> None:
    ranges = [(BASE, BASE + PAGE), (BASE + 4 * PAGE, BASE + 6 * PAGE)]
    kind, body = Encoder("zstd", -3).encode(memoryview(content))
    ends.link.send_pages(kind, ranges, body, len(content))
    other = Ends()
    other.raw.sendall(ends.sent())
    found = other.link.receive()
    assert isinstance(found, Pages)
    assert found.ranges == ranges and bytes(found.data) == content
    other.close()


@pytest.mark.parametrize(
    "ranges",
    [
        [(BASE, BASE + PAGE)],
        [(BASE, BASE + 4 * PAGE)],
        [],
        [(BASE + PAGE, BASE + 3 * PAGE), (BASE, BASE + PAGE)],
        [(BASE, BASE + 2 * PAGE), (BASE + PAGE, BASE + 2 * PAGE)],
    ],
)
def test_pages_that_do_not_fit_their_ranges(ends: Ends, ranges: list[tuple[int, int]]) -> None:
    ends.raw.sendall(pages_frame(b"x" * 3 * PAGE, ranges))
    with pytest.raises(ProtocolError):
        ends.link.receive()


# --- hostile ---

STREAM = b"".join(
    [
        encoded(protocol.Pong(1, 2)),
        pages_frame(b"ab" * PAGE, [(BASE, BASE + 2 * PAGE)]),
        encoded(MESSAGES[5]),
        encoded(protocol.Answer(host="beta", blockers=(), notices=(), missing=("/x",), unshared=())),
        encoded(protocol.Failed("kind", "message")),
    ]
)


def receive_all(data: bytes) -> int:
    """Feed a link until it ends; how many frames it understood. All but its two errors is let through."""
    ends = Ends()
    count = 0
    try:
        ends.raw.sendall(data)
        ends.raw.close()
        while True:
            ends.link.receive()
            count += 1
    except (LinkClosed, ProtocolError):
        return count
    finally:
        ends.close()


def test_the_stream_is_sound() -> None:
    assert receive_all(STREAM) == 5


@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_one_byte_changed(at: int, change: int) -> None:
    data = bytearray(STREAM)
    data[at] ^= change
    assert receive_all(bytes(data)) < 5


@given(st.binary(max_size=400))
def test_anything(data: bytes) -> None:
    receive_all(data)


TAGS = [str(m.__struct_config__.tag) for m in MESSAGES]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(), st.binary()
)
TREES = st.recursive(
    SCALARS,
    lambda t: st.lists(t, max_size=4) | st.dictionaries(st.text(max_size=8), t, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted({f for m in typing.get_args(Message) for f in m.__struct_fields__}))


@given(st.dictionaries(FIELDS, TREES), st.sampled_from(TAGS))
def test_messages_with_any_fields(fields: dict[str, object], tag: str) -> None:
    """A right checksum around wrong content."""
    receive_all(frames.encode(Kind.MESSAGE, msgspec.msgpack.encode({"type": tag, **fields})))


@given(st.binary(max_size=60), st.sampled_from(list(Kind)), st.integers(0, 3 * PAGE))
@example(b"\x82\xa4type\xa6failed\xa4kind\xa1\xff", Kind.MESSAGE, 0)  # text that is not UTF-8
@example(b"\x91" * 60, Kind.MESSAGE, 0)
@example(b"\xdd\xff\xff\xff\xff", Kind.MESSAGE, 0)  # an array of four billion
@example(b"\xc6\xff\xff\xff\xff", Kind.MESSAGE, 0)
def test_any_body(body: bytes, kind: Kind, raw_size: int) -> None:
    receive_all(frames.encode(kind, body, raw_size))


def test_a_deep_nest() -> None:
    body = msgspec.msgpack.encode({"type": "rebuild"})[:-8] + b"\xa7rebuild"
    for opening in (b"\x91", b"\x81\xa1x"):
        deep = b"\x82\xa4type\xa6verify\xa6pieces" + opening * 100_000
        assert receive_all(frames.encode(Kind.MESSAGE, deep)) == 0
        unknown = b"\x82\xa4type\xa6commit\xa6pieces" + opening * 100_000
        assert receive_all(frames.encode(Kind.MESSAGE, unknown)) == 0
    assert receive_all(frames.encode(Kind.MESSAGE, body)) == 0


def test_an_oversize_frame_is_refused_by_its_header(ends: Ends) -> None:
    ends.raw.sendall(struct.pack("<HBBIII", frames.MAGIC, 0, 0, frames.MAX_MESSAGE + 1, 0, 0))
    with pytest.raises(ProtocolError, match="bound"):
        ends.link.receive()


# --- order and time ---


def test_expect(ends: Ends) -> None:
    ends.raw.sendall(
        encoded(protocol.Commit([])) + encoded(protocol.Ping()) + encoded(protocol.Failed("why", "because"))
    )
    assert ends.link.expect(protocol.Commit) == protocol.Commit([])
    with pytest.raises(ProtocolError, match="Ping where Commit was due"):
        ends.link.expect(protocol.Commit)
    with pytest.raises(PeerFailed, match="because") as failed:
        ends.link.expect(protocol.Commit)
    assert failed.value.kind == "why"
    with pytest.raises(TimeoutError, match="no Commit"):
        ends.link.expect(protocol.Commit, time.monotonic() + 0.01)


def test_sending_to_nobody(ends: Ends) -> None:
    ends.raw.close()
    with pytest.raises(LinkClosed):
        ends.link.send(protocol.Ping())


def test_a_reader_that_takes_nothing(ends: Ends) -> None:
    ends.link.set_timeout(0.05)
    with pytest.raises(LinkClosed, match="stalled"):
        for _ in range(100):
            ends.link.send(protocol.FileData(path="/x", data=bytes(1 << 20), last=False))
    with pytest.raises(LinkClosed):
        ends.link.receive()
