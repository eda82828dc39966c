"""Targets of the stream between two agents: frames, messages, and what is inside them."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from random import Random

import msgspec
from fuzz import rebuilding
from fuzz.mutate import frames_of, mutate_bytes, mutate_msgpack, mutate_stream
from fuzz.target import ROOM_FOR_PAGES, Target
from unit import test_protocol

from agent import kinds, protocol
from agent.descriptors import Descriptor
from agent.kernel import packet
from agent.layout import Mapping
from agent.link import Link
from agent.protocol import Pages
from agent.resources import char_device, epoll, eventfd, pipe, regular_file, signalfd, tcp_socket, timerfd
from agent.resources.files import FileRef
from agent.resources.pipe import Fifo
from agent.resources.service_address import ServiceAddress
from agent.resources.tcp import Queues, SocketAddress, TcpConnection, TcpListener
from agent.shadow import Special
from transport import frames
from transport.codec import Decoder, Encoder
from transport.frames import Kind, LinkClosed, ProtocolError

RECORDED = Path(__file__).parent.parent / "unit" / "data"


_NAMES: list[str] = [kind.NAME for kind in kinds.KINDS]
_HERE, _THERE = SocketAddress("192.0.2.10", 7000), SocketAddress("192.0.2.1", 40000)
CONNECTION = TcpConnection(
    family=2,
    state=8,
    local=_HERE,
    peer=_THERE,
    queues=Queues(receive_seq=1 << 31, unread=b"GET", send_seq=7, sent=b"+OK", unsent=b""),
    mss_clamp=1460,
    wscale=(7, 7),
    sack=True,
    timestamp=123456,
    timestamp_usec=False,
    captured_at=1.7e9,
    window=(1, 64000, 65000, 502, 1 << 31),
    window_clamp=65535,
    options={"TCP_NODELAY": b"\1\0\0\0", "IP_TRANSPARENT": b"\1\0\0\0"},
    reuse_address=True,
    device=b"",
    buffers=(131072, 16384, 0),
    filter=b"",
    uid=0,
)
LISTENER = TcpListener(
    family=10,
    local=SocketAddress("::", 7000),
    backlog=511,
    options={"IPV6_V6ONLY": b"\1\0\0\0"},
    reuse_address=True,
    device=b"eth0\0",
    buffers=(131072, 16384, 0),
    filter=b"\6\0\0\0\xff\xff\xff\xff",
    uid=1000,
)
ADDRESS = ServiceAddress(
    address="192.0.2.10",
    prefix_length=24,
    family=2,
    interface="eth0",
    scope=0,
    flags=128,
    broadcast="192.0.2.255",
    label="eth0",
    preferred=(1 << 32) - 1,
    valid=(1 << 32) - 1,
    metric=0,
)
_FILE = FileRef("/usr/lib/libx.so", 4096, 0o755, bytes(32), "ab" * 20, (1, 2), (4096, 1, 1))
MESSAGES: list[protocol.Message] = [  # with what the recorded migration does not have
    protocol.Offer(
        host="alpha",
        pid=12,
        migration="01ARZ3NDEKTSV4RRFFQ69G5FAV",
        tids=(12, 13),
        files=[_FILE],
        opened=[_FILE],
        copy_files=True,
        specials=[Special("[vvar]", 0x7FFF_0000_0000, 0x7FFF_0000_4000)],
        vdso_digest=bytes(32),
        cpu_flags=("avx",),
        limits=((1, (1 << 64) - 1),) * 16,
        directories=("/",),
        listeners=(LISTENER,),
        connections=(CONNECTION,),
        addresses=(ADDRESS,),
    ),
    protocol.NewFiles([_FILE]),
    protocol.Also(
        opened=[_FILE], directories=("/",), fifos=(Fifo("/run/f", 0o600, (0, 0)),), listeners=(LISTENER,)
    ),
    protocol.Discard([(4096, 8192), (8192, 16384)]),
    protocol.Late([], [(0, struct.pack("<i", 10).ljust(128, b"\0"))], last=True),
    protocol.Layout([Mapping(4096 * n, 4096 * n + 4096, n % 8, 0, -1, 0) for n in range(16, 40)]),
]

STATES: list[tuple[str, msgspec.Struct]] = [
    ("regular-file", regular_file.State("/var/log/x", 0o2001, 10, 20, 30, content=None, identity=(1, 2))),
    ("regular-file", regular_file.State("/tmp/x", 2, 0, 3, 30, content=b"abc")),
    ("character-device", char_device.State(3, 2)),
    ("pipe", pipe.State(77, "", 0o600, 0, 65536, b"in the pipe")),
    ("eventfd", eventfd.State(7, True, 0o4000)),
    ("timerfd", timerfd.State(1, 2, 0, 1, 5_000_000, 1_000_000)),
    ("signalfd", signalfd.State(1 << 9, 0o4000)),
    ("epoll", epoll.State((epoll.Entry(5, 1, 5), epoll.Entry(6, 1 << 30, 1 << 63)))),
    ("tcp", tcp_socket.State(CONNECTION, 0o4000)),
    ("tcp", tcp_socket.State(LISTENER, 0)),
]


class InMemory:
    """A stream that is here already, with the few methods of a socket that a Link reads by."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def recv_into(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def link(data: bytes) -> Link:
    return Link(InMemory(data))  # type: ignore[arg-type]


@functools.cache
def recorded() -> list[bytes]:
    """Both directions of whole migrations."""
    return [file.read_bytes() for file in sorted(RECORDED.glob("stream-*"))]


@functools.cache
def messages() -> list[bytes]:
    """One of each kind, and what real migrations had."""
    made = [msgspec.msgpack.encode(message) for message in [*test_protocol.MESSAGES, *MESSAGES]]
    whole = [body for stream in recorded() for kind, body, _ in frames_of(stream) if kind is Kind.MESSAGE]
    return list(dict.fromkeys([*made, *whole]))


def _stream(data: bytes) -> bool:
    """A destination, as far as it goes by itself: frame after frame."""
    source, count = link(data), 0
    try:
        while True:
            message = source.receive()
            if isinstance(message, Pages):
                assert sum(end - start for start, end in message.ranges) == len(message.data)
            rebuilding.use(message)
            count += 1
    except (LinkClosed, ProtocolError):
        return count > 0


def _streams() -> list[bytes]:
    """Short pieces: a whole migration takes a decoder long."""
    found = [test_protocol.STREAM]
    for stream in recorded():
        parts = [frames.encode(*frame) for frame in frames_of(stream) if len(frame[1]) < 30_000]
        found += [b"".join(parts[first : first + 4]) for first in range(0, len(parts), 4)]
    return found


def _message(data: bytes) -> bool:
    try:
        rebuilding.use(protocol.decode(data))
    except ProtocolError:
        return False
    return True


def _ranges(data: bytes) -> bool:
    try:
        ranges, rest = frames.decode_ranges(memoryview(data))
    except ProtocolError:
        return False
    assert frames.encode_ranges(ranges) + bytes(rest) == data
    return True


def _range_tables() -> list[bytes]:
    tables = [[], [(0, 4096)], [(4096 * n, 4096 * n + 4096) for n in range(0, 20, 2)]]
    return [frames.encode_ranges(table) + b"rest" for table in tables]


def _codec(data: bytes) -> bool:
    """The first bytes: which kind of frame, and the size that it announces."""
    if len(data) < 5:
        return False
    kind = Kind.PAGES_ZSTD if data[0] & 1 else Kind.PAGES_RAW
    size = int.from_bytes(data[1:5], "little") % (frames.MAX_PAGES + 1)
    try:
        return len(Decoder().decode(kind, memoryview(data)[5:], size)) == size
    except ProtocolError:
        return False


def _packed() -> list[bytes]:
    found = []
    for content in (bytes(4096), b"ab" * 6144, bytes(range(256)) * 64):
        kind, body = Encoder("zstd", -3).encode(memoryview(content))
        found.append(struct.pack("<BI", kind is Kind.PAGES_ZSTD, len(content)) + body)
    return found


def _descriptor(data: bytes) -> bool:
    """The first byte: which kind."""
    if not data:
        return False
    name = _NAMES[data[0] % len(_NAMES)]
    try:
        state = kinds.decode(Descriptor(name, ((3, False),), 0, msgspec.Raw(data[1:])))
    except ProtocolError:
        return False
    rebuilding.descriptor(name, state)
    return True


def _descriptors() -> list[bytes]:
    made = [bytes([_NAMES.index(name)]) + msgspec.msgpack.encode(state) for name, state in STATES]
    found = made + [
        bytes([_NAMES.index(one.kind)]) + bytes(one.state)
        for body in messages()
        if isinstance(message := protocol.decode(body), protocol.Descriptors)
        for one in message.descriptors
        if one.kind in _NAMES
    ]
    return list(dict.fromkeys(found))


def _mutate_descriptor(data: bytes, random: Random) -> bytes:
    return data[:1] + mutate_msgpack(data[1:], random)


def _packet(data: bytes) -> bool:
    if not rebuilding.packets([data]):
        return False
    parsed = packet.parse(data)
    packet.destination_port(data, parsed)
    if not parsed.fragment:
        assert len(packet.with_tcp_checksum(data, parsed.tcp)) == len(data)
    return True


def _packets() -> list[bytes]:
    def one(source: str, destination: str) -> bytes:
        return packet.tcp_packet((source, 40000), (destination, 7000), 1, 2, packet.ACK, 1000)

    return [one("192.0.2.1", "192.0.2.10"), one("2001:db8::1", "2001:db8::10")]


TARGETS = (
    Target("stream", _stream, _streams, mutate_stream, ROOM_FOR_PAGES),
    Target("message", _message, messages, mutate_msgpack),
    Target("ranges", _ranges, _range_tables, mutate_bytes),
    Target("codec", _codec, _packed, mutate_bytes, ROOM_FOR_PAGES),
    Target("descriptor", _descriptor, _descriptors, _mutate_descriptor),
    Target("packet", _packet, _packets, mutate_bytes),
)
